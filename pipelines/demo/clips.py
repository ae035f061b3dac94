"""Captioned clips of moving shapes, drawn on the fly: the world that the demo model knows.

A caption such as ``a large red circle moves left over a striped navy background`` fixes six
attributes. Everything else (place, exact size, speed, tilt, stripes) is drawn at random and is
not in the text, so that the tokens of a model have to agree on it through attention.

All geometry is in units of the canvas and all times are in units of the clip. The same scene can
therefore be drawn at any resolution and at any frame rate.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = ("small", "large")
COLORS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.35, 0.95),
    "yellow": (0.98, 0.88, 0.15),
    "purple": (0.60, 0.20, 0.85),
    "orange": (1.00, 0.55, 0.08),
    "cyan": (0.15, 0.85, 0.90),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
BACKGROUNDS = {
    "black": (0.05, 0.05, 0.05),
    "gray": (0.45, 0.45, 0.45),
    "navy": (0.06, 0.10, 0.35),
    "brown": (0.40, 0.24, 0.12),
    "teal": (0.05, 0.38, 0.38),
    "pink": (0.95, 0.65, 0.75),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "pattern": ("plain", "striped"),
    "background": tuple(BACKGROUNDS),
}
"""The values of each attribute, in the order used by `ClipSpec.labels`."""

STRIPED_FRACTION = 0.2
HELD_OUT_ONE_IN = 8
MARGIN = 0.02  # free space between a moving shape and the edge of the canvas


@dataclass(frozen=True)
class ClipSpec:
    """What a caption says about a clip.

    Attributes:
        size: One of `SIZES`.
        color: A key of `COLORS`.
        shape: One of `SHAPES`.
        motion: One of `MOTIONS`.
        pattern: ``"plain"`` (never written in the caption) or ``"striped"``.
        background: A key of `BACKGROUNDS`.
    """

    size: str
    color: str
    shape: str
    motion: str
    pattern: str
    background: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(values)}"
                )

    def caption(self) -> str:
        """The sentence that describes the clip."""
        striped = "striped " if self.pattern == "striped" else ""
        return (
            f"a {self.size} {self.color} {self.shape} {self.motion} "
            f"over a {striped}{self.background} background"
        )

    def labels(self) -> dict[str, int]:
        """The index of each attribute's value in `ATTRIBUTES`."""
        return {name: values.index(getattr(self, name)) for name, values in ATTRIBUTES.items()}

    @property
    def held_out(self) -> bool:
        """Whether training never sees this caption (one in eight, fixed by a hash)."""
        return hashlib.sha256(self.caption().encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def parse_caption(text: str) -> ClipSpec:
    """Read a caption back into its attributes.

    Raises:
        ValueError: If the text is not a caption of this world.
    """
    front, over, back = text.partition(" over a ")
    words, ground = front.split(), back.split()
    plausible = over and len(words) >= 5 and words[0] == "a" and ground[-1:] == ["background"]
    if not plausible or len(ground) not in (2, 3) or ground[:-2] not in ([], ["striped"]):
        raise ValueError(
            f"not a caption of the demo world: {text!r}; expected for example "
            "'a large red circle moves left over a striped navy background'"
        )
    pattern = "striped" if len(ground) == 3 else "plain"
    return ClipSpec(words[1], words[2], words[3], " ".join(words[4:]), pattern, ground[-2])


@functools.cache
def all_specs(held_out: bool, pattern: str) -> tuple[ClipSpec, ...]:
    """Lists every clip of one side of the split and one background pattern, in a fixed order."""
    values = [(pattern,) if name == "pattern" else v for name, v in ATTRIBUTES.items()]
    specs = (ClipSpec(*combination) for combination in itertools.product(*values))
    return tuple(spec for spec in specs if spec.held_out == held_out)


def sample_specs(
    count: int, generator: torch.Generator, *, held_out: bool = False
) -> list[ClipSpec]:
    """Draw attribute combinations at random.

    Args:
        count: How many to draw (with replacement).
        generator: Source of randomness (CPU).
        held_out: Draw from the combinations that training never sees, instead of the others.
    """
    draws = torch.rand(count, 2, generator=generator).tolist()
    specs = []
    for pattern_draw, index_draw in draws:
        pool = all_specs(held_out, "striped" if pattern_draw < STRIPED_FRACTION else "plain")
        specs.append(pool[int(index_draw * len(pool))])
    return specs


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = ["a", "over", "background", "striped", *SIZES, *COLORS, *SHAPES, *MOTIONS]
    return sorted(set(" ".join([*phrases, *BACKGROUNDS]).split()))


@dataclass(frozen=True, eq=False)
class Scenes:
    """The geometry and colours of a batch of B clips.

    Every motion of this world is linear in time: ``(x, y, radius)`` goes from ``start`` to
    ``start + travel`` while the clip's time goes from 0 to 1.

    Attributes:
        start: ``[B, 3]`` centre x, centre y and radius at time 0, in units of the canvas.
        travel: ``[B, 3]`` change of these over the whole clip.
        tilt: ``[B]`` rotation of the shape in radians.
        shape: ``[B]`` index into `SHAPES`.
        color: ``[B, 3]`` colour of the shape, 0 to 1.
        ground: ``[B, 2, 3]`` the two colours of the stripes (equal on a plain background).
        stripes: ``[B, 2]`` period in units of the canvas, and phase in periods.
    """

    start: Tensor
    travel: Tensor
    tilt: Tensor
    shape: Tensor
    color: Tensor
    ground: Tensor
    stripes: Tensor

    def at(self, times: Tensor) -> Tensor:
        """Centre x, centre y and radius ``[B, K, 3]`` at ``times`` ``[B, K]``."""
        return self.start[:, None] + times[..., None] * self.travel[:, None]

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(**{name: value.to(device) for name, value in vars(self).items()})


def frame_times(num_frames: int) -> Tensor:
    """The times ``[num_frames]`` of a clip's frames, from 0 to 1."""
    return torch.arange(num_frames) / max(1, num_frames - 1)


def draw_scenes(specs: Sequence[ClipSpec], generator: torch.Generator) -> Scenes:
    """Draw everything that the captions leave open.

    Args:
        specs: The B attribute combinations.
        generator: Source of randomness (CPU).

    Returns:
        The scenes, on the CPU in float32.
    """
    draws = torch.rand(len(specs), 8, generator=generator)
    paths = [_path(spec, draw.tolist()) for spec, draw in zip(specs, draws[:, :5], strict=True)]
    base = torch.tensor([BACKGROUNDS[spec.background] for spec in specs])
    striped = torch.tensor([[spec.pattern == "striped"] for spec in specs])
    other = torch.where(striped, 0.45 * base + 0.35, base)
    return Scenes(
        start=torch.tensor([start for start, _ in paths]),
        travel=torch.tensor([travel for _, travel in paths]),
        tilt=0.3 * draws[:, 5] - 0.15,
        shape=torch.tensor([SHAPES.index(spec.shape) for spec in specs]),
        color=torch.tensor([COLORS[spec.color] for spec in specs]),
        ground=torch.stack([base, other], dim=1),
        stripes=torch.stack([0.20 + 0.08 * draws[:, 6], draws[:, 7]], dim=1),
    )


def _path(spec: ClipSpec, draw: list[float]) -> tuple[list[float], list[float]]:
    """The start and the travel of (x, y, radius), from five uniform numbers."""
    small = spec.size == "small"
    radius = 0.15 + 0.02 * draw[0] if small else 0.25 + 0.03 * draw[0]
    start = [0.35 + 0.30 * draw[1], 0.35 + 0.30 * draw[2], radius]
    travel = [0.0, 0.0, 0.0]
    if spec.motion in ("grows", "shrinks"):
        start[2], travel[2] = 0.55 * radius, 0.70 * radius
    else:
        room = 1 - 2 * (radius + MARGIN)
        length = room * (0.85 + 0.15 * draw[3])
        axis = 0 if spec.motion in ("moves left", "moves right") else 1
        start[axis] = radius + MARGIN + (room - length) * draw[4]
        travel[axis] = length
    if spec.motion in ("moves left", "moves up", "shrinks"):  # the same path, walked backwards
        start = [a + b for a, b in zip(start, travel, strict=True)]
        travel = [-b for b in travel]
    return start, travel


def render(scenes: Scenes, times: Tensor, size: int) -> Tensor:
    """Draw the frames of a batch of clips.

    Args:
        scenes: The B clips.
        times: ``[B, K]`` the times (0 to 1) of the K frames wanted of each clip.
        size: Height and width in pixels.

    Returns:
        ``[B, 3, K, size, size]`` float32 in [-1, 1].
    """
    grid = (torch.arange(size, device=times.device) + 0.5) / size
    center_x, center_y, radius = scenes.at(times)[..., None, None].unbind(2)  # [B, K, 1, 1]
    tilt = scenes.tilt.view(-1, 1, 1, 1)
    dx, dy = grid.view(1, 1, 1, size) - center_x, grid.view(1, 1, size, 1) - center_y
    x = (tilt.cos() * dx + tilt.sin() * dy) / radius
    y = (tilt.cos() * dy - tilt.sin() * dx) / radius
    inside = (0.5 - _distance(scenes.shape, x, y) * radius * size).clamp(0, 1)[:, None]
    ground = _ground(scenes, grid)[:, :, None]
    frames = torch.lerp(ground, scenes.color[:, :, None, None, None], inside)
    return 2 * frames - 1


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline of each clip's shape, in units of its radius."""
    across, along = x.abs(), y.abs()
    far, near = torch.maximum(across, along), torch.minimum(across, along)
    length = (x * x + y * y).sqrt()
    slope_x, slope_y = math.cos(math.pi / 6), math.sin(math.pi / 6)
    by_name = {
        "circle": length - 1,
        "square": far - 0.82,
        "triangle": torch.maximum(y, slope_x * across - slope_y * y) - 0.55,
        "cross": torch.maximum(near - 0.30, far - 0.98),
        "ring": (length - 0.72).abs() - 0.26,
    }
    result = by_name[SHAPES[0]]
    for index, name in enumerate(SHAPES):
        result = torch.where(shape.view(-1, 1, 1, 1) == index, by_name[name], result)
    return result


def _ground(scenes: Scenes, grid: Tensor) -> Tensor:
    """Draw the backgrounds ``[B, 3, size, size]``: vertical stripes with soft edges."""
    period, phase = scenes.stripes.unbind(1)
    place = grid / period[:, None] + phase[:, None]
    ramp = ((place - place.floor() - 0.5).abs() * 2 - 0.5) * period[:, None] * len(grid)
    weight = (ramp.clamp(-0.5, 0.5) + 0.5)[:, None, None]
    first, second = scenes.ground[..., None, None].unbind(1)
    return torch.lerp(first, second, weight).expand(-1, -1, len(grid), -1)
