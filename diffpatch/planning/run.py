"""What a run computes: the attention calls of its steps and layers, counted one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.methods.base import Method
from diffpatch.methods.packed import of_span, pattern_on
from diffpatch.patching.attention.layout import silent_tokens
from diffpatch.patching.options.schedule import BoundSchedule
from diffpatch.patterns.grid import Grid, PackedGrid, TokenGrid
from diffpatch.patterns.packed import without_queries
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.pipelines.families.info import FamilyInfo
from diffpatch.pipelines.families.spans import joined
from diffpatch.pipelines.shapes.table import ModelShape

Size = tuple[int, int, int]  # (num_frames, height, width) in pixels


class PlannedRun:
    """The attention calls of one guidance branch.

    Attributes:
        method: what is patched in.
        grid: the tokens.
        bound: which steps and layers stay dense.
        steps: denoising steps.
        layers: self-attention layers.
        backend: whose padding is counted.
        kept: of every (step, layer).
        sparse: of those that are not dense.
        work: of every (step, layer), None where it is dense, also if its pattern keeps everything.
        modelled: whether every sparse call has a model of its work.
        made: the patterns by variant.
        used: of every sparse call, its pattern.
        holds: by layer, the pattern that its state is about.
        guided: share of the guidance branches that a guide serves, where there is one.
        every: steps that the cross-attention of a guide forward serves; 0 where there is none.
        guides: guide forwards of the run, as a fraction of the others.
        asking: the share of the tokens that have queries; fractions are of their pairs.
    """

    def __init__(
        self,
        method: Method,
        grid: Grid,
        bound: BoundSchedule,
        steps: int,
        layers: int,
        backend: str,
        guided: float = 1.0,
        silent: range = range(0),
    ) -> None:
        self.method, self.grid, self.bound = method, grid, bound
        self.steps, self.layers, self.backend = steps, layers, backend
        self.every = method.guide_every(_made(grid))
        every, self.guided, self.guides = self.every, guided, 0.0
        self.asking = 1 - len(silent) / grid.num_tokens
        self.kept: list[float] = []
        self.sparse: list[float] = []
        self.work: list[Work | None] = []
        self.modelled = True
        self.made: dict[Any, BlockPattern] = {}
        self.used: list[BlockPattern] = []
        self.holds: dict[int, BlockPattern] = {}
        for step, layer in itertools.product(range(steps), range(layers)):
            if bound.reason(step, layer):
                self.kept.append(1.0)
                self.work.append(None)
                continue
            variant, age = method.variant(layer, step), step - bound.first
            if variant not in self.made:
                made = pattern_on(method, grid, variant)
                self.made[variant] = without_queries(made, silent) if silent else made
            pattern = self.made[variant]
            self.holds.setdefault(layer, pattern)
            self.used.append(pattern)
            self.sparse.append(method.kept_at(pattern, age) / self.asking)
            guide = guided if every and age % every == 0 else 0.0
            self.guides += guide / steps / layers
            self.kept.append(self.sparse[-1] + guide)
            whole = self._runs_dense(pattern)
            self.work.append(None if every or whole else method.work(pattern, age, backend))
            self.modelled = self.modelled and (whole or self.work[-1] is not None)

    def _runs_dense(self, pattern: BlockPattern) -> bool:
        """Whether a call is left to dense attention because its pattern keeps everything."""
        grids = self.grid.grids if isinstance(self.grid, PackedGrid) else (self.grid,)
        return pattern.kept >= 1.0 and not any(map(self.method.changes_whole, grids))

    def kept_table(self) -> torch.Tensor:
        """fp64 (steps, layers), the kept fraction of every call."""
        return torch.tensor(self.kept, dtype=torch.float64).view(self.steps, self.layers)

    def kept_sparse(self) -> float:
        """The mean over sparse calls; 1 if there are none."""
        return sum(self.sparse) / len(self.sparse) if self.sparse else 1.0

    def kept_visual(self) -> float:
        """The mean over sparse calls that refresh nothing, of the pairs of visual tokens alone."""
        if not self.used:
            return 1.0
        share = {id(p): self.method.kept_at(p, age=1) for p in self.made.values()}
        kept = sum(share[id(p)] for p in self.used) / len(self.used)
        grids = self.grid.grids if isinstance(self.grid, PackedGrid) else (self.grid,)
        visual = sum(grid.visual_tokens**2 for grid in grids) / self.grid.num_tokens**2
        return (kept - (self.asking - visual)) / visual  # all other pairs are always kept

    def at_most(self) -> bool:
        """Whether the run may keep less than is counted, because the data decide."""
        return any(map(self.method.at_most, self.made.values()))

    def visited(self) -> float | None:
        """Pairs in visited tiles, the mean over sparse calls; None if there is more than tiles."""
        if not self.method.only_skips or not self.used:
            return None
        areas = {id(p): p.blocks.derived("visited", _visited) for p in self.made.values()}
        return sum(areas[id(p)] for p in self.used) / len(self.used) / self.asking

    def computed(self) -> float | None:
        """Pairs that the backend computes, the mean over sparse calls; None without a model."""
        done = [work.computed for work in self.work if work is not None]
        if not done or not self.modelled:
            return None
        return sum(done) / len(done) / self.grid.num_tokens**2 / self.asking

    def kept_per_span(self) -> tuple[float, ...]:
        """Of a packed sequence, what patterns keep within each span; the mean over sparse calls."""
        if not isinstance(self.grid, PackedGrid) or not self.used:
            return ()
        kept = {
            id(pattern): [of_span(self.method, one, variant).kept for one in self.grid.grids]
            for variant, pattern in self.made.items()
        }
        grids = iter(zip(*(kept[id(pattern)] for pattern in self.used), strict=True))
        return tuple(
            1.0 if isinstance(span, int) else sum(next(grids)) / len(self.used)
            for span in self.grid.spans
        )

    def partial_share(self) -> float:
        """Visited tiles that need an element mask, as a fraction."""
        if not self.made:
            return 0.0
        visits = torch.cat([pattern.blocks.mask_ids for pattern in self.made.values()])
        return float((visits >= 0).float().mean()) if len(visits) else 0.0

    def state_size(self, shape: ModelShape) -> int:
        """Bytes held across steps for one guidance branch."""
        size = shape.heads, shape.head_dim
        held = sum(self.method.state_size(pattern, *size) for pattern in self.holds.values())
        if self.every:  # the cross-attention of every layer, 16-bit
            tokens = self.grid.num_tokens * shape.heads * shape.head_dim
            held += round(2 * tokens * self.layers * self.guided)
        return held

    def scratch_size(self, shape: ModelShape) -> int:
        """Bytes that one call holds while it decides, the most of all layers."""
        sizes = (self.method.scratch_size(p, shape.heads) for p in self.made.values())
        return max(sizes, default=0)


def grid_of(
    shape: ModelShape, size: Size, text_tokens: int | None, references: Sequence[Size] = ()
) -> Grid:
    """The tokens of a clip of (frames, height, width) pixels.

    Raises:
        BadParameter: the model has no clips of that size, or none that refer to others.
    """
    if references and not shape.packed:
        raise BadParameter(
            f"references={tuple(references)}, but {shape.name} packs no videos to refer to into a"
            " sequence: leave them out, and add tokens that are always visible to text_tokens"
        )
    text = shape.text_tokens if text_tokens is None else text_tokens
    latent = _latent(shape, size)
    if not shape.packed:
        return TokenGrid(*latent, *((text, 0) if shape.text_before else (0, text)))
    parts: list[int | Size] = [text]
    for one in references:
        video = one[0] != 1
        parts += [shape.sound_tokens(one[0]) * video, _latent(shape, one, image=not video)]
    return PackedGrid(joined([*parts, shape.sound_tokens(size[0]), latent])).simplest()


def _latent(shape: ModelShape, size: Size, *, image: bool = False) -> Size:
    try:
        return (1, *shape.frame(*size[1:])) if image else shape.grid(*size)
    except ValueError as error:
        raise BadParameter(str(error)) from None


def _made(grid: Grid) -> TokenGrid:
    """The grid of what a run makes: of a packed sequence the last one."""
    return grid.grids[-1] if isinstance(grid, PackedGrid) else grid


def silent_of(family: FamilyInfo | None, grid: Grid) -> range:
    """The tokens that have keys and no queries in a family's models."""
    if family is None or family.text_queries:
        return range(0)
    return silent_tokens(grid, family.text)


def _visited(blocks: BlockIndex) -> float:
    """Pairs in the tiles that are visited, as a fraction of all pairs; the mean over heads."""
    sizes, row = blocks.sizes.double(), blocks.rows
    area = sizes[row % blocks.num_tiles] * sizes[blocks.cols.long()]
    pattern = torch.zeros(blocks.num_patterns, dtype=torch.float64)
    pattern.index_add_(0, row // blocks.num_tiles, area)
    heads = blocks.head_pattern
    mean = pattern.mean() if heads is None else pattern[heads.long()].mean()
    return float(mean) / blocks.num_tokens**2
