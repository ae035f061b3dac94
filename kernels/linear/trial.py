"""The calls that backends of linear attention are compared on."""

from __future__ import annotations

from diffpatch.kernels.block_sparse.backends import Backend
from diffpatch.kernels.block_sparse.operators import Inputs, Results
from diffpatch.kernels.linear import api

FEATURE = "elu"


def trial(backend: Backend | None, x: Inputs) -> Results:
    """Either form of it. See `Operator.trial`."""
    name = "reference" if backend is None else backend.name
    moments = api.attend_cumulants(x.q, x.k, x.v, x.blocks, x.scale, x.key_mask, name)
    return *moments, api.attend_features(x.q, x.k, x.v, x.blocks, FEATURE, x.key_mask, name)
