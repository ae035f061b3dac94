"""Frames on disk: pictures, animations, mp4, and arrays that keep every level.

Frames are float32 (F, 3, H, W) in [0, 1]; pixels are uint8 (F, H, W, 3).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffpatch.files import naming

CLIP_SIDES = 256, 960  # pixels: smaller clips are enlarged, so that labels and details stay
CLIP_CRF, CRF = 18, 10  # of x264: for a page, and for a result (nearly lossless)
SUFFIXES = (".mp4", ".webp", ".png")
DIFFERENCE = 4  # times brighter than it is
TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".png": "image/png"}


def to_pixels(frames: torch.Tensor) -> np.ndarray:
    """Frames as uint8 (F, H, W, 3), rounded to the nearest level."""
    pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_images(frames: torch.Tensor) -> list[Image.Image]:
    """Frames as pictures."""
    return [Image.fromarray(frame) for frame in to_pixels(frames)]


def save_frames(frames: torch.Tensor, path: Path) -> None:
    """Keep frames with 8 bits a channel, compressed without loss."""
    with naming(path):
        np.savez_compressed(path, frames=to_pixels(frames))


def load_frames(path: Path) -> torch.Tensor:
    """The frames that `save_frames` wrote, in steps of 1/255."""
    with np.load(path, allow_pickle=False) as data:
        pixels = torch.from_numpy(data["frames"])
    return pixels.permute(0, 3, 1, 2).float() / 255


def has_ffmpeg() -> bool:
    """Whether mp4 can be written: ffmpeg comes with the `video` extra."""
    return all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))


def save(images: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write pictures in the format that the suffix of the path names; without one, as a folder.

    Raises:
        DiskFull: there was no space; it names the path.
    """
    with naming(path):
        if path.suffix == ".mp4":
            save_mp4(np.stack([np.asarray(image) for image in images]), path, fps)
        elif not path.suffix:
            path.mkdir()
            for number, image in enumerate(images):
                image.save(path / f"{number:04d}.png")
        elif len(images) == 1 and path.suffix in (".png", ".webp"):
            images[0].save(path, lossless=True)
        else:
            save_animation(images, path, fps)


def save_animation(
    images: Sequence[Image.Image],
    path: Path,
    fps: float,
    quality: int = 90,
    exif: Image.Exif | None = None,
) -> None:
    """Write pictures as an endless .webp, .gif or .apng; `quality` is WebP's."""
    options: dict[str, Any] = {"quality": quality, "method": 4} if path.suffix == ".webp" else {}
    if exif is not None:
        options["exif"] = exif
    duration = round(1000 / fps)
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=duration, loop=0, **options
    )


def save_mp4(pixels: np.ndarray, path: Path, fps: float, crf: int = CRF) -> None:
    """Write uint8 (F, H, W, 3) as H.264 that every browser plays from the first byte on.

    yuv420p needs even sides: the last row and column of odd ones are repeated.
    """
    import imageio_ffmpeg

    odd = [(0, side % 2) for side in pixels.shape[1:3]]
    pixels = np.ascontiguousarray(np.pad(pixels, [(0, 0), *odd, (0, 0)], mode="edge"))
    options = ["-crf", str(crf), "-preset", "medium", "-movflags", "+faststart", "-threads", "1"]
    writer = imageio_ffmpeg.write_frames(
        str(path), (pixels.shape[2], pixels.shape[1]), fps=fps, codec="libx264", quality=None,
        pix_fmt_in="rgb24", pix_fmt_out="yuv420p", macro_block_size=2, output_params=options,
        ffmpeg_log_level="error",
    )  # fmt: skip
    writer.send(None)
    for frame in pixels:
        writer.send(frame)
    writer.close()


def save_clip(frames: torch.Tensor, folder: Path, fps: float, name: str = "clip") -> Path:
    """Write frames for a page, as .mp4, .webp or (a single frame) .png; returns the path."""
    pixels = to_pixels(resized(frames))
    video = ".mp4" if has_ffmpeg() else ".webp"
    path = folder / f"{name}{video if len(pixels) > 1 else '.png'}"
    with naming(path):
        if path.suffix == ".mp4":
            save_mp4(pixels, path, fps, CLIP_CRF)
        elif path.suffix == ".webp":
            save_animation([Image.fromarray(frame) for frame in pixels], path, fps, quality=85)
        else:
            Image.fromarray(pixels[0]).save(path)
    return path


def find_clip(folder: Path, name: str = "clip") -> Path | None:
    """The clip that `save_clip` wrote into a folder."""
    paths = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def difference(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How far frames are from others, as frames to look at: black is equal, white far away."""
    return (DIFFERENCE * (frames - reference).abs()).clamp(0, 1)


def resized(frames: torch.Tensor) -> torch.Tensor:
    """Frames for a page: small ones enlarged by whole factors, large ones reduced."""
    height, width = frames.shape[-2:]
    smallest, largest = CLIP_SIDES
    if max(height, width) > largest:
        factor = largest / max(height, width)
        size = [max(2, round(side * factor / 2) * 2) for side in (height, width)]
        return torch.nn.functional.interpolate(frames, size, mode="area")
    scale = max(1, -(-smallest // min(height, width)))
    return frames.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
