"""Pictures and clips on disk: which of two folders belong together, and their frames."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from diffpatch.errors import BadParameter
from diffpatch.eval.quality.metrics import check_frames
from diffpatch.files import read_text

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".apng", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
ARRAYS = (".npy",)
RESULT = "render.json"  # beside the clips of `diffpatch render`
LOSSY = (".jpg", ".jpeg", ".gif", *VIDEOS)  # and animated .webp, as diffpatch writes it


class ItemError(BadParameter):
    """A file or folder cannot be evaluated; the message says why."""


def find_items(folder: Path) -> dict[str, Path]:
    """Everything in a folder that holds frames: name -> path, sorted by name.

    Names are paths inside the folder, without suffix. A subfolder of pictures numbered from 0000,
    as `diffpatch render --format png` writes it, is one clip. What `diffpatch render` writes beside
    its clips (side by side, contact sheet, card) is left out.

    Args:
        folder: a folder; or a single file; or the name of a method in a folder that
            `diffpatch render` wrote, such as out/radial for out/radial.mp4 or, with several
            prompts, out/001-a-cat/radial.mp4 and its neighbours.

    Raises:
        ItemError: there is no such folder, nothing in it, or one name twice.
    """
    made = (folder.parent / RESULT).is_file()  # else numbered pictures are a set of them
    if folder.is_file() or (made and folder.is_dir() and _is_clip(folder)):
        return {folder.stem: folder}
    if not folder.is_dir():
        found = rendered(folder.parent).get(folder.name) if folder.parent.is_dir() else None
        if found is None:
            raise ItemError(f"there is no folder {folder}, nor a file")
        return found
    return _items(folder)


def rendered(folder: Path) -> dict[str, dict[str, Path]]:
    """What `diffpatch render` wrote into a folder, by method: name -> path.

    Raises:
        ItemError: there is nothing in it.
    """
    methods: dict[str, dict[str, Path]] = {}
    for name, path in _items(folder).items():
        if (path.parent / RESULT).is_file():
            methods.setdefault(Path(name).name, {})[name] = path
    return methods


def _items(folder: Path) -> dict[str, Path]:
    found: list[tuple[str, Path]] = []
    _collect(folder, folder, found)
    if not found:
        kinds = ", ".join((*PICTURES, *VIDEOS, *ARRAYS))
        raise ItemError(f"{folder} holds nothing to evaluate; wanted are {kinds}")
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        raise ItemError(f"{folder} holds {twice[0]!r} in two formats; keep one")
    return dict(sorted(found))


def match(found: Mapping[str, Path], reference: Mapping[str, Path]) -> dict[str, tuple[Path, Path]]:
    """Pairs of files of the same name; where no name fits, of folders that hold one file each.

    The latter is what two calls of `diffpatch render` leave, as files are named after methods.

    Raises:
        ItemError: nothing fits.
    """
    pairs = {name: (found[name], reference[name]) for name in found if name in reference}
    if not pairs:
        own, other = _by_folder(found), _by_folder(reference)
        pairs = {name: (own[name], other[name]) for name in own if name in other}
    if not pairs:
        raise ItemError(
            f"no names fit: {next(iter(found))!r} against {next(iter(reference))!r}; files are "
            "matched by their path inside the folder, without suffix"
        )
    return pairs


def read_frames(path: Path) -> torch.Tensor:
    """The frames of a file, or of a folder of pictures, as float32 (F, 3, H, W) in [0, 1].

    Arrays are (F, H, W, 3), (F, 3, H, W) or one frame of these; uint8, or floats in [0, 1].

    Raises:
        ItemError: it cannot be read, or is not made of frames.
    """
    if path.is_dir():
        return torch.cat([read_frames(file) for file in sorted(path.iterdir())])
    try:
        if path.suffix.lower() in ARRAYS:
            return _from_array(np.load(path, allow_pickle=False), path)
        if path.suffix.lower() in VIDEOS:
            return _from_array(_video(path), path)
        return _from_array(_pictures(path), path)
    except (OSError, EOFError, ValueError, UnidentifiedImageError) as error:
        if isinstance(error, ItemError):
            raise
        raise ItemError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def is_lossy(path: Path) -> bool:
    """Whether the file lost information when it was written, which limits its PSNR."""
    if path.suffix.lower() == ".webp":
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    return path.suffix.lower() in LOSSY


def read_captions(path: Path) -> dict[str, str]:
    """Prompts by the names of items: a JSON object, or lines of name, tab, prompt.

    Raises:
        ItemError: it is neither.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError):
        raise ItemError(f"{path} is not a text file in UTF-8") from None
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
        raise ItemError(f"{path} must be a JSON object of names and prompts")
    lines = [line.partition("\t") for line in text.splitlines() if line.strip()]
    if wrong := next((name for name, tab, _ in lines if not tab), None):
        raise ItemError(f"{path}: {wrong[:40]!r} must be a name, a tab and a prompt")
    return {name.strip(): prompt.strip() for name, _, prompt in lines}


def prompt_beside(path: Path) -> str | None:
    """The prompt in the render.json next to a file, as `diffpatch render` leaves it."""
    try:
        found = json.loads((path.parent / RESULT).read_text(encoding="utf-8"))["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _is_beside(path: Path) -> bool:
    """Whether `diffpatch render` made it of the clips beside it."""
    return "_vs_" in path.stem or path.stem == "card"


def _collect(folder: Path, root: Path, found: list[tuple[str, Path]]) -> None:
    made = (folder / RESULT).is_file()
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root)
        if path.name.startswith(".") or (made and _is_beside(path)):
            continue
        if path.is_dir() and _is_clip(path):
            found.append((name.as_posix(), path))
        elif path.is_dir():
            _collect(path, root, found)
        elif path.suffix.lower() in (*PICTURES, *VIDEOS, *ARRAYS):
            found.append((name.with_suffix("").as_posix(), path))


def _is_clip(folder: Path) -> bool:
    names = sorted(path.name for path in folder.iterdir())
    return names == [f"{number:04d}.png" for number in range(len(names))] and bool(names)


def _by_folder(items: Mapping[str, Path]) -> dict[str, Path]:
    """The items that are alone in their folder, by its name."""
    parents = {name: Path(name).parent.as_posix() for name in items}
    count = Counter(parents.values())
    return {parents[name]: path for name, path in items.items() if count[parents[name]] == 1}


def _pictures(path: Path) -> np.ndarray:
    """The frames of a picture or animation.

    Writers of animations turn equal frames in a row into one that is shown longer, so a frame
    counts as often as it lasts longer than the shortest.
    """
    frames, lengths = [], []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            if frame.mode[0] in "IF":  # Pillow would cut their values off at 255
                raise ItemError(
                    f"{path} has more than 8 bits a pixel ({frame.mode}): convert it to 8 bits, or"
                    " to .npy with floats in [0, 1]"
                )
            frames.append(np.asarray(frame.convert("RGB")))
            lengths.append(float(frame.info.get("duration") or 0))
    shortest = min(lengths)
    repeats = [round(length / shortest) if shortest else 1 for length in lengths]
    return np.repeat(np.stack(frames), repeats, axis=0)


def _video(path: Path) -> np.ndarray:
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise ItemError(f"{path} needs ffmpeg: pip install 'diffpatch[video]'") from None
    reader: Any = imageio.get_reader(path, format="FFMPEG")
    with reader:
        return np.stack([np.asarray(frame) for frame in reader])


def _from_array(values: np.ndarray, path: Path) -> torch.Tensor:
    frames = torch.from_numpy(np.ascontiguousarray(values))
    frames = frames[None] if frames.ndim == 3 else frames
    if frames.ndim == 4 and frames.shape[1] != 3 and frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ItemError(f"{path} has shape {values.shape}; wanted are frames (F, H, W, 3)")
    if frames.dtype == torch.uint8:
        frames = frames.float() / 255
    if not frames.is_floating_point():
        raise ItemError(f"{path} holds {values.dtype}; wanted are uint8, or floats in [0, 1]")
    check_frames(frames)
    return frames.float()
