"""Where the frequencies of a model's rotary embedding stand, for those that slow some of them.

diffusers builds rotary embeddings as tables, with a row a token. Most are a pair, cosines and
sines, with two columns a frequency; those of Qwen-Image are complex, with one column a frequency,
and text has a table of its own. The families here build them in ways that are known: in a module,
or in the pipeline, which passes them to the transformer as ``image_rotary_emb``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.errors import DiffpatchError

# Cosines and sines, (S, D), (B, S, D) or (1, S, 1, D); or complex tables of image and text, (S, D).
Tables = tuple[torch.Tensor, torch.Tensor]
Arguments = Mapping[str, Any]
FRAMES, ROWS, COLUMNS = range(3)


@dataclass(frozen=True)
class Axis:
    """One axis of the grid in the tables of a forward.

    Attributes:
        length: tokens of the clip or picture along it.
        frequencies: radians that each frequency turns from one token to the next.
        columns: the first column of each frequency.
        positions: device -> where the rows of the tables stand along the axis, one tensor for both
            tables, or one for each where they are of image and text.
    """

    length: int
    frequencies: tuple[float, ...]
    columns: tuple[int, ...]
    positions: Callable[[torch.device], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class RotaryEmbedding:
    """How a family's rotary embedding is reached.

    Attributes:
        module: path of the module whose forward returns the tables; empty where the pipeline passes
            them to the transformer as ``image_rotary_emb``.
        axes: of frames, rows and columns those that are known.
        read: the arguments of that forward, by name -> the axes, in the order of `axes`.
    """

    module: str
    axes: tuple[int, ...]
    read: Callable[[Arguments], tuple[Axis, ...]]


def rotary_embedding(model: Any) -> RotaryEmbedding | None:
    """How the rotary embedding of a transformer is built, or None where that is not known."""
    for path in ("rope", "pos_embed"):
        build = _MODULES.get(type(getattr(model, path, None)).__name__)
        if build is not None:
            return build(model)
    build = _ARGUMENTS.get(type(model).__name__)
    return None if build is None else build(model)


def slowed(tables: Tables, axis: Axis, chosen: Sequence[int]) -> Tables:
    """The tables with some frequencies of an axis so slow that one period spans its length.

    None is made faster than it was (RIFLEx, arXiv 2502.15894, equation 8; UltraImage, arXiv
    2512.04504, equations 7 and 8).

    Args:
        tables: left as they are.
        axis: where the frequencies stand.
        chosen: which of them.
    """
    slowest = 2 * math.pi / axis.length
    changed = [j for j in chosen if axis.frequencies[j] > slowest]
    if not changed:
        return tables
    one, other = (table.clone() for table in tables)
    positions = [place.double() for place in axis.positions(one.device)]
    for column in (axis.columns[j] for j in changed):
        if one.is_complex():
            for table, place in zip((one, other), positions, strict=True):
                angle = place * slowest
                table[:, column] = torch.polar(torch.ones_like(angle), angle).to(table.dtype)
            continue
        angle = positions[0] * slowest
        angle = angle[:, None, None] if one.ndim == 4 else angle[:, None]
        one[..., column : column + 2] = angle.cos().to(one.dtype)
        other[..., column : column + 2] = angle.sin().to(other.dtype)
    return one, other


def first_to_repeat(frequencies: Sequence[float], trained: int) -> list[int]:
    """The frequency with the shortest period that a clip of the trained length does not pass.

    Those with shorter periods come around within such clips, and the model knows it; this one is
    the first that does so beyond. For HunyuanVideo and CogVideoX it is the one that the authors of
    RIFLEx give, who look at the frame at which generated clips begin to repeat.

    Returns:
        Its number; empty where all periods are shorter.
    """
    periods = [2 * math.pi / frequency for frequency in frequencies]
    longer = [j for j, period in enumerate(periods) if period >= trained]
    return sorted(longer, key=lambda j: periods[j])[:1]


def dominant(frequencies: Sequence[float], trained: int, count: int) -> list[int]:
    """The frequency whose period is nearest to the trained size, and those with longer periods.

    UltraImage (arXiv 2512.04504, algorithm 1) corrects the nearest one, looks at the picture, and
    goes on while it repeats itself. As many as its authors give come out for Flux (one) and for
    Qwen-Image (two), where the next longer period follows.

    Args:
        frequencies: radians from token to token.
        trained: tokens along the axis in training.
        count: of frequencies, at most.
    """
    periods = [2 * math.pi / frequency for frequency in frequencies]
    nearest = min(range(len(periods)), key=lambda j: abs(periods[j] - trained))
    longer = [j for j in range(len(periods)) if periods[j] > periods[nearest]]
    return [nearest, *sorted(longer, key=lambda j: periods[j])][:count]


def _geometric(dim: int, theta: float) -> tuple[float, ...]:
    return tuple(theta ** (-j / dim) for j in range(0, dim, 2))


def _on_grid(
    shape: tuple[int, int, int], frequencies: Sequence[tuple[float, ...]]
) -> tuple[Axis, ...]:
    """The axes of a grid whose tokens count from 0 along each, one after the other in the columns.

    Args:
        shape: frames, rows and columns.
        frequencies: of as many axes as are known, from the first.
    """
    axes: list[Axis] = []
    begin = 0
    for number, own in enumerate(frequencies):
        columns = tuple(range(begin, begin + 2 * len(own), 2))
        axes.append(Axis(shape[number], own, columns, _raster(shape, number)))
        begin += 2 * len(own)
    return tuple(axes)


def _raster(
    shape: tuple[int, int, int], number: int
) -> Callable[[torch.device], Sequence[torch.Tensor]]:
    """Where the tokens of a grid stand along one of its axes, in raster order."""

    def positions(device: torch.device) -> Sequence[torch.Tensor]:
        view = [1, 1, 1]
        view[number] = shape[number]
        return [torch.arange(shape[number], device=device).view(view).expand(shape).flatten()]

    return positions


def _latents(patches: tuple[int, int, int]) -> Callable[[Arguments], tuple[int, int, int]]:
    """The grid of latents (B, C, F, H, W)."""

    def shape(args: Arguments) -> tuple[int, int, int]:
        frames, height, width = args["hidden_states"].shape[2:]
        return frames // patches[0], height // patches[1], width // patches[2]

    return shape


def _wan(model: Any) -> RotaryEmbedding:
    rope = model.rope
    # The angles of position 1 are the frequencies, whatever base they were made with.
    angles = torch.atan2(rope.freqs_sin[1, ::2].double(), rope.freqs_cos[1, ::2].double())
    sizes = [rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2]
    frequencies = [tuple(part.tolist()) for part in torch.split(angles, sizes)]
    shape = _latents(rope.patch_size)
    return RotaryEmbedding("rope", (0, 1, 2), lambda args: _on_grid(shape(args), frequencies))


def _hunyuan(model: Any) -> RotaryEmbedding:
    rope = model.rope
    frequencies = [_geometric(dim, rope.theta) for dim in rope.rope_dim]
    shape = _latents((rope.patch_size_t, rope.patch_size, rope.patch_size))
    return RotaryEmbedding("rope", (0, 1, 2), lambda args: _on_grid(shape(args), frequencies))


def _ltx(model: Any) -> RotaryEmbedding:
    rope = model.rope
    count = rope.dim // 6
    first = rope.dim % 6  # columns of padding
    bases = [rope.theta ** (j / max(count - 1, 1)) for j in range(count)]

    def read(args: Arguments) -> tuple[Axis, ...]:
        scale = args.get("rope_interpolation_scale")
        if args.get("video_coords") is not None or scale is None:
            raise DiffpatchError(
                "LTX was given coordinates of its own for the tokens: pass riflex=False"
            )
        # A frame is that far along the axis, which the model lets turn by frequency × pi.
        step = float(scale[0]) * rope.patch_size_t / rope.base_num_frames
        frequencies = tuple(math.pi * base * step for base in bases)
        shape = (args["num_frames"], args["height"], args["width"])
        columns = tuple(first + 6 * j for j in range(count))
        return (Axis(shape[0], frequencies, columns, _raster(shape, FRAMES)),)

    return RotaryEmbedding("rope", (FRAMES,), read)


def _cogvideox(model: Any) -> RotaryEmbedding:
    config = model.config
    frequencies = _geometric(config.attention_head_dim // 4, 10000.0)
    time, patch = config.patch_size_t or 1, config.patch_size

    def read(args: Arguments) -> tuple[Axis, ...]:
        _, frames, _, height, width = args["hidden_states"].shape
        return _on_grid((-(-frames // time), height // patch, width // patch), [frequencies])

    return RotaryEmbedding("", (FRAMES,), read)


def _flux(model: Any) -> RotaryEmbedding:
    rope = model.pos_embed
    frequencies = [_geometric(dim, rope.theta) for dim in rope.axes_dim]
    begins = [sum(rope.axes_dim[:axis]) for axis in range(3)]

    def read(args: Arguments) -> tuple[Axis, ...]:
        ids = args["ids"]  # text stands at 0

        def axis(number: int) -> Axis:
            own = frequencies[number]
            columns = tuple(begins[number] + 2 * j for j in range(len(own)))
            length = int(ids[:, number].max()) + 1
            return Axis(length, own, columns, lambda _: [ids[:, number]])

        return axis(ROWS), axis(COLUMNS)

    return RotaryEmbedding("pos_embed", (ROWS, COLUMNS), read)


def _qwen(model: Any) -> RotaryEmbedding:
    rope = model.pos_embed
    frequencies = [_geometric(dim, rope.theta) for dim in rope.axes_dim]
    begins = [sum(rope.axes_dim[:axis]) // 2 for axis in range(3)]

    def read(args: Arguments) -> tuple[Axis, ...]:
        shapes = args["video_fhw"]
        shapes = shapes[0] if isinstance(shapes, list) else shapes
        shapes = shapes if isinstance(shapes, list) else [shapes]
        text = int(args["max_txt_seq_len"])
        after = max(max(_beyond(n, rope.scale_rope) for n in shape[1:]) for shape in shapes)

        def axis(number: int) -> Axis:
            def positions(device: torch.device) -> Sequence[torch.Tensor]:
                images = [
                    _raster(shape, number)(device)[0] - shape[number]
                    + _beyond(shape[number], rope.scale_rope)
                    for shape in shapes
                ]  # fmt: skip
                return torch.cat(images), torch.arange(after, after + text, device=device)

            own = frequencies[number]
            columns = tuple(range(begins[number], begins[number] + len(own)))
            return Axis(max(shape[number] for shape in shapes), own, columns, positions)

        return axis(ROWS), axis(COLUMNS)

    return RotaryEmbedding("pos_embed", (ROWS, COLUMNS), read)


def _beyond(length: int, centred: bool) -> int:
    """The position behind the last token of an axis, whose middle may be the origin."""
    return length // 2 if centred else length


# By the class of the module ``rope`` or ``pos_embed``, or by that of the transformer.
_MODULES: Mapping[str, Callable[[Any], RotaryEmbedding]] = {
    "WanRotaryPosEmbed": _wan,
    "SkyReelsV2RotaryPosEmbed": _wan,
    "HunyuanVideoRotaryPosEmbed": _hunyuan,
    "HunyuanVideo15RotaryPosEmbed": _hunyuan,
    "LTXVideoRotaryPosEmbed": _ltx,
    "FluxPosEmbed": _flux,
    "QwenEmbedRope": _qwen,
}
_ARGUMENTS: Mapping[str, Callable[[Any], RotaryEmbedding]] = {
    "CogVideoXTransformer3DModel": _cogvideox
}
