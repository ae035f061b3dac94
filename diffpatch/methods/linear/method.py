"""Attention that is exact nearby and sums up the far; needs no training, but can be distilled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.block_sparse.api import work_of
from diffpatch.kernels.block_sparse.backends import beside
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.kernels.linear import api as linear_attention
from diffpatch.kernels.linear import features as linear_features
from diffpatch.kernels.merge import merge
from diffpatch.kernels.virtual_tokens import api as virtual_tokens
from diffpatch.methods import axis
from diffpatch.methods.base import Attended, AttentionCall, Method, param
from diffpatch.methods.learned import files as adapter
from diffpatch.methods.linear import distilled
from diffpatch.methods.registry import register
from diffpatch.patterns.build import from_tiles
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Tiling, choose_tile

FARS = ("pool", "state", *linear_features.FEATURES)
NEAR = 1024  # tokens of a window of fixed size


@register
@dataclass(frozen=True)
class Linear(Method):
    """Exact attention to text and to tiles nearby; tiles far away are summarised, none is dropped.

    With ``far="pool"`` every `pool` far tokens become one virtual token. With ``far="state"`` all
    far tokens together become one state, the moments of their keys and values, and the window
    nearby holds a fixed number of tokens instead of a fraction of them: cost and memory are then
    strictly linear in the tokens. At equal cost both stay closer to dense attention than dropping
    what is far.

    Both can be distilled, and so can a window mixed with feature-map linear attention (SLA2): far
    "elu", "relu", "softmax" or "hedgehog", with ``near=0`` for feature maps alone. `weights` names
    the file of learned parameters (examples/distill_linear.py writes it), which also sets the other
    parameters; only `near` and `kept` may be given beside it. Without such a file a feature map is
    refused: a model that was not trained for it falls apart.
    """

    name = "linear"
    summary = "near tiles exactly, far tiles summarised in the same softmax; can be distilled"
    source = "PISA, arXiv 2602.01077; second order: PWT; distilled: SLA2, arXiv 2602.12675"
    default_dense_steps = 0.15
    kept_parameters = ("kept", "near", "weights")
    only_skips = False

    kept: float = param(0.125, "fraction of the tiles that each query sees exactly")
    pool: int = param(64, "tokens that one virtual token stands for")
    second_order: bool = param(True, "count the spread of the keys within a piece, capped")
    far: str = param("pool", "'pool' (virtual tokens), 'state' (strictly linear), or a feature map")
    near: int | None = param(
        None, "tokens seen exactly, instead of a share; 1024 unless far is 'pool'"
    )
    weights: str | None = param(
        None, "file of learned parameters; sets all others but near and kept"
    )
    allow_untrained: bool = param(False, "run a feature map without learned parameters")

    def validate(self) -> None:
        self.check(0 < self.kept <= 1, "kept", "in (0, 1]")
        self.check(self.pool >= 1, "pool", "a count of at least 1")
        self.check(self.far in FARS, "far", f"one of {', '.join(FARS)}")
        least = 1 if self.far == "pool" else 0
        enough = self.near is None or self.near >= least
        self.check(enough, "near", f"a count of at least {least}, or None")
        if self._features and not (self.weights or self.allow_untrained):
            raise BadParameter(
                f"linear: far={self.far!r} needs a model that was trained for it; on any other,"
                " features are nearly blind and the result is little more than the mean of the"
                " values. Use far='pool' or far='state', distil the model and pass weights="
                " (examples/distill_linear.py), or set allow_untrained=True to see for yourself"
            )

    @property
    def _features(self) -> bool:
        return self.far in linear_features.FEATURES

    @classmethod
    def complete(cls, params: dict[str, Any]) -> dict[str, Any]:
        """A file of weights says what it was made with; only the size may be changed."""
        if params.get("weights") is None:
            return params
        made = adapter.read_method(params["weights"])
        for name in (params.keys() & made.keys()) - {"near", "kept"}:
            if params[name] != made[name]:
                raise BadParameter(
                    f"linear: {name}={params[name]!r}, but weights={params['weights']!r} were made"
                    f" with {name}={made[name]!r}: leave it out"
                )
        return {**made, **params}

    def learned_from(self) -> str | None:
        return self.weights

    def with_kept(self, kept: float, kind: str = "video") -> Method:
        if self.far != "pool" or self.near is not None:
            raise BadParameter(
                f"linear: with far={self.far!r}, near={self.near} the window has a fixed size and"
                " no share of the tokens: set near instead"
            )
        if self.pool == 1:
            raise BadParameter("linear: pool=1 leaves no key out, whatever is near: raise pool")
        rest = 1 / self.pool  # the virtual tokens of the rest are counted as well
        return super().with_kept(max((kept - rest) / (1 - rest), 1e-4), kind)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        """The exact part; its `kept` counts a virtual token, or a state, as one key."""
        tiling = Tiling.even(grid, choose_tile(grid.shape, limits=[-(-n // 3) for n in grid.shape]))
        keep = torch.zeros(tiling.num_visual, tiling.num_visual, dtype=torch.bool)
        if self.near != 0:
            keep = _boxes(tiling.counts, self._share(grid))
        pattern = from_tiles(grid, tiling, keep)
        if pattern.kept >= 1:
            return pattern
        if self.far == "pool":
            pieces = -(-tiling.visual_sizes // self.pool)
            pairs = (tiling.visual_sizes @ (~keep).long() @ pieces).item()
        else:
            pairs = grid.visual_tokens
        return dataclasses.replace(pattern, kept=pattern.kept + pairs / grid.num_tokens**2)

    def work(self, pattern: BlockPattern, age: int, backend: str) -> Work | None:
        """The exact part, every query against every virtual token, and the merge of the two."""
        if self.far != "pool":
            return None
        tokens = pattern.blocks.num_tokens
        pieces = -(-pattern.blocks.sizes // self.pool)
        count = float(pieces.sum())  # they are gathered filled up to their full length
        far = Work(calls=1, rows=tokens, virtual=tokens * count, pooled=self.pool * count)
        return work_of(pattern.blocks, backend) + far

    def _share(self, grid: TokenGrid) -> float:
        """The share of the visual tokens that a query sees exactly."""
        near = NEAR if self.near is None and self.far != "pool" else self.near
        return self.kept if near is None else min(1.0, near / grid.visual_tokens)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        learned = call.learned
        if self.weights and not learned:
            raise BadParameter(
                f"linear: weights={self.weights!r} belong to the layers of a model: use"
                " diffpatch.patch, or give a layer's tensors in AttentionCall.learned"
            )
        q, k, v = (distilled.corrected(x, n, learned) for x, n in ((q, "q"), (k, "k"), (v, "v")))
        blocks = call.pattern.on(q.device)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        near, near_lse, used = call.sparse(q, k, v)
        backend = beside(call.backend)
        if self.far == "pool":
            tokens = virtual_tokens.pool(
                k, v, blocks, self.pool, second_order=self.second_order, key_mask=call.key_mask,
                backend=backend,
            )  # fmt: skip
            both = (near, near_lse)
            out, _ = virtual_tokens.attend_virtual(q, tokens, blocks, scale, both, backend)
            return Attended(distilled.corrected(out, "out", learned), call.pattern.kept, used)
        far, far_lse = linear_attention.attend_cumulants(
            q, k, v, blocks, scale, call.key_mask, backend
        )
        if self._features:
            x, y = distilled.mapped(q, "q", learned), distilled.mapped(k, "k", learned)
            features = linear_attention.attend_features(
                x, y, v, blocks, self.far, call.key_mask, backend
            )
            out = distilled.mixed(near, near_lse, far, far_lse, features, learned)
        else:
            out, _ = merge(near, near_lse, far, far_lse)
        return Attended(distilled.corrected(out, "out", learned), call.pattern.kept, used)


def _boxes(counts: tuple[int, int, int], share: float) -> torch.Tensor:
    """bool (V, V) over visual tiles: each sees a box of about a share of all around it."""
    sizes = axis.box([{s: s / n for s in range(1, n + 1)} for n in counts], share, even=0.2)
    t, h, w = (axis.tile_windows(n, size) for n, size in zip(counts, sizes, strict=True))
    keep = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    return keep.reshape(math.prod(counts), -1)
