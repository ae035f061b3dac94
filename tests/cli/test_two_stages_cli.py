"""`diffpatch render --strength`: two stages from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffpatch.cli import main

PROMPT = ["-p", "a large red circle moves left over a black background"]
SMALL = ["--num-frames", "5", "--steps", "2"]


def test_two_stages_make_a_larger_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "144", "--width", "128", "--strength", "0.5"]
    command = ["render", *PROMPT, *SMALL, *size, "--method", "larger", "--compare", "dense"]
    code = main([*command, "--json", "--quiet", "--format", "webp", "-o", str(tmp_path / "out")])
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pipeline"] == "WanVideoToVideoPipeline"
    assert result["runs"]["larger"]["report"]["steps"] == 1
    assert result["runs"]["larger"]["kept"] > 0 and "psnr" in result["quality"]
    assert (tmp_path / "out" / "larger.webp").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", "0"], "--strength=0.0 must be in (0, 1]"),
        (["--strength", "1.5"], "--strength=1.5 must be in (0, 1]"),
        (["--strength", "0.2", *SMALL], "is not a whole step: raise it to 0.5"),
        (["--strength", "0.7"], "was made at 128×128 and --height, --width ask for 128×128"),
    ],
)
def test_what_cannot_work_is_said_before_loading(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["render", *PROMPT, "--dry-run", "-o", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
