"""A result in one picture, to show to others: dense and a method under a wipe line, and the gain.

1200×630 pixels, the size that pages and chats show in full. The still has the line in the middle;
in the moving one it sweeps over the clip.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffpatch.eval.media import save_animation, to_images
from diffpatch.files import naming

SIZE = WIDTH, HEIGHT = 1200, 630
STAGE = 40, 32, 700, 372  # left, top, width and height of what the clip may take
COLUMN = 790  # left edge of the figures
TILE = 76  # side of a pattern
DESCRIPTION = 0x010E  # of an image, in Exif
FRAMES = 24  # of the moving card, at least; shorter clips repeat
PAPER, BOX, INK, SOFT, ACCENT = "#14161a", "#20242b", "#f2f2ef", "#a4a8b3", "#6fd3ae"
KEPT, LEFT_OUT = (111, 211, 174), (42, 47, 56)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class CardText:
    """What a card says.

    Attributes:
        label: the method.
        speedup: of a whole pipeline call.
        psnr: to dense, in dB.
        kept: fraction of the query-key pairs that the run computed.
        line: what to paste.
        prompt: what is shown.
        small: model, machine and versions.
        busy: why the times are unreliable, if they are.
    """

    label: str
    speedup: float
    psnr: float
    kept: float
    line: str
    prompt: str
    small: str
    busy: str | None = None


def write_card(
    folder: Path,
    dense: torch.Tensor,
    fast: torch.Tensor,
    text: CardText,
    pattern: Image.Image | None,
    fps: float,
) -> list[Path]:
    """Write card.png, and for a clip card.webp; returns their paths.

    Args:
        folder: where to.
        dense: frames (F, 3, H, W) in [0, 1].
        fast: the same with the method.
        text: what to say.
        pattern: from `thumbnail`; None where there is none to show.
        fps: of the clip.
    """
    clips = to_images(dense), to_images(fast)
    count = len(clips[0])
    board = _board(text, pattern)
    middle = count // 2
    paths = [folder / "card.png"]
    with naming(paths[0]):
        still = _shown(board, clips[0][middle], clips[1][middle], 0.5, text.label)
        still.save(paths[0], exif=_exif(text))
    if count > 1:
        frames = []
        for number in range(max(count, FRAMES)):
            # One sweep there and back, so that the end meets the beginning.
            place = 0.5 + 0.42 * math.sin(2 * math.pi * number / max(count, FRAMES))
            one, other = (clip[number % count] for clip in clips)
            frames.append(_shown(board, one, other, place, text.label))
        paths.append(folder / "card.webp")
        save_animation(frames, paths[1], fps, quality=70, exif=_exif(text))
    return paths


def card_text(path: Path) -> CardText:
    """What a card says, from the card itself."""
    with Image.open(path) as card:
        return CardText(**json.loads(card.getexif()[DESCRIPTION]))


def faster(shown: float) -> str:
    """What stands behind a speedup as it is shown: only above 1 is it faster."""
    return "faster" if shown > 1 else "as fast as dense"


def _exif(text: CardText) -> Image.Exif:
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(asdict(text))
    return exif


def thumbnail(kept: torch.Tensor, side: int = TILE) -> Image.Image:
    """A small square picture of what is kept: queries down, keys to the right, bright is kept.

    Args:
        kept: (N, n), the kept part of each pair of a query tile and a key tile or strip.
        side: of the picture, in pixels.
    """
    grey = torch.nn.functional.interpolate(kept[None, None], (side, side), mode="area")[0, 0]
    low, high = torch.tensor(LEFT_OUT).float(), torch.tensor(KEPT).float()
    pixels = low + (high - low) * grey.sqrt()[..., None]  # the square root: faint is still seen
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


def _board(text: CardText, pattern: Image.Image | None) -> Image.Image:
    """Everything that does not move."""
    board = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(board)
    room = WIDTH - COLUMN - 40
    _fitted(draw, (COLUMN, 8), f"{text.speedup:.1f}x", ACCENT, 150, room)
    kept = f"{text.kept:.0%}"
    figures = (f"{text.psnr:.1f} dB", "PSNR to dense"), (kept, "of attention computed")
    words = faster(float(f"{text.speedup:.1f}"))
    _fitted(draw, (COLUMN + 6, 174), f"{words}, end to end", INK, 36, room)
    for number, (figure, what) in enumerate(figures):
        draw.text((COLUMN + 6, 252 + 112 * number), figure, INK, font=_font(52))
        draw.text((COLUMN + 6, 310 + 112 * number), what, SOFT, font=_font(26))
    top = STAGE[1] + STAGE[3] + 14
    full = Image.new("RGB", (TILE, TILE), KEPT)
    beside = [("dense", "every pair", full), (text.label, f"{kept} of the pairs", pattern)]
    for number, (name, what, picture) in enumerate(beside):
        left = STAGE[0] + number * 350
        if picture is not None:
            board.paste(picture.resize((TILE, TILE)), (left, top))
            left += TILE + 16
        _fitted(draw, (left, top + 10), name, INK, 24, STAGE[0] + (number + 1) * 350 - left - 12)
        draw.text((left, top + 42), what, SOFT, font=_font(20))
    box = (STAGE[0], 508, WIDTH - 40, 562)
    draw.rounded_rectangle(box, 12, BOX)
    _fitted(draw, (box[0] + 18, 520), text.line, ACCENT, 26, box[2] - box[0] - 36)
    small = text.small if text.busy is None else f"The machine was busy ({text.busy}). {text.small}"
    if all(ord(letter) < 0x250 for letter in text.prompt):  # what the font can show
        prompt = " ".join(text.prompt.split())
        _fitted(draw, (STAGE[0], 572), f"“{prompt}”", SOFT, 20, WIDTH - 80)
    _fitted(draw, (STAGE[0], 600), small, SOFT, 16, WIDTH - 80)
    return board


def _shown(
    board: Image.Image, dense: Image.Image, fast: Image.Image, place: float, label: str
) -> Image.Image:
    """The board with one frame on its stage: dense left of the line, the method right of it."""
    left, top, width, height = STAGE
    scale = min(width / dense.width, height / dense.height)
    size = round(dense.width * scale), round(dense.height * scale)
    way = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    dense, fast = dense.resize(size, way), fast.resize(size, way)
    line = round(size[0] * place)
    fast.paste(dense.crop((0, 0, line, size[1])), (0, 0))
    left, top = left + (width - size[0]) // 2, top + (height - size[1]) // 2
    card = board.copy()
    card.paste(fast, (left, top))
    draw = ImageDraw.Draw(card)
    draw.line((left + line, top, left + line, top + size[1]), INK, 4)
    room = size[0] - 64 - int(draw.textlength("dense", font=_font(22)))
    beside = ("dense", _font(22), left + 12, "la"), (
        *_fit(draw, label, 22, room), left + size[0] - 12, "ra"
    )  # fmt: skip
    for name, font, x, anchor in beside:
        box = draw.textbbox((x, top + 10), name, font=font, anchor=anchor)
        draw.rounded_rectangle((box[0] - 8, box[1] - 5, box[2] + 8, box[3] + 6), 6, PAPER)
        draw.text((x, top + 10), name, INK, font=font, anchor=anchor)
    return card


def _fitted(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, ink: str, size: int, room: int
) -> None:
    text, font = _fit(draw, text, size, room)
    draw.text(at, text, ink, font=font)


def _fit(draw: ImageDraw.ImageDraw, text: str, size: int, room: int) -> tuple[str, Font]:
    """A text on one line that gets smaller, and then shorter, until it fits."""
    text = " ".join(text.splitlines()).replace("×", "x")  # which the font lacks
    while size > 13 and draw.textlength(text, font=_font(size)) > room:
        size -= 1
    while len(text) > 4 and draw.textlength(text, font=_font(size)) > room:
        text = text[:-2].rstrip("…") + "…"
    return text, _font(size)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def machine(environment: dict[str, object], parts: Sequence[str] = ()) -> str:
    """The small print: what was measured, on what, with which versions."""
    versions = environment.get("versions")
    known = versions if isinstance(versions, dict) else {}
    shown = ("diffpatch", "torch", "diffusers")
    names = [f"{name} {known[name]}" for name in shown if name in known]
    return " · ".join([*parts, str(environment["device"]), *names])
