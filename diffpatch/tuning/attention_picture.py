"""Pictures of attention maps: frames side by side, bright where a query looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffpatch import showing
from diffpatch.patterns.drawing import GREY, MARK, Canvas, arrange
from diffpatch.patterns.grid import TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

DARK, BRIGHT = (24, 32, 52), (250, 214, 102)
EDGE = (86, 180, 233)  # around what is exact
FAINT = 0.35  # the power of the mass that is shown, so that faint is seen, too


def draw(
    mass: torch.Tensor,
    exact: torch.Tensor,
    grid: TokenGrid,
    query: tuple[int, int, int],
    title: str,
) -> Image.Image:
    """The frames of a map.

    Args:
        mass: fp32 (num_frames, height, width), of dense attention.
        exact: bool, the same shape.
        grid: of both.
        query: (frame, row, column).
        title: the first line.
    """
    from PIL import Image

    columns, scale = arrange(grid)
    rows = -(-grid.num_frames // columns)
    wide, high = grid.width * scale + 12, grid.height * scale + 30
    subtitle = (
        f"where frame {query[0]}, row {query[1]}, column {query[2]} of {grid} looks: dense mass of"
        " each frame"
    )
    canvas = Canvas(columns * wide, rows * high + 24, title, subtitle)
    low, bright = torch.tensor(DARK).float(), torch.tensor(BRIGHT).float()
    shown = (mass / mass.max().clamp(min=1e-30)).pow(FAINT)[..., None]
    colours = (low + (bright - low) * shown).round().to(torch.uint8)
    for number in range(grid.num_frames):
        x = canvas.left + number % columns * wide
        y = canvas.top + number // columns * high
        own = number == query[0]
        share = float(mass[number].sum())
        canvas.text(x, y, f"{number}: {share:.1%}", fill=MARK if own else GREY)
        picture = Image.fromarray(colours[number].numpy())
        size = grid.width * scale, grid.height * scale
        canvas.image.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y + 18))
        for x0, y0, x1, y1 in edges(exact[number]):
            line = (x + x0 * scale, y + 18 + y0 * scale, x + x1 * scale, y + 18 + y1 * scale)
            canvas.pen.line(line, fill=EDGE, width=2)
        if own:
            dot = max(scale // 2, 5)
            middle = x + (query[2] + 0.5) * scale, y + 18 + (query[1] + 0.5) * scale
            canvas.box(middle[0] - dot / 2, middle[1] - dot / 2, dot, dot, MARK)
    legend = [(MARK, "the query"), (BRIGHT, "dense mass"), (EDGE, "around what is exact")]
    canvas.legend(canvas.top + rows * high + 8, legend)
    return canvas.image


def edges(inside: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Lines (x0, y0, x1, y1) between tokens that are inside, bool (height, width), and others."""
    padded = torch.nn.functional.pad(inside, (1, 1, 1, 1))
    across = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist()
    down = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist()
    return [(x, y, x + 1, y) for y, x in across] + [(x, y, x, y + 1) for y, x in down]


def plot(
    mass: torch.Tensor, exact: torch.Tensor, title: str, ax: Axes | None
) -> tuple[Figure, Axes]:
    """The same with matplotlib, the frames in one image."""
    frames, height, width = mass.shape
    columns = max(1, round((frames * height / width) ** 0.5))
    rows = -(-frames // columns)
    whole = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), float("nan"))
    inside = torch.zeros_like(whole)
    figure, ax = showing.axes(ax)
    from matplotlib.collections import LineCollection
    from matplotlib.colors import PowerNorm

    for number in range(frames):
        y, x = number // columns * (height + 1), number % columns * (width + 1)
        whole[y : y + height, x : x + width] = mass[number]
        inside[y : y + height, x : x + width] = exact[number].float()
        label = f"{number}: {float(mass[number].sum()):.1%}"
        ax.text(x, y, label, fontsize=7, va="top", color="white")
    norm = PowerNorm(FAINT, 0, float(mass.max()))
    image = ax.imshow(whole.numpy(), cmap="magma", interpolation="nearest", norm=norm)
    figure.colorbar(image, ax=ax, label="dense mass of a token")
    lines = [((x0 - 0.5, y0 - 0.5), (x1 - 0.5, y1 - 0.5)) for x0, y0, x1, y1 in edges(inside > 0)]
    ax.add_collection(LineCollection(lines, colors="#56b4e9", linewidths=0.8))
    ax.set(title=title, xticks=[], yticks=[])
    return figure, ax
