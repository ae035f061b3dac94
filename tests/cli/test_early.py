"""What cannot work, or gains nothing, is said before any weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffpatch.cli import generation, main
from diffpatch.eval.sweep.session import Session

RENDER = ["render", "-m", "demo", "-p", "a cat"]
SWEEP = ["sweep", "-m", "demo", "-p", "a cat"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(generation, "load", fail)
    monkeypatch.setattr(Session, "__init__", fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param([*RENDER, "--backend", "triton"], "--backend auto", marks=NO_GPU),
        pytest.param([*RENDER, "--offload", "model"], "--offload model needs", marks=NO_GPU),
        ([*RENDER, "--height", "70", "--dry-run"], "height=70 must be a multiple of 8"),
        ([*SWEEP, "--height", "70", "--dry-run"], "height=70 must be a multiple of 8"),
        (["render", "--method", "radiall"], "did you mean 'radial'"),  # before the missing prompt
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/version").is_file(), reason="no folder is closed to root here")
@pytest.mark.parametrize("words", [RENDER, SWEEP, [*SWEEP, "--dry-run"]], ids=" ".join)
def test_a_folder_that_cannot_be_written_to(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "-o", "/proc/diffpatch"]) == 2
    assert "/proc/diffpatch cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["attention", "render", "model", "kernels", "profile"])
def test_a_result_that_could_not_be_written_is_not_measured(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place, message in (
        (tmp_path / "file" / "x.json", "file is not a folder; choose another --json"),
        (tmp_path, "is a folder; give a file"),
    ):
        assert main(["bench", what, "--json", str(place)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_window_over_everything_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*RENDER, "--method", "window", "--set", "window=-1", "--dry-run"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert "window keeps every pair of 13×16×16 tokens: nothing will be" in capsys.readouterr().err
