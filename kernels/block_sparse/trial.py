"""The call that backends of block-sparse attention are compared on."""

from __future__ import annotations

from diffpatch.kernels.block_sparse.backends import Backend
from diffpatch.kernels.block_sparse.operators import Inputs, Results
from diffpatch.kernels.block_sparse.reference import attend_reference


def trial(backend: Backend | None, x: Inputs) -> Results:
    """See `Operator.trial`."""
    attend = attend_reference if backend is None else backend.attend
    out, lse = attend(x.q, x.k, x.v, x.blocks, x.scale, x.key_mask, True)
    assert lse is not None
    return out, lse
