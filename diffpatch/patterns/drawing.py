"""Pictures of a pattern: its tiles, what one query sees, what is kept at each distance in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffpatch.errors import BadParameter, choices
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.patterns.grid import PackedGrid, TokenGrid
from diffpatch.patterns.pattern import BlockPattern

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("tiles", "query", "distance")
SIZE = 880  # pixels that a picture may be wide or high, about
MARGIN, TITLE = 24, 64
WHITE, INK, GREY, EMPTY = (255, 255, 255), (30, 34, 40), (110, 118, 128), (226, 230, 235)
KEPT, MARK = (0, 98, 168), (214, 60, 20)


def draw(
    pattern: BlockPattern, kind: str, *, title: str = "", query: Sequence[int] | None = None
) -> Image.Image:
    """One picture; heads that differ are averaged (tiles, distance), or the first is shown (query).

    Args:
        pattern: the pattern.
        kind: one of `KINDS`.
        title: the first line.
        query: (frame, row, column) for kind "query"; None takes the middle of the grid.

    Raises:
        BadParameter: there is no such kind, the query lies outside of the grid, or the kind needs
            one grid and the pattern is that of a packed sequence.
    """
    if kind not in KINDS:
        raise BadParameter(f"kind={kind!r}: {choices(kind, KINDS)}")
    if kind == "tiles":
        return _tiles(pattern, title)
    return _query(pattern, title, query) if kind == "query" else _distance(pattern, title)


def seen_by(pattern: BlockPattern, token: int, head: int = 0) -> torch.Tensor:
    """bool (S,): the keys that one query of a head sees, in sequence order."""
    b = pattern.blocks.to("cpu")
    first = 0 if b.head_pattern is None else int(b.head_pattern[head])
    place = int((b.order == token).nonzero())
    starts = b.starts.long()
    tile = int(torch.searchsorted(starts, place, right=True)) - 1
    line = first * b.num_tiles + tile
    seen = torch.zeros(b.num_tokens, dtype=torch.bool)
    for entry in range(int(b.row_ptr[line]), int(b.row_ptr[line + 1])):
        begin, end = (int(starts[b.cols[entry] + i]) for i in (0, 1))
        mask = int(b.mask_ids[entry])
        inside = b.masks[mask, place - int(starts[tile]), : end - begin] if mask >= 0 else True
        seen[b.order[begin:end]] = inside
    return seen


def kept_by_distance(pattern: BlockPattern) -> torch.Tensor:
    """float64 (num_frames,): kept fraction of the visual pairs at each distance between frames.

    On an image, of one frame, the distance is that between rows: (height,).
    """
    grid, b = only_grid(pattern), pattern.blocks.to("cpu")
    # -1 for text, which takes no part.
    at = torch.arange(grid.num_tokens) - grid.text_before
    per = grid.height * grid.width if grid.num_frames > 1 else grid.width
    length = grid.num_frames if grid.num_frames > 1 else grid.height
    at = torch.where((at >= 0) & (at < grid.visual_tokens), at // per, -1)
    kept = torch.zeros(length, dtype=torch.float64)
    for (query, key), pairs in _pairs(b, at[b.order], length).items():
        kept[abs(query - key)] += pairs
    distance = torch.arange(length)
    every = torch.where(distance == 0, length, 2 * (length - distance)).double() * per**2
    return kept / every


def _pairs(b: BlockIndex, at: torch.Tensor, length: int) -> dict[tuple[int, int], float]:
    """Kept pairs by the coordinates of query and key, the mean over heads.

    Args:
        b: the index.
        at: int64 (S,), the coordinate of the token at each place of tile order, or -1.
        length: of the axis.
    """
    sizes, row = b.sizes, b.rows
    slot = torch.arange(b.max_tile)
    place = (b.starts[:-1, None].long() + slot).clamp(max=b.num_tokens - 1)
    member = torch.where(slot < sizes[:, None], at[place], -1)  # (N, T)
    total = torch.zeros(length, length, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(member + 1, length + 1)[..., 1:].double()  # (N, T, L)
    counts = one_hot.sum(1)
    full = torch.zeros(b.num_tiles, b.num_tiles, dtype=torch.float64)
    whole = b.mask_ids < 0
    weight = b.share[row // b.num_tiles]
    index = (row[whole] % b.num_tiles, b.cols[whole].long())
    full.index_put_(index, weight[whole], accumulate=True)
    total += counts.T @ full @ counts
    # Partial tiles that have one mask and lie alike along the axis hold the same pairs.
    query, key = member[row[~whole] % b.num_tiles], member[b.cols[~whole].long()]
    alike = torch.cat([b.mask_ids[~whole, None].long(), query, key], 1)
    rows, which = torch.unique(alike, dim=0, return_inverse=True)
    times = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, which, weight[~whole])
    for line, count in zip(rows, times.tolist(), strict=True):
        mask = b.masks[line[0]].double()
        q, k = (
            torch.nn.functional.one_hot(x + 1, length + 1)[:, 1:].double()
            for x in line[1:].split(b.max_tile)
        )
        total += count * (q.T @ mask @ k)
    found = total.nonzero().tolist()
    return {(i, j): float(total[i, j]) for i, j in found}


class Canvas:
    """A white picture with a title, and text where it is needed."""

    def __init__(self, width: int, height: int, title: str, subtitle: str) -> None:
        from PIL import Image, ImageDraw, ImageFont

        fonts = {size: ImageFont.load_default(size) for size in (13, 18)}
        self.fonts: dict[int, Any] = fonts
        wide = max(self.fonts[18].getlength(title), self.fonts[13].getlength(subtitle))
        size = max(width, math.ceil(wide)) + 2 * MARGIN, height + TITLE + 2 * MARGIN
        self.image = Image.new("RGB", size, WHITE)
        self.pen = ImageDraw.Draw(self.image)
        self.text(MARGIN, MARGIN - 8, title, 18)
        self.text(MARGIN, MARGIN + 18, subtitle, 13, GREY)
        self.left, self.top = MARGIN, MARGIN + TITLE

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 13,
        fill: tuple[int, int, int] = INK,
        anchor: str = "la",
    ) -> None:
        """Write a line at a point; the font that comes with Pillow knows no multiplication sign."""
        text = text.replace("×", "x")
        self.pen.text((x, y), text, fill=fill, font=self.fonts[size], anchor=anchor)

    def box(self, x: float, y: float, w: float, h: float, fill: tuple[int, int, int]) -> None:
        """A filled rectangle."""
        self.pen.rectangle((x, y, x + w - 1, y + h - 1), fill=fill)

    def legend(self, y: float, entries: Sequence[tuple[tuple[int, int, int], str]]) -> None:
        """Colours and what they mean, in a row."""
        x: float = self.left
        for colour, text in entries:
            self.box(x, y, 14, 14, colour)
            self.text(x + 20, y - 1, text)
            x += 44 + self.fonts[13].getlength(text)


def tile_picture(pattern: BlockPattern, size: int = SIZE) -> Image.Image:
    """The pairs of tiles alone, about `size` pixels wide: blue is kept, faint in part."""
    from PIL import Image

    maps, heads = pattern.tile_map(), pattern.blocks.head_pattern
    share = maps.mean(0) if heads is None else maps[heads.long()].mean(0)
    empty, kept = torch.tensor(EMPTY).float(), torch.tensor(KEPT).float()
    blend = torch.where((share > 0)[..., None], empty + share[..., None] * (kept - empty), empty)
    # A part, however small, stays visible beside nothing.
    faint = torch.tensor([150, 190, 220]).float()
    blend = torch.where(((share > 0) & (share < 0.3))[..., None], faint, blend)
    picture = Image.fromarray(blend.round().to(torch.uint8).numpy())
    side = len(share) * max(1, size // len(share))
    return picture.resize((side, side), Image.Resampling.NEAREST)


def _tiles(pattern: BlockPattern, title: str) -> Image.Image:
    picture = tile_picture(pattern)
    count, side = pattern.blocks.num_tiles, picture.width
    gutter, scale = 70, side // count
    subtitle = (
        f"{pattern.grid}: {count} × {count} tiles, {pattern.kept:.1%} of the pairs kept;"
        " rows are queries, columns are keys"
    )
    canvas = Canvas(side + gutter, side + 2 * 26 + 14, title, subtitle)
    x, y = canvas.left + gutter, canvas.top + 26
    canvas.image.paste(picture, (x, y))
    for tile, label in _tile_ticks(pattern, max(1, 34 // scale)):
        canvas.text(x - 6, y + tile * scale, label, fill=GREY, anchor="ra")
        canvas.text(x + tile * scale, y - 4, label, fill=GREY, anchor="ls")
    canvas.legend(y + side + 16, [(KEPT, "kept"), ((150, 190, 220), "in part"), (EMPTY, "skipped")])
    return canvas.image


def _tile_ticks(pattern: BlockPattern, apart: int) -> list[tuple[int, str]]:
    """Tiles at which another frame (of an image: row) begins, some way apart, and their labels.

    Of a packed sequence, the first tile of every span.
    """
    grid, b = pattern.grid, pattern.blocks
    if isinstance(grid, PackedGrid):
        begins = torch.searchsorted(b.starts, torch.tensor(grid.starts, dtype=torch.int32)).tolist()
        names = ["text" if isinstance(s, int) else "×".join(map(str, s)) for s in grid.spans]
        return list(zip(begins, names, strict=True))
    video = grid.num_frames > 1
    per = grid.height * grid.width if video else grid.width
    found: list[tuple[int, str]] = []
    last = ""
    for tile, token in enumerate(b.order[b.starts[:-1].long()].tolist()):
        token -= grid.text_before
        inside = 0 <= token < grid.visual_tokens
        label = str(token // per) if inside else "text"
        far = not found or tile - found[-1][0] >= apart * (1 if len(found[-1][1]) < 5 else 2)
        if label != last and far:
            first = inside and not any(text != "text" for _, text in found)
            found.append((tile, f"{'frame' if video else 'row'} {label}" if first else label))
            last = label
    return found


def _query(pattern: BlockPattern, title: str, query: Sequence[int] | None) -> Image.Image:
    grid = only_grid(pattern)
    shape = grid.shape
    chosen = tuple(n // 2 for n in shape) if query is None else tuple(query)
    if len(chosen) != 3 or not all(0 <= i < n for i, n in zip(chosen, shape, strict=True)):
        raise BadParameter(f"query={chosen} must be (frame, row, column) inside of {grid}")
    frame, row, column = chosen
    token = grid.text_before + (frame * grid.height + row) * grid.width + column
    seen = seen_by(pattern, token)
    visual = seen[grid.text_before : grid.text_before + grid.visual_tokens].view(shape)
    columns, scale = arrange(grid)
    rows = -(-grid.num_frames // columns)
    wide, high = grid.width * scale + 12, grid.height * scale + 30
    subtitle = (
        f"frame {frame}, row {row}, column {column} of {grid} sees {int(seen.sum()):,} of"
        f" {len(seen):,} tokens ({float(seen.float().mean()):.1%})"
    )
    canvas = Canvas(columns * wide, rows * high + 24, title, subtitle)
    for number in range(grid.num_frames):
        x = canvas.left + number % columns * wide
        y = canvas.top + number // columns * high
        own = number == frame
        name = f"frame {number}, {float(visual[number].float().mean()):.0%}"
        canvas.text(x, y, name, fill=MARK if own else GREY)
        _paste(canvas, visual[number], x, y + 18, scale)
        if own:
            box = x - 3, y + 15, x + grid.width * scale + 2, y + 18 + grid.height * scale + 2
            canvas.pen.rectangle(box, outline=MARK, width=2)
            dot = max(scale, 5)
            middle = x + (column + 0.5) * scale, y + 18 + (row + 0.5) * scale
            canvas.box(middle[0] - dot / 2, middle[1] - dot / 2, dot, dot, MARK)
    text = "; all text" if grid.num_tokens > grid.visual_tokens else ""
    legend = [(MARK, "the query"), (KEPT, "seen" + text), (EMPTY, "not seen")]
    canvas.legend(canvas.top + rows * high + 8, legend)
    return canvas.image


def only_grid(pattern: BlockPattern) -> TokenGrid:
    if isinstance(pattern.grid, PackedGrid):
        raise BadParameter(
            f"{pattern.grid} has {len(pattern.grid.grids)} grids and this picture shows one: draw"
            " the kind 'tiles', or the pattern of one of the grids"
        )
    return pattern.grid


def arrange(grid: TokenGrid) -> tuple[int, int]:
    """Frames in a row and pixels of a token that fill the picture best."""

    def scale(columns: int) -> int:
        rows = -(-grid.num_frames // columns)
        across = (SIZE // columns - 12) // grid.width
        return max(2, min(across, (SIZE // rows - 30) // grid.height, 24))

    columns = max(range(1, grid.num_frames + 1), key=lambda n: (scale(n), n * grid.width < SIZE))
    return columns, scale(columns)


def _paste(canvas: Canvas, seen: torch.Tensor, x: int, y: int, scale: int) -> None:
    """A frame of tokens, blue where seen, with a hair between tokens that are large enough."""
    from PIL import Image

    colours = torch.where(seen[..., None], torch.tensor(KEPT), torch.tensor(EMPTY))
    picture = Image.fromarray(colours.to(torch.uint8).numpy())
    size = seen.shape[1] * scale, seen.shape[0] * scale
    canvas.image.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
    if scale >= 6:
        for i in range(1, seen.shape[1]):
            canvas.pen.line((x + i * scale, y, x + i * scale, y + size[1] - 1), fill=WHITE)
        for i in range(1, seen.shape[0]):
            canvas.pen.line((x, y + i * scale, x + size[0] - 1, y + i * scale), fill=WHITE)


def _distance(pattern: BlockPattern, title: str) -> Image.Image:
    kept = kept_by_distance(pattern).tolist()
    what = "frames" if only_grid(pattern).num_frames > 1 else "rows"
    high, gutter = 360, 56
    step = max(8, min(64, (SIZE - gutter) // len(kept)))
    subtitle = (
        f"{pattern.grid}: kept share of the pairs of tokens by the distance between their {what};"
        f" {pattern.kept:.1%} in all"
    )
    canvas = Canvas(gutter + step * len(kept), high + 58, title, subtitle)
    x, y = canvas.left + gutter, canvas.top + 10
    for percent in range(0, 101, 25):
        line = y + high * (1 - percent / 100)
        canvas.pen.line((x, line, x + step * len(kept), line), fill=EMPTY)
        canvas.text(x - 8, line, f"{percent} %", fill=GREY, anchor="rm")
    every = max(1, math.ceil(30 / step))
    for distance, share in enumerate(kept):
        top = y + high * (1 - share)
        canvas.box(x + distance * step + 1, top, step - 2, max(1, y + high - top), KEPT)
        if distance % every == 0:
            middle = x + (distance + 0.5) * step
            canvas.text(middle, y + high + 6, str(distance), fill=GREY, anchor="ma")
            label = f"{share:.0%}" if share >= 0.01 or share == 0 else "<1%"
            canvas.text(middle, top - 4, label, anchor="ms")
    canvas.text(x, y + high + 28, f"distance between {what}")
    return canvas.image
