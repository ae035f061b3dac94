"""Where dense attention looks, and how much of that a method computes: why a method loses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from diffpatch import showing
from diffpatch.checking import Natural, checked
from diffpatch.errors import BadParameter, DiffpatchError, NotPatched
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.patching.api import named_owners
from diffpatch.patterns.drawing import only_grid, seen_by
from diffpatch.patterns.grid import TokenGrid
from diffpatch.tuning import attention_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from diffpatch.patching.patch import SparseCall

SAMPLED = 8  # queries of a call, beside the one that was asked for, that the mass kept is a mean of


_HOW = ": run the pipeline in the with block, and choose a step and a layer that are not dense"


@dataclass(repr=False, eq=False)
class AttentionMaps:
    """What one query of a layer attends to, and the mass that each head of each layer keeps.

    The *mass* of a key is its weight in dense attention, after the softmax: over all keys it sums
    to 1. A method keeps the mass of the keys that it computes exactly. Keys that it reads as
    virtual tokens, or remembers from an earlier step, do not count.

    Attributes:
        layer: number of the mapped layer.
        step: the denoising step, counted in model evaluations.
        query: (frame, row, column) of the mapped query.
        grid: the token grid; None until the step is reached.
        mass: fp32 (H, S), the mass of each key for the query, in the order of the sequence.
        exact: bool (H, S), True for keys that the method computes exactly.
        mass_kept: layer, named as in `Report.kept_per_layer` -> mass kept by each head, the mean
            over some queries.
        note: why some calls could not be examined; empty if all could.
    """

    layer: int
    step: int
    query: tuple[int, int, int] | None = None
    grid: TokenGrid | None = None
    mass: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    exact: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    mass_kept: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def mass_per_frame(self) -> torch.Tensor:
        """fp32 (H, num_frames): the mass in each frame; what is missing to 1 lies in text."""
        grid = self._seen()
        return self._frames(self.mass).sum((2, 3)).reshape(-1, grid.num_frames)

    @checked()
    def frames(self, head: Natural | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The mass (fp32) and which keys are exact (bool), both (num_frames, height, width).

        Args:
            head: one head; None takes the mean mass, and calls a key exact if at least half of the
                heads compute it exactly.

        Raises:
            BadParameter: there is no such head.
        """
        self._seen()
        if head is not None and head >= len(self.mass):
            raise BadParameter(f"head={head} must be below {len(self.mass)}")
        heads = slice(None) if head is None else slice(head, head + 1)
        exact = self._frames(self.exact[heads].float()).mean(0) >= 0.5
        return self._frames(self.mass[heads]).mean(0), exact

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        grid = self._seen()
        return {
            "layer": self.layer, "step": self.step, "query": self.query, "grid": str(grid),
            "mass_kept": self.mass_kept, "mass_per_frame": self.mass_per_frame.tolist(),
        }  # fmt: skip

    def draw(self, head: int | None = None) -> Image.Image:
        """The map as a picture: the frames, bright where the query looks, what is exact outlined.

        Args:
            head: one head; None takes the mean over heads.

        Raises:
            DiffpatchError: the step was not reached in a sparse call of the layer.
        """
        grid = self._seen()
        assert self.query is not None
        return attention_picture.draw(*self.frames(head), grid, self.query, self._title(head))

    def plot(self, ax: Axes | None = None, *, head: int | None = None) -> tuple[Figure, Axes]:
        """The same with matplotlib.

        Args:
            ax: where to; None makes a figure.
            head: one head; None takes the mean over heads.

        Raises:
            DiffpatchError: as in `draw`, or matplotlib is not installed.
        """
        self._seen()
        mass, exact = self.frames(head)
        return attention_picture.plot(mass, exact, self._title(head), ax)

    def plot_heads(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The mass that each head of each layer keeps.

        Args:
            ax: where to; None makes a figure.

        Raises:
            DiffpatchError: as in `plot`.
        """
        self._seen()
        rows = list(self.mass_kept.values())
        figure, ax = showing.heat(ax, rows, "mass kept", ("layer", "head", "mass kept"))
        ax.set_yticks(range(len(rows)), [name.rpartition(".")[2] for name in self.mass_kept])
        ax.images[0].set_clim(0, 1)
        return figure, ax

    def __repr__(self) -> str:
        if self.grid is None:
            return f"AttentionMaps(layer {self.layer}, step {self.step}: nothing seen yet)"
        return f"AttentionMaps({self._title(None)})"

    def _repr_html_(self) -> str:
        if self.grid is None:
            return showing.table_html(repr(self), [])
        heads = showing.heat_picture(list(self.mass_kept.values()))
        caption = "mass kept by layer (down) and head (to the right): bright is all, dark none"
        return (
            showing.table_html(self._title(None), [])
            + showing.figure_html(self.draw(), "dense mass of the query; outlined: exact")
            + showing.figure_html(heads, caption)
        )

    def _title(self, head: int | None) -> str:
        heads = slice(None) if head is None else slice(head, head + 1)
        kept = float((self.mass * self.exact)[heads].sum(1).mean())
        which = "mean over heads" if head is None else f"head {head}"
        return f"layer {self.layer}, step {self.step}, {which}: {kept:.0%} of dense mass kept"

    def _frames(self, of_tokens: torch.Tensor) -> torch.Tensor:
        grid = self._seen()
        visual = of_tokens[:, grid.text_before : grid.text_before + grid.visual_tokens]
        return visual.unflatten(1, grid.shape)

    def _seen(self) -> TokenGrid:
        if self.grid is None:
            raise DiffpatchError(
                f"no sparse call of layer {self.layer} was seen in step {self.step}"
                + (self.note or _HOW)
            )
        return self.grid

    def add(self, call: SparseCall) -> None:
        """Take notice of a call, if it is of the step; of guidance branches the first counts."""
        transformer, layer, step, branch = call.place
        name = f"{transformer}.{layer}"
        if step != self.step or branch or name in self.mass_kept:
            return
        try:
            grid = only_grid(call.pattern)
            exact_keys(call, 0)
        except BadParameter as error:
            self.note = f": {error}"
            return
        tokens = [*range(grid.text_before, grid.num_tokens - grid.text_after)]
        sample = tokens[:: max(1, len(tokens) // SAMPLED)][:SAMPLED]
        mass = probabilities(call, sample)
        exact = torch.stack([exact_keys(call, token) for token in sample], 1)
        self.mass_kept[name] = (mass * exact).sum(2).mean(1).tolist()
        if layer == self.layer and self.grid is None:
            self.query = _inside(self.query, grid)
            frame, row, column = self.query
            token = grid.text_before + (frame * grid.height + row) * grid.width + column
            self.grid, self.exact = grid, exact_keys(call, token)
            self.mass = probabilities(call, [token])[:, 0]
            self.exact = self.exact.expand_as(self.mass)


def probabilities(call: SparseCall, tokens: Sequence[int]) -> torch.Tensor:
    """fp32 (H, n, S) on the CPU: dense attention of some queries of the first batch entry.

    Args:
        call: whose queries and keys.
        tokens: places in the sequence of the pattern's grid.
    """
    q, k = call.q[0].detach(), call.k[0].detach()
    keys = None if call.keys is None else call.keys[0]
    if call.order is not None:
        q, k = q[call.order], k[call.order]
        keys = None if keys is None else keys[call.order]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("nhd,shd->hns", q[list(tokens)].float(), k.float()) * call.scale
    if keys is not None:
        scores = scores.masked_fill(~keys, float("-inf"))
    return scores.softmax(2).cpu()


def exact_keys(call: SparseCall, token: int) -> torch.Tensor:
    """bool (H or 1, S) on the CPU: the keys that the method computes exactly for one query.

    Raises:
        BadParameter: the method chooses by content and does not tell what.
    """
    pattern = call.pattern
    of_heads = pattern.blocks.head_pattern
    heads = range(1 if of_heads is None else len(of_heads))
    seen = torch.stack([
        pattern.once(("seen by", token, int(of_heads[head]) if of_heads is not None else 0),
                     functools.partial(seen_by, pattern, token, head)) for head in heads
    ])  # fmt: skip
    chosen = call.method.selection_of(pattern, call.state)
    if chosen is None:
        if call.method.dynamic:
            raise BadParameter(f"{call.method.name} does not tell which keys it chose")
        return seen
    flags, strip = chosen
    blocks = pattern.blocks.to("cpu")
    place = int((blocks.order == token).nonzero())
    tile = int(torch.searchsorted(blocks.starts.long(), place, right=True)) - 1
    lengths = tile_table(blocks, strip).strips.first.long().diff()
    in_tiles = flags[0, :, tile].cpu().repeat_interleave(lengths, 1)
    out = torch.zeros_like(in_tiles)
    out[:, blocks.order.long()] = in_tiles
    return out & seen


def _inside(query: Sequence[int] | None, grid: TokenGrid) -> tuple[int, int, int]:
    chosen = tuple(n // 2 for n in grid.shape) if query is None else tuple(query)
    if len(chosen) != 3 or not all(0 <= i < n for i, n in zip(chosen, grid.shape, strict=True)):
        raise BadParameter(f"query={chosen} must be (frame, row, column) inside of {grid}")
    return chosen


@checked()
@contextlib.contextmanager
def attention_maps(
    target: Any,
    layer: Natural | None = None,
    *,
    step: Natural,
    query: tuple[int, int, int] | None = None,
) -> Iterator[AttentionMaps]:
    """Record where dense attention looks in one step of a run, and what a method keeps of it::

        with diffpatch.attention_maps(pipe, layer=3, step=5, query=(6, 8, 8)) as maps:
            pipe("a red fox runs through snow")
        maps.plot()        # where the query looks, frame by frame; exact keys are outlined
        maps.plot_heads()  # the mass that each head of each layer keeps

    It costs little, because it examines only a few queries of one step. Outputs do not change.

    Args:
        target: a patched pipeline or transformer.
        layer: number of the layer to map, among the patched ones; None takes the middle one.
            `AttentionMaps.mass_kept` covers all layers.
        step: the denoising step to map, counted in model evaluations; it must not be a dense one.
        query: (frame, row, column) in tokens; None takes the middle of the grid.

    Raises:
        NotPatched: the target carries no patch.
        BadParameter: there is no such layer, or the query lies outside of the grid.
    """
    from diffpatch import internals  # imports diffusers, which takes seconds

    found = named_owners(target)
    if not found:
        raise NotPatched(f"{type(target).__name__} is not patched: call diffpatch.patch(...) first")
    layers = len(next(iter(found.values())).modules)
    if layer is None:
        layer = layers // 2
    if layer >= layers:
        raise BadParameter(f"layer={layer}: {layers} layers are patched, the last is {layers - 1}")
    maps = AttentionMaps(layer, step, query)

    def observe(call: SparseCall) -> None:
        if not internals.is_pipeline(target) or call.run.pipeline in (None, target):
            maps.add(call)

    with contextlib.ExitStack() as stack:
        for patch in dict.fromkeys(owner.patch for owner in found.values()):
            stack.enter_context(patch.observed(observe))
        yield maps
