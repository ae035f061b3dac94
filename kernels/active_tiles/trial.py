"""The call that backends of attention to active tiles are compared on."""

from __future__ import annotations

import torch

from diffpatch.kernels.active_tiles import api
from diffpatch.kernels.block_sparse.backends import Backend
from diffpatch.kernels.block_sparse.operators import Inputs, Results


def trial(backend: Backend | None, x: Inputs) -> Results:
    """Strips that are chosen at random. See `Operator.trial`."""
    strip = x.blocks.max_tile // 2
    random = torch.Generator().manual_seed(1)
    shape = (x.q.shape[0], x.q.shape[2], api.tile_table(x.blocks, strip).length)
    active = (torch.rand(shape, generator=random) < 0.6).to(x.q.device)
    found = api.attend(
        x.q, x.k, x.v, x.blocks, active, key_mask=x.key_mask, strip=strip,
        backend="reference" if backend is None else backend.name,
    )  # fmt: skip
    return found.out, found.lse
