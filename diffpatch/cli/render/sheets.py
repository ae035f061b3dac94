"""Frames to files: video, animation or images, side by side and as a contact sheet."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from diffpatch.cli.errors import UsageError

VIDEO_FORMATS = ("mp4", "gif", "webp", "apng", "png")
IMAGE_FORMATS = ("png", "webp")

INK, PAPER = "white", "#1b1b1f"
GAP = 8  # pixels between pictures
SMALLEST = 256  # pictures below this are enlarged, so that labels stay readable


def default_format(video: bool) -> str:
    """mp4 where ffmpeg came with the `video` extra, else webp; png for images."""
    if not video:
        return "png"
    return "mp4" if _has_ffmpeg() else "webp"


def check_format(name: str, video: bool) -> None:
    """Refuse a format that this kind of output or this installation cannot write."""
    known = VIDEO_FORMATS if video else IMAGE_FORMATS
    if name not in known:
        kind = "videos" if video else "images"
        raise UsageError(f"--format {name} cannot hold {kind}; choose one of {', '.join(known)}")
    if name == "mp4" and not _has_ffmpeg():
        raise UsageError(
            "--format mp4 needs ffmpeg: pip install 'diffpatch[video]', or choose --format webp"
        )


def to_images(frames: torch.Tensor) -> list[Image.Image]:
    """Frames (F, 3, H, W) in [0, 1] as pictures."""
    pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels.cpu()]


def save(images: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write pictures in the format that the suffix of the path names; without one, as a folder."""
    if len(images) == 1 and path.suffix in (".png", ".webp"):
        images[0].save(path, lossless=True)
    elif path.suffix == ".mp4":
        _save_mp4(images, path, fps)
    elif path.suffix:
        options: dict[str, dict[str, Any]] = {".webp": {"quality": 90, "method": 4}}
        images[0].save(
            path,
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / fps),
            loop=0,
            **options.get(path.suffix, {}),
        )
    else:
        path.mkdir()
        for number, image in enumerate(images):
            image.save(path / f"{number:04d}.png")


def file_name(stem: str, format: str, video: bool) -> str:
    """The name of an output; a video as png is a folder of numbered frames."""
    return stem if video and format == "png" else f"{stem}.{format}"


def side_by_side(
    clips: Sequence[Sequence[Image.Image]], labels: Sequence[str]
) -> list[Image.Image]:
    """Clips of equal size and length next to each other, a label above each."""
    return [_row(frames, labels) for frames in zip(*clips, strict=True)]


def contact_sheet(
    clips: Sequence[Sequence[Image.Image]], labels: Sequence[str], columns: int = 7
) -> Image.Image:
    """One row a clip under its label, with frames picked evenly from the first to the last."""
    count = len(clips[0])
    columns = min(columns, count)
    picks = [round(i * (count - 1) / max(1, columns - 1)) for i in range(columns)]
    rows = [
        _row([clip[i] for i in picks], [label] + [""] * (columns - 1))
        for clip, label in zip(clips, labels, strict=True)
    ]
    width, height = rows[0].size
    sheet = Image.new("RGB", (width, height * len(rows)), PAPER)
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * height))
    return sheet


def _row(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    scale = max(1, math.ceil(SMALLEST / min(images[0].size)))
    width, height = (side * scale for side in images[0].size)
    bar = max(22, height // 16)
    row = Image.new("RGB", (GAP + len(images) * (width + GAP), bar + GAP + height), PAPER)
    draw = ImageDraw.Draw(row)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = GAP + number * (width + GAP)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        row.paste(enlarged, (left, bar))
        # A label may run over the following pictures if they carry none of their own.
        room = width if all(labels) else row.width - left
        draw.text((left, bar // 2), label, INK, font=_font(label, room, bar), anchor="lm")
    return row


def _font(text: str, width: int, bar: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest default font that fits the text into the bar."""
    size = round(bar * 0.7)
    font = ImageFont.load_default(size)
    while size > 8 and font.getlength(text) > width:
        size -= 1
        font = ImageFont.load_default(size)
    return font


def _save_mp4(images: Sequence[Image.Image], path: Path, fps: float) -> None:
    from diffusers.utils.export_utils import export_to_video

    # Pictures, as export_to_video inverts uint8 arrays; even sizes, as it rescales others.
    even = [_even(image) for image in images]
    rate: Any = fps  # annotated as int there; fractions work
    export_to_video(even, str(path), fps=rate, quality=8, macro_block_size=2)


def _even(image: Image.Image) -> Image.Image:
    """The picture with its last row and column repeated where a side is odd."""
    width, height = image.size
    if width % 2 == 0 and height % 2 == 0:
        return image
    out = Image.new("RGB", (width + width % 2, height + height % 2))
    for x, y in ((width % 2, height % 2), (0, height % 2), (width % 2, 0), (0, 0)):
        out.paste(image, (x, y))
    return out


def _has_ffmpeg() -> bool:
    return all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))
