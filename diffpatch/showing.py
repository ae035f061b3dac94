"""What notebooks show: plots, pictures and tables of the things that diffpatch hands out.

matplotlib is an extra and imported where a plot is asked for; pictures and tables need none.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from diffpatch.errors import DiffpatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from PIL import Image

COLD, HOT, NONE = (38, 50, 74), (242, 193, 78), (128, 128, 128)  # of a heat map
TICKS = 24  # rows and columns up to which each has a number
SIDE = 320  # pixels of a heat map, about


def axes(ax: Axes | None = None, **options: Any) -> tuple[Figure, Axes]:
    """The axes to draw on and their figure; new ones where none are given.

    Raises:
        DiffpatchError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise DiffpatchError("plots need matplotlib: pip install 'diffpatch[plot]'") from error
    if ax is None:
        return plt.subplots(layout="constrained", **options)
    figure = ax.get_figure()
    assert figure is not None
    return figure.figure, ax  # of a part of a figure, the whole


def heat(
    ax: Axes | None,
    values: Sequence[Sequence[float | None]],
    title: str,
    words: tuple[str, str, str],
    rows: Sequence[int] | None = None,
) -> tuple[Figure, Axes]:
    """A heat map of numbers in rows, with a colour bar.

    Args:
        ax: where to, or None.
        values: rows of equal length; None is left grey.
        title: above it.
        words: what rows, columns and colours are.
        rows: the number of each row; None counts from 0.
    """
    figure, ax = axes(ax)
    numbers = [[float("nan") if v is None else v for v in row] for row in values]
    ax.set_facecolor("#bbbbbb")
    image = ax.imshow(numbers, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=ax, label=words[2])
    ax.set(title=title, ylabel=words[0], xlabel=words[1])
    _count(ax.xaxis, range(len(numbers[0])))
    _count(ax.yaxis, range(len(numbers)) if rows is None else rows)
    return figure, ax


def _count(axis: Axis, numbers: Sequence[int]) -> None:
    """Whole numbers along an axis: there is nothing between two steps or layers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if len(numbers) <= TICKS:
        axis.set_ticks(range(len(numbers)))
    else:
        axis.set_major_locator(MaxNLocator(TICKS // 2, integer=True))

    def named(place: float, _: int | None) -> str:
        known = place == int(place) and 0 <= place < len(numbers)
        return str(numbers[int(place)]) if known else ""

    axis.set_major_formatter(FuncFormatter(named))


def heat_picture(values: Sequence[Sequence[float | None]], most: float = 1.0) -> Image.Image:
    """The same as a picture: bright is `most`, dark 0, grey unknown; one row a row."""
    from PIL import Image

    rows = [[NONE if v is None else _between(min(1.0, v / most)) for v in row] for row in values]
    picture = Image.new("RGB", (len(rows[0]), len(rows)))
    picture.putdata([pixel for row in rows for pixel in row])
    wide, high = (max(1, SIDE // n) for n in picture.size)
    size = picture.width * wide, picture.height * min(high, wide)
    return picture.resize(size, Image.Resampling.NEAREST)


def _between(share: float) -> tuple[int, int, int]:
    low, high = COLD, HOT
    r, g, b = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return r, g, b


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def figure_html(picture: Image.Image, caption: str) -> str:
    """A picture with a line under it."""
    data = base64.b64encode(png(picture)).decode()
    return (
        '<figure style="margin:.8em 0">'
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(caption)}"'
        ' style="max-width:100%;image-rendering:pixelated">'
        f"<figcaption><small>{html.escape(caption)}</small></figcaption></figure>"
    )


def facts_html(text: str) -> str:
    """What a thing prints, a title and lines of names and facts, as a table."""
    title, *rest = text.splitlines()
    return table_html(title, [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in rest])


def table_html(title: str, rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A small table under a title; everything in it is escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        style = "text-align:left;vertical-align:top"
        inside = (f'<{tag} style="{style}">{html.escape(str(c))}</{tag}>' for c in cells)
        return f"<tr>{''.join(inside)}</tr>"

    heading = f"<thead>{line(head, 'th')}</thead>" if head else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<p><b>{html.escape(title)}</b></p><table>{heading}<tbody>{body}</tbody></table>"
