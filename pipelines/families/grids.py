"""The token grid of a self-attention call, read off the arguments of the transformer's forward.

Every function returns (num_frames, height, width, tokens before, tokens after), or the spans of a
packed sequence, or says in words why it cannot; the forward then runs dense with that reason in the
report. `REST` tokens are as many as the sequence of a call holds beside the others; exact numbers
are checked against it. Of spans, a number is that many tokens without a grid, and three numbers
(num_frames, height, width) are a grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Arguments = Mapping[str, Any]  # of the forward, by name
Grid = tuple[int, int, int, int, int]
Spans = tuple[int | tuple[int, int, int], ...]
GridReading = Grid | Spans
# (model, arguments) -> the grid or spans, or why there are none
GridFunction = Callable[[Any, Arguments], GridReading | str]
Count = int | Callable[[Arguments], int]

REST = -1


def unknown(model: Any, args: Arguments) -> str:
    """No grid at all."""
    return "diffpatch knows no token grid for this model"


def text(args: Arguments) -> int:
    """Prompt tokens, where the model joins them to the visual ones as they are."""
    return args["encoder_hidden_states"].shape[1]


def latents(axes: str, before: Count = 0, after: Count = 0) -> GridFunction:
    """Latents that the model itself cuts into patches.

    Args:
        axes: the axes of ``hidden_states``: a letter each, of which F, H and W are cut. Frames that
            are not named (Latte's spatial layers fold them into the batch) do not count.
        before: always-visible tokens in front of the visual ones, or how to count them.
        after: always-visible tokens behind them.
    """

    def read(model: Any, args: Arguments) -> Grid | str:
        shape = args["hidden_states"].shape
        if len(shape) != len(axes):
            return f"hidden_states of {len(shape)} axes are packed in a way diffpatch cannot read"
        size = dict(zip(axes, shape, strict=True))
        t, h, w = _patch_size(model.config)
        frames = size["F"] // t if "F" in size else 1
        return frames, size["H"] // h, size["W"] // w, _count(before, args), _count(after, args)

    return read


def image_ids(model: Any, args: Arguments) -> Grid | str:
    """Text, then packed image tokens with ``img_ids`` (S, ≥ 3) of (image, row, column, …).

    Reference images (Kontext, Flux 2) have another first column and stand behind.
    """
    if args.get("kv_cache_mode") is not None:
        return "cached reference images stand between text and image"
    ids = args["img_ids"]
    height, width, tokens = once(ids, _size_of_ids)
    # Where these are not height × width tokens, the sequence does not hold the grid.
    return 1, height, width, text(args), ids.shape[-2] - tokens


def joint_ids(model: Any, args: Arguments) -> Grid | str:
    """The same with ``position_ids`` of text and image in one tensor (Krea 2)."""
    ids, before = args["position_ids"], text(args)
    height, width, tokens = once(ids, lambda ids: _size_of_ids(ids[before:]))
    return 1, height, width, before, ids.shape[0] - before - tokens


def streams(model: Any, args: Arguments) -> Grid | str:
    """The image alone in the first blocks, in the others between text and references (Flux 3)."""
    height, width, _ = once(args["img_ids"], _size_of_ids)
    references = args.get("image_cond_hidden_states")
    return 1, height, width, REST, 0 if references is None else references.shape[1]


def _size_of_ids(ids: torch.Tensor) -> list[int]:
    """[height, width, tokens] of the first image among ids (S, ≥ 3) or (B, S, ≥ 3)."""
    # Counts, not largest values: in bfloat16 the 300th row has the number of the 299th.
    ids = ids[0] if ids.ndim == 3 else ids
    image, row, column = (ids[:, :3] == ids[:1, :3]).unbind(1)
    return torch.stack([(image & column).sum(), (image & row).sum(), image.sum()]).tolist()


def image_shapes(model: Any, args: Arguments) -> Grid | str:
    """Text, then packed images of ``img_shapes``: the generated one, then references (Qwen)."""
    samples = [s if isinstance(s, list) else [s] for s in args["img_shapes"]]
    if any(s != samples[0] for s in samples):
        return "images of different shapes in one batch"
    first, *others = samples[0]
    frames, height, width = first
    return frames, height, width, text(args), sum(f * h * w for f, h, w in others)


def image_then_text(model: Any, args: Arguments) -> Grid | str:
    """A packed image of one of `img_shapes`, then the prompt (Nucleus)."""
    shapes = args["img_shapes"]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    if any(tuple(shape) != tuple(shapes[0]) for shape in shapes):
        return "images of different shapes in one batch"
    return (*shapes[0], 0, text(args))


def packed_video(model: Any, args: Arguments) -> Grid | str:
    """Packed video tokens whose grid is passed by name, among others (LTX-2).

    Keyframes and references stand behind them, the memory of Echo in front.
    """
    if args.get("num_frames") is None:
        return "num_frames, height and width are not passed"
    size = args["num_frames"], args["height"], args["width"]
    coordinates, tokens = args.get("video_coords"), args["hidden_states"].shape[1]
    if coordinates is None or tokens <= math.prod(size):
        return (*size, 0, REST)
    if torch.compiler.is_compiling():
        return "video_coords cannot be read inside a compiled graph: compile the blocks instead"
    before = once(coordinates, lambda x: _first_token(x, size))
    return before if isinstance(before, str) else (*size, before, REST)


def _first_token(coordinates: torch.Tensor, size: tuple[int, int, int]) -> int | str:
    """Where a grid begins among tokens with bounds (B, 3, S, 2) of (time, row, column)."""
    places = coordinates[0, ..., 0].cpu()
    count, found = math.prod(size), {}
    for first in (0, places.shape[1] - count):
        time, rows, columns = places[:, first : first + count].reshape(3, *size)
        frames = time[:, 0, 0]
        whole = (time == frames[:, None, None]).all() and (frames.diff() > 0).all()
        square = (rows.diff(dim=1) > 0).all() and (columns.diff(dim=2) > 0).all()
        if whole and square and (rows.diff(dim=2) == 0).all():
            found[first] = float(frames[0])
    if not found:
        return f"video_coords have no grid {size} at either end of the sequence"
    return next((first for first, time in found.items() if time == 0), min(found))


def placed_video(model: Any, args: Arguments) -> Grid | str:
    """Packed video tokens whose grid is passed by name, or only by their coordinates (LTX).

    Pipelines that condition on frames pass no grid or, as a placeholder, a wrong one.
    """
    frames, height, width = (args.get(name) or 0 for name in ("num_frames", "height", "width"))
    if frames * height * width == args["hidden_states"].shape[1]:
        return frames, height, width, 0, 0
    coordinates = args.get("video_coords")
    if coordinates is None:
        return "neither num_frames, height and width nor video_coords tell the grid"
    if torch.compiler.is_compiling():
        return "video_coords cannot be read inside a compiled graph: compile the blocks instead"
    return once(coordinates, _grid_of_coordinates)


def _grid_of_coordinates(coordinates: torch.Tensor) -> Grid | str:
    """The grid of coordinates (B, 3, S) of (time, row, column).

    The video is the longest stretch of frames in the order of time; frames around it condition it.
    """
    time, rows, columns = coordinates[0].cpu()
    height, width = len(rows.unique()), len(columns.unique())
    size = height * width
    if len(time) % size:
        return "video_coords are not whole frames of one size"
    times, rows, columns = (x.view(-1, size) for x in (time, rows, columns))
    square = rows[0].view(height, width), columns[0].view(height, width)
    in_order = (square[0].diff(dim=0) > 0).all() and (square[1].diff(dim=1) > 0).all()
    alike = [
        (x == y).all() for x, y in ((times, times[:, :1]), (rows, rows[0]), (columns, columns[0]))
    ]
    if not in_order or not all(alike):
        return "video_coords are not whole frames of one size"
    breaks = (times[:, 0].diff() <= 0).nonzero().flatten() + 1
    cuts = itertools.pairwise([0, *breaks.tolist(), len(times)])
    begin, end = max(cuts, key=lambda cut: cut[1] - cut[0])
    return end - begin, height, width, begin * size, (len(times) - end) * size


def image_list(model: Any, args: Arguments) -> Grid | str:
    """A list of latents (C, F, H, W), one a sample; padding and text stand behind (Z-Image)."""
    if isinstance(args["x"][0], list):
        return "several images in one sequence (omni mode)"
    shapes = {tuple(x.shape[1:]) for x in args["x"]}
    if len(shapes) > 1:
        return "images of different shapes in one batch"
    frames, height, width = shapes.pop()
    patch, patch_t = args.get("patch_size", 2), args.get("f_patch_size", 1)
    return frames // patch_t, height // patch, width // patch, 0, REST


def image_items(model: Any, args: Arguments) -> Grid | str:
    """Latents (B, C, F, H, W), or (B, items, C, F, H, W) of which the model puts the last in front.

    The items before it are references; they and the text stand behind (JoyImage).
    """
    t, h, w = _patch_size(model.config)
    frames, height, width = args["hidden_states"].shape[-3:]
    return frames // t, height // h, width // w, 0, REST


def image_patches(model: Any, args: Arguments) -> Grid | str:
    """Patches of several images of the sizes in ``shape_list``; the first is the generated one."""
    sizes = {tuple(images[0]) for images in args["shape_list"]}
    if len(sizes) > 1:
        return "images of different shapes in one batch"
    frames, height, width = sizes.pop()
    return frames, height, width, 0, REST


def summed_text(model: Any, args: Arguments) -> Grid | str:
    """A prompt summed up in front of the image, reference images behind (Bria FIBO 2)."""
    latents, mask = args["hidden_states"], args.get("encoder_attention_mask")
    if mask is not None and len(latents) > 1:
        return "prompts of different lengths, which may put the text behind the image"
    p = model.config.patch_size
    references = [(x.shape[2] // p) * (x.shape[3] // p) for x in args.get("context_latents") or []]
    return 1, latents.shape[2] // p, latents.shape[3] // p, REST, sum(references)


def history(model: Any, args: Arguments) -> Grid | str:
    """A video after its past in three scales, with the prompt behind (FramePack)."""
    frames, height, width = args["hidden_states"].shape[2:]
    t, h, w = _patch_size(model.config)
    before = 0
    for name, long, wide in (("clean", 1, 2), ("history_2x", 2, 4), ("history_4x", 4, 8)):
        past = args.get(f"latents_{name}")
        if past is not None and args.get(f"indices_latents_{name}") is not None:
            sizes = zip(past.shape[2:], (long, wide, wide), strict=True)
            before += math.prod(-(-length // size) for length, size in sizes)
    return frames // t, height // h, width // w, before, REST


def last_image(model: Any, args: Arguments) -> Grid | str:
    """A prompt with images in it, then the generated one, which alone asks them (Qwen-Image 2.1).

    Of the prompt's tokens as the text encoder counts them, each slot of an image stands for four
    of the transformer's.
    """
    samples = args["img_shapes"]
    if any(shapes != samples[0] for shapes in samples):
        return "images of different shapes in one batch"
    *others, (frames, height, width) = samples[0]
    references = sum(f * h * w for f, h, w in others)
    return frames, height, width, text(args) - references // 4 + references, 0


def uncached(read: GridFunction) -> GridFunction:
    """As `read`, unless keys of reference images come out of a cache (GLM-Image)."""

    def look(model: Any, args: Arguments) -> GridReading | str:
        caches = args.get("kv_caches")
        if caches is not None and caches[0].mode is not None:
            return "reference images are cached keys"
        return read(model, args)

    return look


def _patch_size(config: Any) -> tuple[int, int, int]:
    size = config.patch_size
    if isinstance(size, int):
        return getattr(config, "patch_size_t", None) or 1, size, size
    t, h, w = (1, *size)[-3:]
    return t, h, w


def _count(tokens: Count, args: Arguments) -> int:
    return tokens if isinstance(tokens, int) else tokens(args)


def once(source: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
    """What `read` says about a tensor, asked once: reading from a device waits for it.

    Pipelines pass the same tensor at every step, so the answer is kept on the tensor itself.
    """
    if torch.compiler.is_compiling():
        return read(source)
    version = None if source.is_inference() else source._version
    known = getattr(source, "_diffpatch_read", None)
    if known is None or known[0] != version:
        known = version, read(source)
        source._diffpatch_read = known  # type: ignore[attr-defined]
    return known[1]
