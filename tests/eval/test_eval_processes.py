"""`diffpatch eval` in two processes gives what one process gives, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpatch.cli import main
from diffpatch.eval.processes import Process
from diffpatch.eval.quality.tally import Tally
from tests import tiny

PROMPTS = ["a large red circle moves left over a striped navy background", "a cat", "a dog"]


def commands(folder: Path, out: str) -> list[list[str]]:
    """Folders against a folder, and methods on a model, each with a JSON and an export."""
    places = [str(folder / "fast"), "--reference", str(folder / "dense")]
    model = ["-m", str(folder / "wan"), "--prompt-file", str(folder / "prompts.txt")]
    model += ["--height", "32", "--width", "32", "--num-frames", "17", "--steps", "1"]
    model += ["--method", "window", "--dense-steps", "0", "--dense-layers", "0"]
    words = [
        [*places, "--captions", str(folder / "captions.json")],
        [*model, "--vbench-export", str(folder / f"{out}-vbench")],
    ]
    return [
        ["eval", *w, "--quiet", "--json", str(folder / f"{out}{n}.json")]
        for n, w in enumerate(words)
    ]


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """Five clips dense and changed, one without a prompt, and a tiny model with three prompts."""
    generator = torch.Generator().manual_seed(0)
    for name in ("dense", "fast"):
        (tmp_path / name).mkdir()
        for number in range(5):
            clip = torch.rand((9, 3, 24, 20), generator=generator)
            np.save(tmp_path / name / f"{number}.npy", clip.numpy())
    captions = {str(number): PROMPTS[number % 2] for number in range(4)}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    tiny.wan().pipe.save_pretrained(tmp_path / "wan")
    return tmp_path


def comparable(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    result["environment"].pop("time")
    result["environment"].pop("commit")  # "-dirty" may come and go beside us
    return result


def test_two_processes_measure_what_one_does(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    (material / "words.json").write_text(json.dumps(commands(material, "two")))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "tests.eval.eval_processes"]
    done = subprocess.run(
        [sys.executable, *launch, str(material / "words.json")],
        capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 2, "one process tells the result"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for words in commands(material, "one"):
            assert main(words) == 0
    finally:
        torch.set_num_threads(threads)
    for number, count, missing in ((0, 5, "3 of 5 clips"), (1, 3, "2 of 3 clips")):
        one, two = (comparable(material / f"{name}{number}.json") for name in ("one", "two"))
        assert one == two
        assert two["missing"]["clip_score"].endswith(f"({missing})")  # a prompt of another world
        assert [row["count"] for row in two["rows"]] == [count] * len(two["rows"])
    assert {"contrast", "frames"} == set(two["rows"][-1]["sets"]) and two["rows"][-1]["kept"] < 1
    files = [sorted(p.relative_to(material / f"{name}-vbench") for p in
             (material / f"{name}-vbench").rglob("*.mp4")) for name in ("one", "two")]  # fmt: skip
    assert files[0] == files[1] and len(files[0]) == 4 * 3  # dense, two floors, the method


def test_processes_share_everything_once() -> None:
    items = list(range(7))
    for count in (1, 2, 3, 9):
        shares = [list(Process(rank, count).mine(items)) for rank in range(count)]
        assert sorted(number for share in shares for number in share) == items
    assert Process().gather("part") == ["part"]
    assert Tally().merge(Tally(), Tally({"a": {"x": 1.0}}), Tally()).means() == {"x": 1.0}


def test_a_mean_is_over_the_clips_that_have_the_metric() -> None:
    tally = Tally({"a": {"psnr": 30.0, "caption": 0.5}, "b": {"psnr": 20.0}})
    assert tally.means() == {"psnr": 25.0, "caption": 0.5}
