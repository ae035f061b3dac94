"""The call that backends of virtual tokens are compared on."""

from __future__ import annotations

from diffpatch.kernels.block_sparse.backends import Backend
from diffpatch.kernels.block_sparse.operators import Inputs, Results
from diffpatch.kernels.virtual_tokens import api

PIECE = 32  # tokens of a virtual token


def trial(backend: Backend | None, x: Inputs) -> Results:
    """Pooling and attention to what is pooled. See `Operator.trial`."""
    name = "reference" if backend is None else backend.name
    tokens = api.pool(x.k, x.v, x.blocks, PIECE, key_mask=x.key_mask, backend=name)
    return api.attend_virtual(x.q, tokens, x.blocks, x.scale, None, name)
