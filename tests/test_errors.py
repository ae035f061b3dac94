"""One hierarchy of errors: what is caught as what, and the exit code it has on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import internals
from diffpatch.adapters.engine import EngineAttention, Told
from diffpatch.cli import main
from diffpatch.eval.sweep.spec import check_spec
from diffpatch.pipelines.running.loading import ModelError, UnusableModel
from tests import tiny

GRID = diffpatch.TokenGrid(2, 4, 4)


@pytest.mark.parametrize(
    ("error", "others"),
    [
        (diffpatch.BadParameter, [ValueError]),
        (diffpatch.UnknownMethod, [ValueError]),
        (diffpatch.UnknownFamily, [ValueError]),
        (diffpatch.NotPatched, [ValueError]),
        (diffpatch.BackendUnavailable, [RuntimeError]),
        (UnusableModel, [ModelError, diffpatch.BadParameter]),
    ],
)
def test_errors_are_ours_and_those_of_python(error: type[Exception], others: list[Any]) -> None:
    assert issubclass(error, diffpatch.DiffpatchError)
    assert all(issubclass(error, other) for other in others)
    assert not issubclass(diffpatch.DiffpatchError, ValueError)


@pytest.mark.parametrize("method", ["window", "linear", "window+temporal"])
def test_a_backend_that_cannot_run_is_one_error_of_ours(method: str) -> None:
    q = torch.randn(1, GRID.num_tokens, 2, 16)
    with pytest.raises(diffpatch.BackendUnavailable, match="backend='auto'"):
        diffpatch.attention(q, q, q, GRID, method, backend="triton")


def test_an_unknown_backend_is_the_same_error_through_every_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    q, model = torch.randn(1, GRID.num_tokens, 2, 16), tiny.wan()
    said = []
    for door in (
        lambda: diffpatch.attention(q, q, q, GRID, "window", backend="trito"),
        lambda: diffpatch.attention(q, q, q, GRID, "linear", backend="trito"),
        lambda: diffpatch.attention(q, q, q, GRID, "window+temporal", backend="trito"),
        lambda: diffpatch.patch(model.pipe, "window", backend="trito"),
        lambda: diffpatch.plan("wan-1.3b", "window", height=64, width=64, backend="trito"),
        lambda: EngineAttention("window", Told(), backend="trito"),
    ):
        with pytest.raises(diffpatch.BadParameter) as caught:
            door()
        said.append(str(caught.value))
    assert len(set(said)) == 1 and "'trito': did you mean 'triton'" in said[0]
    assert main(["plan", "--backend", "trito"]) == 2
    assert said[0] in capsys.readouterr().err
    sweep = {"prompts": "a", "methods": {"method": "window", "backend": "trito"}}
    with pytest.raises(diffpatch.BadParameter, match=re.escape(said[0])):
        check_spec(sweep, tmp_path)


def _failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (diffpatch.BadParameter("decay=-1"), 2),
        (diffpatch.UnknownMethod("radail"), 2),
        (diffpatch.UnknownFamily("U-Net"), 2),
        (diffpatch.NotPatched("no patch"), 2),
        (UnusableModel("no such folder"), 2),
        (ModelError("the download broke off"), 1),
        (diffpatch.BackendUnavailable("no GPU"), 1),
        (internals.changed("diffusers moved something"), 1),
        (OSError("the disk is full"), 1),
    ],
)
def test_two_is_for_what_another_call_mends_and_one_for_the_rest(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(diffpatch, "list_methods", _failing(error))
    assert main(["methods"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
