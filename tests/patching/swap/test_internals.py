"""What diffpatch needs of diffusers' insides, and what it says when that has changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.models import attention_dispatch

import diffpatch
from diffpatch import DiffpatchError, internals
from tests.tiny import flux, wan_transformer


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
    model = wan_transformer()
    before = [block.attn1.processor for block in model.blocks]
    monkeypatch.setattr(attention_dispatch, name, value)
    with pytest.raises(DiffpatchError, match=f"diffusers {diffusers.__version__}.*{words}"):
        diffpatch.patch(model, "window")
    assert [block.attn1.processor for block in model.blocks] == before


@pytest.mark.parametrize(
    ("place", "method", "name"), internals._kept_names(), ids=lambda x: getattr(x, "__name__", x)
)
def test_every_name_is_checked(
    place: Any, method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a diffusers where the method works without that name, and in one without the method."""
    for replacement, words in ((lambda self: None, f"does not use {name}"), (None, "is gone")):
        monkeypatch.setattr(place, method, replacement)
        with pytest.raises(DiffpatchError, match=f"{place.__name__}.{method} {words}"):
            internals.check()


def test_the_device_of_a_pipeline() -> None:
    assert internals.execution_device(flux().pipe).type == "cpu"
    with pytest.raises(DiffpatchError, match="object has no _execution_device"):
        internals.execution_device(object())


def test_no_other_file_names_private_parts_of_diffusers() -> None:
    """Strings and attributes that begin with an underscore and are those of `internals`."""
    names = {v for k, v in vars(internals).items() if k.isupper() and str(v).startswith("_")}
    root = Path(diffpatch.__file__).parents[1]
    files = [*root.glob("diffpatch/**/*.py"), *root.glob("pipelines/**/*.py")]
    own = root / "diffpatch" / "internals.py"
    word = re.compile(rf"(?:\.|\")(?:{'|'.join(sorted(names))})\b")
    found = [f"{p.name}: {m[0]}" for p in files if p != own for m in word.finditer(p.read_text())]
    assert found == []


def test_this_version_is_as_expected() -> None:
    internals.check()
