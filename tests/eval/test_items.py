"""What `diffpatch eval` reads: every file that is there, as it is, or a sentence that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpatch.eval.quality.items import ItemError, find_items, is_lossy, read_frames


def test_suffixes_count_in_either_case(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save(tmp_path / "a.PNG")
    Image.fromarray(noise[0]).save(tmp_path / "b.JPG")
    with (tmp_path / "c.NPY").open("wb") as file:
        np.save(file, noise)
    assert list(find_items(tmp_path)) == ["a", "b", "c"]
    assert len(read_frames(tmp_path / "c.NPY")) == 2
    assert [is_lossy(tmp_path / name) for name in ("a.PNG", "b.JPG")] == [False, True]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    deep = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "deep.tif")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 3), np.uint8))
    np.save(tmp_path / "wide.npy", np.full((1, 8, 8, 3), -1.0, np.float32))
    for name, said in (
        ("deep.png", r"more than 8 bits a pixel \(I;16\)"),
        ("deep.tif", r"more than 8 bits a pixel \(F\)"),
        ("empty.npy", "cannot be read"),
        ("none.npy", r"cannot be read: .*\(0, 3, 8, 8\)"),
        ("wide.npy", r"cannot be read: frames must lie in \[0, 1\], got values from -1"),
    ):
        with pytest.raises(ItemError, match=f"{name}.*{said}"):
            read_frames(tmp_path / name)
