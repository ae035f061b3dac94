"""Frames of the clips of a sweep under each other, a row a method, as one picture.

    python examples/strips.py runs/larger runs/longer -o strips.png

Reads the folders that `diffpatch sweep` wrote. Each row says at which size and with what method its
clip was made, and which share of its caption's attributes the judge read from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from diffpatch.eval.media import load_frames, to_images

LINE, SIZE = 26, 16  # pixels, of a row's text and of its letters


def main(argv: list[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description="Frames of the clips of sweeps, a row a method.")
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of sweeps")
    parser.add_argument("-o", "--output", type=Path, default=Path("strips.png"))
    parser.add_argument("--prompt", default="", help="a part of the prompt, to show one of several")
    parser.add_argument("--frames", type=int, default=7, help="frames in a row (7)")
    parser.add_argument("--side", type=int, default=112, help="pixels of a frame (112)")
    args = parser.parse_args(argv)
    found = [run for sweep in args.sweeps for run in runs_of(sweep, args.prompt)]
    if not found:
        raise SystemExit(f"no run whose prompt has {args.prompt!r} in {args.sweeps[0]}")
    picture(found, args.frames, args.side).save(args.output)


def runs_of(sweep: Path, prompt: str = "") -> list[tuple[dict[str, Any], torch.Tensor]]:
    """The records of a sweep's runs and their frames: by size, and dense first."""
    records = [
        (json.loads(path.read_text(encoding="utf-8")), path.parent)
        for path in sorted((sweep / "runs").glob("*/run.json"))
    ]
    kept = [(run, folder) for run, folder in records if prompt in run["prompt"]]
    kept.sort(key=lambda found: (*size_of(found[0]), found[0]["method"] or "", found[0]["label"]))
    return [(run, load_frames(folder / "frames.npz")) for run, folder in kept]


def size_of(run: dict[str, Any]) -> tuple[int, int, int]:
    """Frames, height and width of a run."""
    settings = run["settings"]
    return settings["num_frames"], settings["height"], settings["width"]


def picture(
    found: Sequence[tuple[dict[str, Any], torch.Tensor]], count: int, side: int
) -> Image.Image:
    """The rows under each other.

    Args:
        found: records of runs and their frames, (F, 3, H, W) floats in [0, 1].
        count: frames in a row, at equal distances.
        side: of a frame, in pixels.
    """
    image = Image.new("RGB", (count * side, len(found) * (side + LINE)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(SIZE)
    for row, (run, frames) in enumerate(found):
        top = row * (side + LINE)
        draw.text((4, top + LINE // 2), title(run), fill="black", font=font, anchor="lm")
        places = torch.linspace(0, len(frames) - 1, count).round().long()
        for column, frame in enumerate(to_images(frames[places])):
            small = frame.resize((side, side), Image.Resampling.BOX)
            image.paste(small, (column * side, top + LINE))
    return image


def title(run: dict[str, Any]) -> str:
    """What stands over a row."""
    frames, height, width = size_of(run)
    right = run["quality"].get("caption_accuracy")
    read = "" if right is None else f": the judge reads {right:.0%} of the caption"
    return f"{run['label']}, {frames} frames of {height}x{width}{read}"


if __name__ == "__main__":
    main()
