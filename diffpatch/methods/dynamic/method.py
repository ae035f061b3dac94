"""Attention whose tiles are chosen by what queries, keys and values hold."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.profiler import record_function

from diffpatch.errors import BadParameter
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import TileTable, tile_table
from diffpatch.kernels.block_sparse.backends import beside
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.kernels.selection.api import select
from diffpatch.kernels.selection.rules import RULES
from diffpatch.kernels.selection.tiles import Options, Tiles
from diffpatch.kernels.virtual_tokens import api as virtual_tokens
from diffpatch.methods import selection
from diffpatch.methods.base import Attended, AttentionCall, Method, param
from diffpatch.methods.dense import LARGE, Dense
from diffpatch.methods.dynamic import budgets, costs, trained
from diffpatch.methods.learned import checkpoint
from diffpatch.methods.learned.files import Layer, Learned
from diffpatch.methods.registry import register
from diffpatch.methods.selection import Levels, always, memory, remembered
from diffpatch.patterns.grid import Grid, TokenGrid
from diffpatch.patterns.pattern import BlockPattern

RESTS = ("auto", "virtual", "drop", "pyramid")
TILES = ((4096, 32), (8192, 64), (math.inf, 128))  # visual tokens below which a tile is so large
DROPPED_FROM = 8192  # visual tokens; rest="auto"
STRIP, STRIP_OF_LARGE = 32, 64  # keys that are taken or left together beside virtual tokens
REFRESH, REFRESH_OF_LONG, LONG = 2, 4, 30  # steps; the second in runs of 30 steps or more
PYRAMID = ((1, 0.1), (2, 0.05), (8, 0.2))  # PSA's for CogVideoX


@register
@dataclass(frozen=True)
class Dynamic(Method):
    """For every tile of queries, each head chooses the strips of keys that it attends to exactly.

    The choice depends on the layer's own queries, keys and values. It is made for each batch entry,
    kept for `refresh` steps, and never used in another layer. The first guidance branch of a step
    chooses for all branches: guidance scales the difference between branches, and what all of them
    leave out alike cancels in it.

    By default the strips are chosen whose loss would change the output most. From 8,192 tokens on
    the others are dropped. On shorter sequences virtual tokens stand for them in the same softmax,
    each the mean of `pool` keys, corrected by what the tile's mean query sees in the keys
    themselves. Text, each tile's view of itself and the first `keep_frames` frames are always
    exact. The same tensors always give the same choice; among equal scores the first strips win.

    `kept` counts pairs of visual queries and visual keys. A virtual token counts as one key, and
    the correction as one query per tile.
    Rules other than "error" are published ones, for comparison at the same `kept`. Four of them
    have a published cut: `threshold` applies it, and the data then decide how much is kept.
    A torch profile names the parts of a call: "dynamic: choose", "dynamic: exact" and
    "dynamic: virtual tokens".

    With `weights` a model runs as it was trained: `kept` is then a fraction of the tiles (0.1 if
    not given), and the weights set all other parameters.
    """

    name = "dynamic"
    summary = "tiles chosen by content: by the error of leaving them out, or by a published rule"
    source = "rule 'error': diffpatch; virtual tokens: PISA, arXiv 2602.01077, and PWT"
    only_skips = False
    dynamic = True
    kept_parameters = ("kept", "threshold", "budgets")
    state_advice = "keep more layers dense, or take larger tiles and strips"

    kept: float = param(0.25, "fraction of the pairs computed, virtual tokens included")
    rule: str = param("error", f"what strips are chosen by: {', '.join(RULES)}")
    rest: str = param(
        "auto",
        "what is not chosen: 'virtual' tokens, 'drop', or 'pyramid' (both, by rank); auto drops it"
        " from 8,192 tokens on",
    )
    pool: int = param(32, "tokens that one virtual token stands for")
    tile: int = param(
        0, "most queries of a tile; 0 takes 32, 64 from 4,096 tokens on, 128 from 8,192"
    )
    strip: int = param(
        0,
        "most keys of a strip; 0 takes 32 (64 above 50,000 tokens), a tile if the rest is dropped",
    )
    refresh: int | None = param(
        None,
        "steps from one choice to the next; None takes 2, and 4 from 30 steps on; 1: each call",
    )
    per_branch: bool = param(
        False, "choose in every guidance branch, not once for all branches of a step"
    )
    threshold: float | None = param(
        None, "the published cut of sol, sparge, xattention or nabla, in place of kept"
    )
    keep_frames: int = param(0, "first latent frames whose keys are always computed")
    pyramid: tuple[tuple[int, float], ...] = param(
        PYRAMID, "rest='pyramid': tokens of a piece and part of the strips, level by level"
    )
    guard: float = param(-0.1, "sparge: self-similarity below which a tile is always exact")
    correct: bool = param(
        True, "rest='virtual': the mean query of a tile also looks at the keys, as a correction"
    )
    budgets: Any = param(
        None, "kept of each head, {layer: (head, head, ...)}; other layers take kept"
    )
    budget_gib: float = param(8.0, "most memory for the state of a run, in GiB")
    weights: str | None = param(
        None, "folder, file or hub model trained sparse (VSA, SLA, SLA2); sets all but kept"
    )

    _trained: ClassVar[str | None] = None

    def validate(self) -> None:
        self.check(0 < self.kept <= 1, "kept", "above 0 and at most 1")
        self.check(self.rule in RULES, "rule", f"one of {', '.join(RULES)}")
        self.check(self.rest in RESTS, "rest", f"one of {', '.join(RESTS)}")
        for name, least in (("pool", 1), ("tile", 0), ("strip", 0), ("keep_frames", 0)):
            value = getattr(self, name)
            self.check(value >= least, name, f"a count from {least}")
        fits = not self.strip or self.pool <= self.strip or self.rest in ("drop", "pyramid")
        self.check(fits, "pool", f"at most strip={self.strip}, which holds whole virtual tokens")
        often = self.refresh is None or self.refresh >= 1
        self.check(often, "refresh", "a count of at least 1, or None")
        cuts = [name for name, rule in RULES.items() if rule.cut]
        able = self.threshold is None or (self.rule in cuts and self.rest != "pyramid")
        self.check(able, "threshold", f"None but for {', '.join(cuts)}")
        sizes = [size for size, _ in self.pyramid]
        rising = all(a < b for a, b in zip([0, *sizes], sizes, strict=False))
        parts = rising and sizes[:1] == [1] and all(part > 0 for _, part in self.pyramid)
        self.check(parts, "pyramid", "(1, part), (tokens, part), ... with rising tokens")
        object.__setattr__(self, "budgets", budgets.read(self.budgets))
        kind = None if self.weights is None else checkpoint.kind_of(self.weights)
        object.__setattr__(self, "_trained", kind)  # what the weights were trained with
        Dense(tile=self.tile)

    @classmethod
    def complete(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Trained weights choose at every step and keep what they were released with.

        Raises:
            BadParameter: something is asked for that they were not trained for.
        """
        if params.get("weights") is None:
            return params
        other = sorted(params.keys() - {"weights", "kept"})
        if other:
            raise BadParameter(
                f"dynamic: {other[0]}={params[other[0]]!r} with weights, which say all but kept:"
                " leave it out"
            )
        return {"kept": trained.KEPT, "refresh": 1, **params}

    def learned_from(self) -> str | None:
        return self.weights

    def read_learned(self, component: str, family: str, layers: Sequence[Layer]) -> list[Learned]:
        if self.weights is None:
            return super().read_learned(component, family, layers)
        return checkpoint.load(self.weights, component, layers)

    @property
    def default_dense_steps(self) -> float:
        return 0.0 if self.weights else 0.15  # weights were trained with nothing dense

    @property
    def needs_steps(self) -> bool:
        """Whether a choice outlives its step."""
        return self.weights is None and self.refresh != 1

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        """Every pair of tiles: what there is to choose from."""
        if self._trained is not None:
            return trained.pattern(self._trained, grid)
        return Dense(tile=self.queries_of(grid)).pattern(grid)

    def queries_of(self, grid: Grid) -> int:
        """Most queries of a tile on a grid."""
        return self.tile or next(tile for most, tile in TILES if grid.visual_tokens < most)

    def rest_on(self, grid: Grid) -> str:
        """What becomes of the strips that are not chosen on a grid: "virtual", "drop" or "pyramid".

        On long sequences the clips of dropped strips came closer to dense than those of virtual
        tokens, and sooner (`eval/results/README.md`); on short ones it was the other way round.
        """
        if self.rest != "auto":
            return self.rest
        return "virtual" if grid.visual_tokens < DROPPED_FROM else "drop"

    def keys_of(self, grid: Grid) -> int:
        """Most keys of a strip on a grid."""
        rest = self.rest_on(grid)
        if self.strip or rest == "drop":
            return self.strip or self.queries_of(grid)
        usual = STRIP_OF_LARGE if grid.visual_tokens > LARGE else STRIP
        return max(usual, self.pool if rest == "virtual" else 0)

    def every(self, total: int | None) -> int:
        """Steps from one choice to the next in a run of that many."""
        if self.refresh is not None:
            return self.refresh
        return REFRESH_OF_LONG if total is not None and total >= LONG else REFRESH

    def levels(self, pattern: BlockPattern, kept: tuple[float, ...]) -> Levels:
        """How many strips each row of each head computes in which way, on a CPU; made once."""
        return pattern.once(("levels", self, kept), lambda: self._levels(pattern, kept))

    def _levels(self, pattern: BlockPattern, kept: tuple[float, ...]) -> Levels:
        grid, strip = pattern.grid, self.keys_of(pattern.grid)
        blocks = pattern.blocks.to("cpu")
        table = tile_table(blocks, strip)
        fixed = table.map(always(blocks, grid, self.keep_frames, strip))
        text = selection.text_tiles(blocks, grid)
        visual = ~text[table.strips.tile]
        length = table.strips.first.diff()[visual].double()
        rest: float | None = None
        quotas: tuple[tuple[int, float], ...] = ((1, 1.0),)
        if self.rest_on(grid) == "virtual":  # tokens of one virtual token, on this grid
            rest = float(length.sum() / (-(-length // self.pool)).sum())
            if self.correct:  # one query a tile more
                rest = 1 / (1 / rest + float((~text).sum() / blocks.sizes[~text].sum()))
        if self.rest == "pyramid":
            quotas = self.pyramid
        parts = [selection.shares(each, quotas, rest) for each in kept]
        counts = tuple(
            selection.counts_of(table, fixed, text, torch.tensor(level, dtype=torch.float64))
            for level in zip(*parts, strict=True)
        )
        sizes = tuple(size for size, _ in quotas) + ((self.pool,) if rest else ())
        return Levels(sizes, counts, corrected=self._corrects_on(grid))

    def _corrects_on(self, grid: Grid) -> bool:
        return self.correct and self.rest_on(grid) == "virtual"

    def bounds(self, pattern: BlockPattern, kept: float) -> tuple[float, float]:
        """The least and the most that a call keeps, of all pairs, text included."""
        if self.threshold is not None:
            return 0.0, 1.0
        if self._trained is not None:
            return trained.bounds(self._trained, pattern, kept)

        def make() -> tuple[float, float]:
            blocks, strip = pattern.blocks.to("cpu"), self.keys_of(pattern.grid)
            table = tile_table(blocks, strip)
            fixed = table.map(always(blocks, pattern.grid, self.keep_frames, strip))
            levels = self.levels(pattern, (kept,))
            return selection.cost_bounds(table, fixed, levels, RULES[self.rule].scope)

        return pattern.once(("bounds", self, kept), make)

    def kept_at(self, pattern: BlockPattern, age: int) -> float:
        """At most this, the mean over layers where `budgets` differ."""
        found = [self.bounds(pattern, each)[1] for each in self._all_kept()]
        return sum(found) / len(found)

    def at_most(self, pattern: BlockPattern) -> bool:
        found = [self.bounds(pattern, each) for each in self._all_kept()]
        return any(most - least > 1e-9 for least, most in found)

    def _all_kept(self) -> list[float]:
        return [x for _, heads in self.budgets for x in heads] if self.budgets else [self.kept]

    def work(self, pattern: BlockPattern, age: int, backend: str) -> Work | None:
        """Of the mean head where budgets differ; None where a threshold or weights decide."""
        if self.threshold is not None or self._trained is not None:
            return None
        levels = self.levels(pattern, tuple(self._all_kept()))
        chosen = age % self.every(None) == 0
        return costs.work(pattern, self.keys_of(pattern.grid), levels, backend, chosen)

    def scratch_size(self, pattern: BlockPattern, heads: int) -> int:
        if self._trained is not None:
            return 0
        return costs.scratch(pattern, self.keys_of(pattern.grid), heads)

    def state_size(self, pattern: BlockPattern, heads: int, head_dim: int) -> int:
        if self._trained is not None:
            return 0
        planes = len(self.pyramid) if self.rest == "pyramid" else 1
        table = tile_table(pattern.blocks, self.keys_of(pattern.grid))
        return heads * planes * -(-table.num_tiles * len(table.strips) // 8)

    @property
    def shares_state(self) -> bool:
        return not self.per_branch and self.refresh != 1

    def state_limit(self) -> float:
        return self.budget_gib * 2**30

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        if self._trained is not None:
            return trained.attend(self._trained, q, k, v, call, self.kept)
        grid, blocks = call.pattern.grid, call.pattern.on(q.device)
        strip = self.keys_of(grid)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        backend, table = beside(call.backend), tile_table(blocks, strip)
        state = memory(call, not self.shares_state)
        bits = remembered(call, state, q)
        if bits is None or call.step - state["step"] >= self.every(call.total):
            with record_function("dynamic: choose"):
                maps = self._chosen(q, k, v, call, scale, backend)
                bits = active_tiles.pack(torch.stack([x.flatten(2) for x in maps], 2))
                kept = self._kept(maps, call.pattern, q)
            state.update(bits=bits, step=call.step, pattern=call.pattern, kept=kept)
        shape = (table.num_tiles, len(table.strips))
        flags = active_tiles.unpack(bits, shape[0] * shape[1])
        maps = list(flags.unflatten(3, shape).unbind(2))
        with record_function("dynamic: exact"):
            near, used = active_tiles.attend_on(
                q, k, v, blocks, table.flags(maps[0]), scale=scale, key_mask=call.key_mask,
                strip=strip, backend=call.backend,
            )  # fmt: skip
        out, lse = near.out, near.lse
        with record_function("dynamic: virtual tokens"):
            for size, shown in self._virtual(maps, grid, table):
                tokens = virtual_tokens.pool(
                    k, v, blocks, size, key_mask=call.key_mask, strip=strip, backend=backend
                )
                missed = None if not self._corrects_on(grid) else virtual_tokens.missed(
                    q, k, v, tokens, blocks, scale, shown=shown, key_mask=call.key_mask,
                    backend=backend,
                )  # fmt: skip
                out, lse = virtual_tokens.attend_virtual(
                    q, tokens, blocks, scale, (out, lse), backend, shown=shown, missed=missed
                )
        return Attended(out, state["kept"], used)

    def selection_of(
        self, pattern: BlockPattern, state: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int] | None:
        if "bits" not in state:
            return None
        strip = self.keys_of(pattern.grid)
        table = tile_table(pattern.on(state["bits"].device), strip)
        shape = (table.num_tiles, len(table.strips))
        flags = active_tiles.unpack(state["bits"], shape[0] * shape[1])
        return flags[:, :, 0].unflatten(2, shape), strip

    def _chosen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float,
        backend: str,
    ) -> list[torch.Tensor]:  # fmt: skip
        """bool (B, H, N, n) for each level: the strips of that level and those before it."""
        grid, heads = call.pattern.grid, q.shape[2]
        blocks, strip = call.pattern.on(q.device), self.keys_of(grid)
        kept = dict(self.budgets or ()).get(call.layer, (self.kept,) * heads)
        if len(kept) != heads:
            raise BadParameter(
                f"dynamic: budgets name {len(kept)} heads in layer {call.layer} and the call has"
                f" {heads}: name every head of the model; heads that processes share have none"
            )
        levels = self.levels(call.pattern, kept)
        counts = call.pattern.once(
            ("counts", self, kept, q.device), lambda: [x.to(q.device) for x in levels.counts]
        )
        fixed = tile_table(blocks, strip).map(always(blocks, grid, self.keep_frames, strip))
        options = Options("drop" if self.rest_on(grid) == "drop" else "virtual", guard=self.guard)
        tiles = Tiles(q, k, v, blocks, strip, scale, call.key_mask, backend, options)
        return select(tiles, self.rule, fixed, counts, self.threshold)

    def _virtual(
        self, maps: list[torch.Tensor], grid: Grid, table: TileTable
    ) -> list[tuple[int, torch.Tensor]]:
        """Tokens of a piece, and where such pieces are shown, bool (B, H, N, n)."""
        if self.rest_on(grid) == "virtual":
            left = ~maps[0]
            return [(self.pool, left if table.complete else left & table.map(table.valid()))]
        sizes = [size for size, _ in self.pyramid]
        return [(sizes[n], maps[n] & ~maps[n - 1]) for n in range(1, len(maps))]

    def _kept(
        self, maps: list[torch.Tensor], pattern: BlockPattern, q: torch.Tensor
    ) -> torch.Tensor:
        """The fraction of all pairs that is computed, on the device of the maps."""
        strip = self.keys_of(pattern.grid)
        table = tile_table(pattern.on(q.device), strip)
        wide = torch.float32 if q.device.type == "mps" else torch.float64

        def weighed(size: int, shown: torch.Tensor) -> torch.Tensor:
            extra = self._corrects_on(pattern.grid) and size > 1
            price = pattern.once(
                ("price", size, strip, extra, q.device),
                lambda: selection.price(table, size, extra).to(wide),
            )
            return (table.flags(shown) * price[table.pattern]).sum(dtype=price.dtype)

        total = weighed(1, maps[0])
        for size, shown in self._virtual(maps, pattern.grid, table):
            total = total + weighed(size, shown)
        return total / (q.shape[0] * q.shape[2] * q.shape[1] ** 2)
