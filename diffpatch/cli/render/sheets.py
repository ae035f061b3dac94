"""Pictures of a rendering: the names of its files, clips side by side, a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from diffpatch.cli.errors import UsageError
from diffpatch.eval.media import has_ffmpeg

VIDEO_FORMATS = ("mp4", "gif", "webp", "apng", "png")
IMAGE_FORMATS = ("png", "webp")

INK, PAPER = "white", "#1b1b1f"
GAP = 8  # pixels between pictures
NAME = 30  # pixels for the name of a picture on a sheet
SMALLEST = 256  # pictures below this are enlarged, so that labels stay readable


def default_format(video: bool) -> str:
    """mp4 where ffmpeg came with the `video` extra, else webp; png for images."""
    if not video:
        return "png"
    return "mp4" if has_ffmpeg() else "webp"


def check_format(name: str, video: bool) -> None:
    """Refuse a format that this kind of output or this installation cannot write."""
    known = VIDEO_FORMATS if video else IMAGE_FORMATS
    if name not in known:
        kind = "videos" if video else "images"
        raise UsageError(f"--format {name} cannot hold {kind}; choose one of {', '.join(known)}")
    if name == "mp4" and not has_ffmpeg():
        raise UsageError(
            "--format mp4 needs ffmpeg: pip install 'diffpatch[video]', or choose --format webp"
        )


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


def named(pictures: Mapping[str, Image.Image], columns: int = 3, side: int = 400) -> Image.Image:
    """Pictures of any size on one sheet, each fitted into a square under its name."""
    columns = min(columns, len(pictures))
    height = side + NAME + GAP
    rows = math.ceil(len(pictures) / columns)
    size = GAP + columns * (side + GAP), GAP + rows * height
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (name, picture) in enumerate(pictures.items()):
        left = GAP + number % columns * (side + GAP)
        top = GAP + number // columns * height
        draw.text((left, top + NAME // 2), name, INK, font=_font(name, side, NAME), anchor="lm")
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        sheet.paste(small, (left, top + NAME))
    return sheet
