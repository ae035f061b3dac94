"""A patch under which nothing runs sparsely says so once, or refuses; so does a backend by name."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional

import diffpatch
from diffpatch import TokenGrid, Window
from tests.patching.test_custom_model import GRID, Attention, Model, Processor, inputs
from tests.tiny import Tiny, wan, wan22

LOCAL = Window(window=(-1, 1, 2), shift="none")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "nothing ran sparsely" in record.message]


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("window", {"window": -1}, "calls: pattern keeps everything"),
        (LOCAL, {"dense_layers": 2}, "the schedule leaves every call dense (dense layers)"),
        (LOCAL, {"dense_steps": 1.0}, "the schedule leaves every call dense (dense first steps)"),
    ],
    ids=["all pairs", "all layers", "all steps"],
)
def test_a_run_in_which_nothing_is_sparse_says_why_once(
    method: Any, options: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, method, **{"dense_steps": 0} | options)
    for _ in range(2):
        tiny.run()
    [said] = warnings(caplog)
    assert said.startswith("window: nothing ran sparsely in transformer: ")
    assert said.endswith(why)
    with diffpatch.patched(tiny.pipe, method, strict=True, **{"dense_steps": 0} | options):
        with pytest.raises(diffpatch.NothingSparse, match=re.escape(why.split(": ")[-1])):
            tiny.run()
        assert issubclass(diffpatch.NothingSparse, diffpatch.DiffpatchError)


def test_a_grid_that_is_not_that_of_the_sequence_is_said_and_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = wan()
    wrong: dict[str, Any] = {"grid": TokenGrid(9, 9, 9), "modules": r"blocks\.\d+\.attn1"}
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1, **wrong)
    tiny.run()
    [said] = warnings(caplog)
    assert "9, 9, 9" in said
    with (
        diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1, strict=True, **wrong),
        pytest.raises(diffpatch.NothingSparse, match="9, 9, 9"),
    ):
        tiny.run()


class Causal(Processor):
    """Asks for what sparse attention does not know."""

    def __call__(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)) for t in attn.qkv(x).chunk(3, -1))
        return dispatch_attention_fn(q, k, v, is_causal=True).flatten(2)


class OlderCausal(Processor):
    """The same by torch's operator."""

    def __call__(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in attn.qkv(x).chunk(3, -1))
        return (
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )


class Cross(Processor):
    """Looks at the prompt alone."""

    def __call__(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)) for t in attn.qkv(x).chunk(3, -1))
        return dispatch_attention_fn(q, k[:, :5], v[:, :5]).flatten(2)


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        (Causal, "2 calls: the model asks for a causal mask"),
        (OlderCausal, "2 calls: the model asks for a causal mask"),
        (Cross, "no call is self-attention over the grid: 2 calls with 56 queries and 5 keys"),
    ],
)
@torch.no_grad()
def test_calls_that_are_left_to_the_model_are_said(
    processor: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(processor)
    plain = model(**inputs())
    described: dict[str, Any] = {"grid": GRID, "modules": r"blocks\.\d+"}
    diffpatch.patch(model, LOCAL, **described)
    assert torch.equal(model(**inputs()), plain)
    [said] = warnings(caplog)
    assert said == f"window: nothing ran sparsely in transformer: {why}"
    assert diffpatch.report(model).dense_calls == (0 if processor is Cross else 2)
    diffpatch.patch(model, LOCAL, strict=True, **described)
    with pytest.raises(diffpatch.NothingSparse, match=re.escape(why)):
        model(**inputs())


@pytest.mark.parametrize("make", [wan, wan22], ids=["one model", "two experts"])
def test_what_is_dense_by_the_schedule_alone_is_not_worth_a_word(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tiny: Tiny = make()
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1, dense_layers=1, strict=True):
        tiny.run()
    with diffpatch.patched(tiny.pipe, "dense", dense_steps=0, strict=True):
        tiny.run()
    assert not warnings(caplog)


def test_compiled_models_say_it_too(caplog: pytest.LogCaptureFixture) -> None:
    tiny = wan()
    model: nn.Module = tiny.pipe.transformer
    tiny.pipe.transformer = torch.compile(model, backend="eager")
    diffpatch.patch(tiny.pipe, "window", window=-1, dense_steps=0)
    tiny.run()
    assert len(warnings(caplog)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs here")
def test_a_backend_by_name_that_cannot_run_is_refused_in_the_first_step() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1, backend="triton")
    steps: list[int] = []

    def ended(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        return {}

    with pytest.raises(diffpatch.BackendUnavailable, match=r"'triton' cannot run: .*GPU.*'auto'"):
        tiny.run(callback_on_step_end=ended)
    assert steps == []


def test_a_warning_is_a_line_of_the_log_at_the_level_of_warnings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = wan()
    with diffpatch.patched(tiny.pipe, "window", window=-1, dense_steps=0):
        tiny.run()
    assert [r.levelno for r in caplog.records if "nothing" in r.message] == [logging.WARNING]
