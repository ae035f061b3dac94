"""What diffpatch needs of diffusers' insides, and what it says when that has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
from diffusers.models import attention_dispatch

import diffpatch
from diffpatch import DiffpatchError, internals
from tests.tiny import wan_transformer


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    internals.check.cache_clear()
    yield
    internals.check.cache_clear()


def dispatch_without_scale(query: Any, key: Any, value: Any, attn_mask: Any = None) -> Any: ...


def dispatch_in_another_order(
    query: Any, key: Any, value: Any, scale: Any, attn_mask: Any, dropout_p: Any,
    is_causal: Any, enable_gqa: Any, attention_kwargs: Any, backend: Any,
) -> Any: ...  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("dispatch_attention_fn", None, "dispatch_attention_fn is gone"),
        ("dispatch_attention_fn", dispatch_without_scale, "no argument dropout_p"),
        ("dispatch_attention_fn", dispatch_in_another_order, "the arguments of dispatch"),
        ("_templated_context_parallel_attention", None, "_templated.* is gone"),
    ],
)
def test_a_changed_internal_is_named_before_anything_is_patched(
    name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(attention_dispatch, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name} yet")
    model = wan_transformer()
    before = [block.attn1.processor for block in model.blocks]
    monkeypatch.setattr(attention_dispatch, name, value)
    with pytest.raises(DiffpatchError, match=f"diffusers {diffusers.__version__}.*{words}"):
        diffpatch.patch(model, "window")
    assert [block.attn1.processor for block in model.blocks] == before


def test_this_version_is_as_expected() -> None:
    internals.check()
