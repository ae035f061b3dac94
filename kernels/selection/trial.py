"""The calls that backends of the choice of tiles are compared on."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.block_sparse.backends import Backend
from diffpatch.kernels.block_sparse.operators import Inputs, Results
from diffpatch.kernels.selection.api import select
from diffpatch.kernels.selection.choose import Counts
from diffpatch.kernels.selection.mass import mass
from diffpatch.kernels.selection.tiles import Options, Tiles


def trial(backend: Backend | None, x: Inputs) -> Results:
    """How much of its attention a query tile gives to what is chosen for it, and how many that are.

    Whether two backends choose the very same is a matter of rounding, where scores are close. See
    `Operator.trial`.
    """
    name = "reference" if backend is None else backend.name
    strip, heads = max(1, x.blocks.max_tile // 4), x.q.shape[2]
    table = tile_table(x.blocks, strip)
    fixed = torch.zeros(1, table.num_tiles, len(table.strips), dtype=torch.bool, device=x.q.device)
    fixed[..., 0] = True
    third = torch.full((1, table.num_tiles), len(table.strips) // 3)
    counts = Counts.of(third, heads).to(x.q.device)
    found: list[torch.Tensor] = []
    for rest in ("virtual", "drop"):
        tiles = Tiles(x.q, x.k, x.v, x.blocks, strip, x.scale, x.key_mask, "torch", Options(rest))
        (chosen,) = select(replace(tiles, backend=name), "error", fixed, [counts])
        found += [(mass(tiles) * chosen).sum(-1), chosen.sum(-1, dtype=torch.float32)]
    return tuple(found)
