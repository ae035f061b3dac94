"""Frames as something that a browser plays: H.264 in mp4, or animated WebP without ffmpeg."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

SMALLEST = 256  # pixels; smaller clips are enlarged, so that compression spares their details
LARGEST = 960  # pixels; larger ones are reduced, so that a report can hold many
NAMES = ("clip.mp4", "clip.webp", "clip.png")
TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".png": "image/png"}


def save_clip(frames: torch.Tensor, folder: Path, fps: float) -> Path:
    """Write frames (F, 3, H, W) in [0, 1] as clip.mp4, .webp or (a single frame) .png."""
    pixels = _resized(frames)
    if len(pixels) == 1:
        return _save_images(pixels, folder / "clip.png", fps)
    if all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
        return _save_mp4(pixels, folder / "clip.mp4", fps)
    return _save_images(pixels, folder / "clip.webp", fps)


def find_clip(folder: Path) -> Path | None:
    """The clip in the folder of a run."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def _resized(frames: torch.Tensor) -> np.ndarray:
    """uint8 (F, H, W, 3), enlarged by whole factors or reduced, with even sides."""
    height, width = frames.shape[-2:]
    if max(height, width) > LARGEST:
        factor = LARGEST / max(height, width)
        size = [max(2, round(side * factor / 2) * 2) for side in (height, width)]
        frames = torch.nn.functional.interpolate(frames, size, mode="area")
    else:
        scale = max(1, -(-SMALLEST // min(height, width)))
        frames = frames.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    odd = (0, frames.shape[-1] % 2, 0, frames.shape[-2] % 2)
    frames = torch.nn.functional.pad(frames, odd, mode="replicate") if any(odd) else frames
    pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _save_mp4(pixels: np.ndarray, path: Path, fps: float) -> Path:
    import imageio_ffmpeg

    height, width = pixels.shape[1:3]
    # yuv420p and faststart: what every browser plays, from the first byte on.
    options = ["-crf", "18", "-preset", "medium", "-movflags", "+faststart", "-threads", "1"]
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", quality=None,
        pix_fmt_in="rgb24", pix_fmt_out="yuv420p", macro_block_size=2, output_params=options,
        ffmpeg_log_level="error",
    )  # fmt: skip
    writer.send(None)
    for frame in pixels:
        writer.send(frame)
    writer.close()
    return path


def _save_images(pixels: np.ndarray, path: Path, fps: float) -> Path:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in pixels]
    options: dict[str, Any] = {"quality": 85} if path.suffix == ".webp" else {}
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:], "loop": 0}
        options["duration"] = round(1000 / fps)
    images[0].save(path, **options)
    return path
