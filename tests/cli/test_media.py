"""What is written is what was rendered: every format is read back; nothing is left half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from diffpatch.cli import main, output, render
from diffpatch.cli.errors import UsageError
from diffpatch.cli.render import sheets
from diffpatch.cli.render.page import page
from diffpatch.eval import media
from diffpatch.eval.card import faster
from diffpatch.files import staged


def frames(count: int = 5, height: int = 36, width: int = 50) -> torch.Tensor:
    """A smooth clip: red grows along the rows, green along the columns, blue with time."""
    time, row, column = torch.meshgrid(
        *(torch.linspace(0, 1, n) for n in (count, height, width)), indexing="ij"
    )
    return torch.stack([row, column, time], dim=1)


def read(path: Path) -> np.ndarray:
    """The frames of a file as floats (F, H, W, 3)."""
    if path.suffix == ".mp4":
        imageio = pytest.importorskip("imageio.v2")
        pictures = [np.asarray(frame) for frame in imageio.get_reader(path)]
    elif path.is_dir():
        pictures = [np.asarray(Image.open(file)) for file in sorted(path.iterdir())]
    else:
        with Image.open(path) as image:
            pictures = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)]
    return np.stack(pictures) / 255


@pytest.mark.parametrize(
    ("format", "tolerance"),
    [("mp4", 0.1), ("gif", 0.1), ("webp", 0.05), ("apng", 0.002), ("png", 0.002)],
)
def test_every_video_format_reads_back(tmp_path: Path, format: str, tolerance: float) -> None:
    sheets.check_format(format, video=True)
    clip = frames()
    path = tmp_path / sheets.file_name("clip", format, video=True)
    media.save(media.to_images(clip), path, fps=8)
    assert read(path) == pytest.approx(clip.permute(0, 2, 3, 1).numpy(), abs=tolerance)


def test_odd_sizes_keep_every_pixel_in_mp4(tmp_path: Path) -> None:
    clip = frames(3, 35, 49)
    media.save(media.to_images(clip), tmp_path / "odd.mp4", fps=8)
    back = read(tmp_path / "odd.mp4")
    assert back.shape == (3, 36, 50, 3)
    assert back[:, :35, :49] == pytest.approx(clip.permute(0, 2, 3, 1).numpy(), abs=0.1)


@pytest.mark.parametrize("format", sheets.IMAGE_FORMATS)
def test_images_are_lossless(tmp_path: Path, format: str) -> None:
    path = tmp_path / sheets.file_name("image", format, video=False)
    media.save(media.to_images(frames(1)), path, fps=1)
    assert read(path) == pytest.approx(frames(1).permute(0, 2, 3, 1).numpy(), abs=0.002)


def test_formats_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot hold images"):
        sheets.check_format("mp4", video=False)
    monkeypatch.setattr(sheets, "has_ffmpeg", lambda: False)
    assert sheets.default_format(video=True) == "webp"
    with pytest.raises(UsageError, match=r"diffpatch\[video\]"):
        sheets.check_format("mp4", video=True)


def test_side_by_side_holds_both_clips_and_labels() -> None:
    dense, fast = media.to_images(frames()), media.to_images(1 - frames())
    joined = sheets.side_by_side([dense, fast], ["dense", "radial"])
    assert len(joined) == 5
    scale = -(-sheets.SMALLEST // 36)
    width, height = 50 * scale, 36 * scale
    bar = joined[0].height - height - sheets.GAP
    corners = [(sheets.GAP, bar), (2 * sheets.GAP + width, bar)]
    for source, (left, top) in zip((dense, fast), corners, strict=True):
        picture = joined[2].crop((left, top, left + width, top + height))
        small = np.asarray(picture.resize((50, 36), Image.Resampling.NEAREST))
        assert np.array_equal(small, np.asarray(source[2]))
    assert np.asarray(joined[0].crop((0, 0, joined[0].width, bar))).max() > 200  # there is text


@pytest.mark.parametrize("count", [1, 3, 40])
def test_contact_sheet_has_a_row_a_clip(count: int) -> None:
    clip = media.to_images(frames(count))
    sheet = sheets.contact_sheet([clip, clip, clip], ["a", "b", "c"])
    single = sheets.contact_sheet([clip], ["a"])
    assert sheet.size == (single.width, 3 * single.height)


def test_labels_shrink_to_their_picture() -> None:
    label = "a label that is far too long for its picture"
    assert sheets._font(label, 120, 40).getlength(label) < sheets._font(label, 9999, 40).getlength(
        label
    )


def test_staged_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged(target) as stage:
        (stage / "a.txt").write_text("new")
        assert not (target / "a.txt").exists()
    assert [path.name for path in target.iterdir()] == ["a.txt"]
    with pytest.raises(KeyboardInterrupt), staged(target) as stage:
        (stage / "a.txt").write_text("newer")
        raise KeyboardInterrupt
    assert [path.read_text() for path in target.iterdir()] == ["new"]


def test_a_folder_of_frames_is_replaced_whole(tmp_path: Path) -> None:
    for count in (4, 2):
        with staged(tmp_path) as stage:
            media.save(media.to_images(frames(count)), stage / "clip", fps=8)
    assert len(list((tmp_path / "clip").iterdir())) == 2


def test_results_are_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "dense.mp4").touch()
    with pytest.raises(UsageError, match=r"dense\.mp4 exists; add --overwrite"):
        output.check_free([tmp_path / "dense.mp4", tmp_path / "new.mp4"], overwrite=False)
    output.check_free([tmp_path / "dense.mp4"], overwrite=True)
    output.check_free([tmp_path / "deep" / "er" / "new.mp4"], overwrite=False)
    with pytest.raises(UsageError, match="not a folder"):
        output.check_free([tmp_path / "dense.mp4" / "new.mp4"], overwrite=False)


@pytest.mark.parametrize(("gain", "words"), [(1.01, "faster"), (1.0, "as fast"), (0.92, "as fast")])
def test_what_is_slower_is_not_called_faster(gain: float, words: str) -> None:
    seconds = {"denoising": 1.0, "step_median": 1.0, "total": 1.0}
    run = {"seconds": seconds, "kept": 0.5, "options": {}}
    result = {"prompt": "a cat", "seed": 0, "model": "m", "measured": ""}
    result |= {"runs": {"dense": run, "radial": run}, "speedup": {"total": gain}}
    result |= {"quality": {name: {"mean": 1.0} for name in ("psnr", "ssim")}}
    html = page(
        result | {"environment": {"device": "a CPU"}}, {"dense": "a.mp4", "radial": "b.mp4"}
    )
    heading = html[html.index("<h1>") : html.index("</h1>")]
    assert heading == f"<h1><b>{gain:.2f}×</b> {faster(gain)} with radial"
    assert faster(gain).startswith(words)


def test_the_card_shows_the_pattern_of_the_clip_that_was_made(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some pipelines are asked for another number of frames than they make."""
    grids = []
    monkeypatch.setattr(render, "fitted_call", lambda call, pipe: call | {"num_frames": 13})
    monkeypatch.setattr(render, "planned_pattern", lambda plan: grids.append(plan.grid))
    size = ["--height", "32", "--width", "32", "--num-frames", "17", "--steps", "2"]
    words = ["render", "-m", str(models / "wan"), "-p", "a cat", *size, "--method", "window"]
    assert main([*words, "--compare", "dense", "--quiet", "-o", str(tmp_path)]) == 0
    assert [grid.num_frames for grid in grids] == [5]
