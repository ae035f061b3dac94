"""What is kept of a stopped job, and what is not believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffpatch import BadParameter
from diffpatch.methods.learned.files import save as save_learned
from diffpatch.targets.settings import Settings
from diffpatch.tuning.unfinished import Unfinished, ties_of


def test_units_are_kept_until_the_result_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    job = Unfinished(path, ".part", "ties")
    job.put("a", {"n": 1})
    again = Unfinished(path, ".part", "ties")
    assert again.get("a") == {"n": 1} and again.get("b") is None
    assert Unfinished(path, ".part", "of another job").get("a") is None
    again.forget()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_result_needs_the_path_of_a_file(path: str) -> None:
    settings: Any = Settings.model_construct()
    writes = [lambda: Unfinished(path, ".part", "ties"), lambda: settings.save(path)]
    if not path:  # a folder is given a file of a name that is known
        writes.append(lambda: save_learned(path, {}, "A", {}))
    for write in writes:
        with pytest.raises(BadParameter, match=f"path='{path}' must be the path of a file"):
            write()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 10_000, b'{"ties": "ties", "done": 3}'])
def test_damaged_files_are_done_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json.part").write_bytes(content)
    job = Unfinished(tmp_path / "x.json", ".part", "ties")
    assert job.get("a") is None


def test_what_decides_a_job_counts_by_what_it_holds() -> None:
    """A picture's own text names its place in memory, a large tensor's leaves most of it out."""
    makers: list[Any] = [
        lambda x: Image.new("RGB", (8, 8), (x, 0, 0)),
        lambda x: torch.zeros(4000).index_fill_(0, torch.tensor([2000]), x),
        lambda x: torch.full((), x, dtype=torch.bfloat16),
        lambda x: np.full((50, 50), x),
    ]
    for make in makers:
        same = [ties_of({"image": [make(1)]}, 3) for _ in range(2)]
        assert same[0] == same[1] != ties_of({"image": [make(2)]}, 3)
    assert ties_of(["a", 1], {"b": None}) == '[["a", 1], {"b": null}]'
    assert ties_of(torch.zeros(2, 3)) != ties_of(torch.zeros(3, 2))


def test_without_a_file_nothing_is_kept() -> None:
    job = Unfinished(None, ".part", "ties")
    job.put("a", 1)
    assert job.get("a") == 1
    job.forget()
