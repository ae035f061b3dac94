"""Where the temporal frequencies of a model's rotary embedding stand, for those that change one.

diffusers builds rotary embeddings as a pair of tables, cosines and sines, with a row a token and
two columns a frequency. The families here build them in ways that are known: in a module named
``rope``, or in the pipeline, which passes them to the transformer as ``image_rotary_emb``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.errors import DiffpatchError

Tables = tuple[torch.Tensor, torch.Tensor]  # cosines, sines: (S, D), (B, S, D) or (1, S, 1, D)
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class TemporalColumns:
    """The temporal frequencies of one pair of tables.

    Attributes:
        num_frames: latent frames of the clip; they vary slowest over the rows of the tables.
        frequencies: radians that each frequency turns from one frame to the next.
        columns: the first of the two columns of each frequency.
    """

    num_frames: int
    frequencies: tuple[float, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class RotaryEmbedding:
    """How a family's rotary embedding is reached.

    Attributes:
        module: path of the module whose forward returns the tables; empty where the pipeline passes
            them to the transformer as ``image_rotary_emb``.
        read: the arguments of that forward, by name -> where the temporal frequencies stand.
    """

    module: str
    read: Callable[[Arguments], TemporalColumns]


def rotary_embedding(model: Any) -> RotaryEmbedding | None:
    """How the rotary embedding of a transformer is built, or None where that is not known."""
    rope = getattr(model, "rope", None)
    build = _MODULES.get(type(rope).__name__) or _ARGUMENTS.get(type(model).__name__)
    return None if build is None else build(model)


def slowed(tables: Tables, where: TemporalColumns, trained: int) -> Tables:
    """The tables with one temporal frequency so slow that one period spans the clip.

    It is the one whose period is nearest to the trained length: the first to repeat itself in a
    longer clip (RIFLEx, arXiv 2502.15894; period L·s for s times the trained length L).

    Args:
        tables: cosines and sines, left as they are.
        where: their temporal frequencies.
        trained: latent frames that the model was trained at.
    """
    periods = [2 * math.pi / frequency for frequency in where.frequencies]
    nearest = min(range(len(periods)), key=lambda j: abs(periods[j] - trained))
    column, frames = where.columns[nearest], where.num_frames
    cos, sin = (table.clone() for table in tables)
    axis = -3 if cos.ndim == 4 else -2  # of the tokens
    time = torch.arange(frames, device=cos.device, dtype=torch.float64)
    angle = (time * (2 * math.pi / frames)).repeat_interleave(cos.shape[axis] // frames)
    angle = angle[:, None, None] if cos.ndim == 4 else angle[:, None]
    cos[..., column : column + 2] = angle.cos().to(cos.dtype)
    sin[..., column : column + 2] = angle.sin().to(sin.dtype)
    return cos, sin


def _leading(frequencies: tuple[float, ...], frames: Callable[[Arguments], int]) -> Any:
    """Temporal frequencies that stand in the first columns, one after the other."""
    columns = tuple(range(0, 2 * len(frequencies), 2))
    return lambda args: TemporalColumns(frames(args), frequencies, columns)


def _geometric(dim: int, theta: float) -> tuple[float, ...]:
    return tuple(theta ** (-j / dim) for j in range(0, dim, 2))


def _wan(model: Any) -> RotaryEmbedding:
    rope = model.rope
    # The angles of frame 1 are the frequencies, whatever base they were made with.
    cos, sin = (table[1, : rope.t_dim : 2].double() for table in (rope.freqs_cos, rope.freqs_sin))
    frequencies = tuple(torch.atan2(sin, cos).tolist())
    patch = rope.patch_size[0]
    return RotaryEmbedding(
        "rope", _leading(frequencies, lambda args: args["hidden_states"].shape[2] // patch)
    )


def _hunyuan(model: Any) -> RotaryEmbedding:
    rope = model.rope
    frequencies = _geometric(rope.rope_dim[0], rope.theta)
    patch = rope.patch_size_t
    return RotaryEmbedding(
        "rope", _leading(frequencies, lambda args: args["hidden_states"].shape[2] // patch)
    )


def _ltx(model: Any) -> RotaryEmbedding:
    rope = model.rope
    count = rope.dim // 6
    first = rope.dim % 6  # columns of padding
    bases = [rope.theta ** (j / max(count - 1, 1)) for j in range(count)]

    def read(args: Arguments) -> TemporalColumns:
        scale = args.get("rope_interpolation_scale")
        if args.get("video_coords") is not None or scale is None:
            raise DiffpatchError(
                "LTX was given coordinates of its own for the tokens: pass riflex=False"
            )
        # A frame is that far along the axis, which the model lets turn by frequency × pi.
        step = float(scale[0]) * rope.patch_size_t / rope.base_num_frames
        frequencies = tuple(math.pi * base * step for base in bases)
        return TemporalColumns(
            args["num_frames"], frequencies, tuple(first + 6 * j for j in range(count))
        )

    return RotaryEmbedding("rope", read)


def _cogvideox(model: Any) -> RotaryEmbedding:
    config = model.config
    frequencies = _geometric(config.attention_head_dim // 4, 10000.0)
    patch = config.patch_size_t or 1

    def frames(args: Arguments) -> int:
        return -(-args["hidden_states"].shape[1] // patch)

    return RotaryEmbedding("", _leading(frequencies, frames))


# By the class of the module ``rope``, or by that of the transformer.
_MODULES: Mapping[str, Callable[[Any], RotaryEmbedding]] = {
    "WanRotaryPosEmbed": _wan,
    "SkyReelsV2RotaryPosEmbed": _wan,
    "HunyuanVideoRotaryPosEmbed": _hunyuan,
    "HunyuanVideo15RotaryPosEmbed": _hunyuan,
    "LTXVideoRotaryPosEmbed": _ltx,
}
_ARGUMENTS: Mapping[str, Callable[[Any], RotaryEmbedding]] = {
    "CogVideoXTransformer3DModel": _cogvideox
}
