"""The backend that is asked for computes: results alone would not tell it from the others."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles import reference as active_reference
from diffpatch.kernels.block_sparse import reference as sparse_reference
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.linear import api as linear
from diffpatch.kernels.linear import reference as linear_reference
from diffpatch.kernels.virtual_tokens import api as virtual_tokens
from diffpatch.kernels.virtual_tokens import reference as virtual_reference
from tests.kernels.random_blocks import random_blocks, random_qkv

SIZES = [5, 3, 4]
BLOCKS = random_blocks(SIZES, kept=0.5, partial=0.0)
Q, K, V = random_qkv(1, sum(SIZES), 2, 8)
TOKENS = virtual_tokens.pool(K, V, BLOCKS, 2, backend="torch")
LOST = virtual_tokens.missed(Q, K, V, TOKENS, BLOCKS, 0.3, backend="torch")
# What is computed -> the functions that are its reference, and the call.
CALLS: dict[str, tuple[Any, Callable[[str], object]]] = {
    "block-sparse": (
        sparse_reference,
        lambda name: block_sparse_attention(Q, K, V, BLOCKS, backend=name),
    ),
    "active tiles": (
        active_reference,
        lambda name: active_tiles.attend(Q, K, V, BLOCKS, backend=name),
    ),
    "pooling": (virtual_reference, lambda name: virtual_tokens.pool(K, V, BLOCKS, 2, backend=name)),
    "virtual tokens": (
        virtual_reference,
        lambda name: virtual_tokens.attend_virtual(Q, TOKENS, BLOCKS, 0.3, None, name),
    ),
    "virtual tokens, corrected": (
        virtual_reference,
        lambda name: virtual_tokens.attend_virtual(Q, TOKENS, BLOCKS, 0.3, None, name, missed=LOST),
    ),
    "what they miss": (
        virtual_reference,
        lambda name: virtual_tokens.missed(Q, K, V, TOKENS, BLOCKS, 0.3, backend=name),
    ),
    "cumulants": (
        linear_reference,
        lambda name: linear.attend_cumulants(Q, K, V, BLOCKS, 0.3, backend=name),
    ),
    "features": (
        linear_reference,
        lambda name: linear.attend_features(Q, K, V, BLOCKS, "elu", backend=name),
    ),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_the_backend_that_is_asked_for_computes(name: str, backend: str) -> None:
    module, call = CALLS[name]
    with contextlib.ExitStack() as stack:
        watched = [
            stack.enter_context(mock.patch.object(module, own, wraps=function))
            for own, function in vars(module).items()
            if inspect.isfunction(function) and function.__module__ == module.__name__
        ]
        call(backend)
    assert any(one.called for one in watched) == (backend == "reference")
