"""Which tiles Radial Attention keeps, by the published rule and by the rule on tiles.

Names: F frames of s tokens; d is the distance between two frames.
"""

from __future__ import annotations

import itertools
import math

import torch

from diffpatch.methods import axis
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.tiles import Cuts, Tiling, choose_tile, even_cuts

BLOCK = 128  # the published kernel's block, also the smallest half-window


def half_window(distance: int, frame_tokens: int, decay: float, floor: int = BLOCK) -> int | None:
    """Tokens on either side in raster order between frames `distance` apart; None where thinned
    out.

    The measured code's rule: the width is decay · 2^(⌊log2 s⌋ − ⌊log2 d⌋), at least `floor`; once
    the undecayed width falls below a block, only every (block / width)-th frame pair is kept at
    all.
    """
    if distance <= 1:
        return frame_tokens - 1
    width = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
    if width < floor and distance % int(floor / width):
        return None
    return min(frame_tokens - 1, int(max(decay * width, floor)))


def budget(grid: TokenGrid, decay: float, sink: bool, floor: int = BLOCK) -> float:
    """Kept fraction of the visual pairs under the bands, before any rounding to blocks."""
    frames, s = grid.num_frames, grid.frame_tokens
    total = 0.0
    for i, j in itertools.product(range(frames), repeat=2):
        total += 1.0 if sink and j == 0 else _band(abs(i - j), s, decay, floor)
    return total / frames**2


def _band(distance: int, s: int, decay: float, floor: int) -> float:
    """Fraction of the pairs of two frames inside the band."""
    w = half_window(distance, s, decay, floor)
    return 0.0 if w is None else (s * (2 * w + 1) - w * (w + 1)) / s**2


def published(grid: TokenGrid, decay: float, sink: bool) -> torch.Tensor:
    """bool (N, N) over blocks of 128 raster tokens: the measured masks, at any token count.

    Each pair of frames marks the blocks it covers well enough ("strict shrink": of the columns with
    any kept row, more than 0.6 have more than a third of the block's rows), and the marks of all
    frame pairs are joined. A block meets few frames, so the count of such columns has a closed form
    for each (piece of query block in one frame, piece of key block in one frame).
    """
    frames, s, n = grid.num_frames, grid.frame_tokens, grid.visual_tokens
    borders = sorted({*range(0, n, BLOCK), *range(0, n, s), n})
    start, end = torch.tensor(borders[:-1]), torch.tensor(borders[1:]) - 1
    block, frame = start // BLOCK, start // s
    low, high = start - frame * s, end - frame * s  # in-frame indices, inclusive
    rows = torch.full((frames,), -1)
    for d in range(frames):
        w = half_window(d, s, decay)
        rows[d] = -1 if w is None else w
    blocks = math.ceil(n / BLOCK)
    keep = torch.zeros(blocks, blocks, dtype=torch.int32)
    height = torch.tensor([min(BLOCK, n - b * BLOCK) for b in range(blocks)])
    for piece in torch.arange(len(start)).split(1024):  # bounds memory at a million tokens
        window = rows[(frame[piece, None] - frame).abs()]
        if sink:
            window[:, frame == 0] = s - 1
        third = (height[block[piece]] // 3 + 1)[:, None]
        args = (low[piece, None], high[piece, None], low, high, window)
        dense, touched = _columns(*args, third), _columns(*args, torch.ones_like(third))
        marks = (dense > 0.6 * touched) & (window >= 0)
        index = (block[piece, None] * blocks + block).flatten()
        keep.view(-1).index_add_(0, index, marks.flatten().int())
    return (keep > 0).logical_or_(torch.eye(blocks, dtype=torch.bool))


def _columns(
    a: torch.Tensor,
    b: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    w: torch.Tensor,
    c: torch.Tensor,
) -> torch.Tensor:
    """How many columns of [lo, hi] have at least c rows of [a, b] within w of them."""
    count = torch.minimum(hi, b + w - c + 1) - torch.maximum(lo, a - w + c - 1) + 1
    return count.clamp(min=0) * ((c <= b - a + 1) & (c <= 2 * w + 1))


def tiles(
    grid: TokenGrid, decay: float, sink: bool, kept: float | None = None
) -> tuple[Tiling, torch.Tensor]:
    """A budget spent on 2-D windows of whole tiles, shifted inwards at the edges.

    Queries share windows in groups of up to 2×2 tiles of a slab of frames. For slabs d frames apart
    the window covers the fraction of the frame that the published band covers at d, times one
    factor, found by bisection, that makes the kept total meet the budget: the share `kept` of
    the visual pairs, or where that is None what the published bands keep.

    Returns:
        The tiling and bool (V, V) over its visual tiles.
    """
    s = grid.frame_tokens
    floor = min(BLOCK, max(1, s // 8))  # small frames would be dense under the published floor
    # Small frames take several frames into a tile, so that a frame still has tiles to choose from.
    depth = 1 if s >= 8 * BLOCK else min(4, 8 * BLOCK // s)
    tile = choose_tile(grid.shape, limits=(depth, -(-grid.height // 4), -(-grid.width // 2)))
    time = _time_cuts(grid.num_frames, tile[0], sink)
    tiling = Tiling(grid, (time, even_cuts(grid.height, tile[1]), even_cuts(grid.width, tile[2])))
    slabs, rows, columns = tiling.counts
    centre = torch.tensor(time).double().unfold(0, 2, 1).mean(-1)
    distance = (centre[:, None] - centre).abs().floor().long()
    bands = [_band(d, s, decay, floor) for d in range(grid.num_frames)]
    share = torch.tensor(bands, dtype=torch.float32).double()[distance]
    if sink:
        share[:, 0] = 1.0
    target = budget(grid, decay, sink, floor) if kept is None else kept
    low, high = 0.02, 64.0
    # Windows that pairs of tiles share run faster, if the budget does not want smaller ones.
    windows = _Windows(tiling, smallest=2)
    if windows.kept(windows.choose(share, low)) > target:
        windows = _Windows(tiling, smallest=1)
    if kept is not None and windows.kept(windows.choose(share, low)) > target:
        share = share.clamp(max=0.999)  # not whole any more: near frames shrink with the others
    for _ in range(24):
        middle = math.sqrt(low * high)
        over = windows.kept(windows.choose(share, middle)) >= target
        low, high = (low, middle) if over else (middle, high)
    chosen, larger = windows.choose(share, low), windows.choose(share, high)
    # Many slabs grow at one factor; a kept that was asked for is met by growing some of them.
    for d in range(grid.num_frames if kept is not None else 0):
        trial = torch.where(distance == d, larger, chosen)
        chosen = trial if windows.kept(trial) <= target else chosen
    keep = windows.keep(chosen)
    return tiling, keep.reshape(slabs * rows * columns, -1)


def _time_cuts(frames: int, depth: int, sink: bool) -> Cuts:
    """Slabs of frames; with a sink the first frame stands alone, so that it alone is kept whole."""
    if not sink or depth == 1 or frames < 3:
        return even_cuts(frames, depth)
    return (0, *(1 + c for c in even_cuts(frames - 1, depth)))


class _Windows:
    """Inward-shifted windows of whole tiles over (rows, columns), a size for each pair of slabs."""

    def __init__(self, tiling: Tiling, smallest: int) -> None:
        _, self.rows, self.columns = tiling.counts
        self.time_size, row_size, column_size = (
            torch.tensor(c).diff().double() for c in tiling.cuts
        )
        self.row_keep = [axis.tile_windows(self.rows, n) for n in range(1, self.rows + 1)]
        self.column_keep = [axis.tile_windows(self.columns, n) for n in range(1, self.columns + 1)]
        row_kept = [_weighted(k, row_size) for k in self.row_keep]
        column_kept = [_weighted(k, column_size) for k in self.column_keep]
        # Candidate windows by area, of moderate aspect; area[i] is the kept fraction of a slab
        # pair.
        self.sizes = [
            (r, c)
            for r, c in itertools.product(range(self.rows), range(self.columns))
            if all(
                n < axis.PAIRED or size + 1 >= smallest
                for n, size in ((self.rows, r), (self.columns, c))
            )
            and (
                abs(math.log((r + 1) / self.rows * self.columns / (c + 1))) <= math.log(2.01)
                or min(self.rows, self.columns) <= 2
            )
        ]
        self.sizes.sort(key=lambda rc: row_kept[rc[0]] * column_kept[rc[1]])
        area = [row_kept[r] * column_kept[c] for r, c in self.sizes]
        self.area = torch.tensor(area, dtype=torch.float32)

    def choose(self, share: torch.Tensor, factor: float) -> torch.Tensor:
        """int64, the candidate nearest to share × factor; whole stays whole, thinned out is -1."""
        nearest = ((share * factor)[..., None] - self.area).abs().argmin(-1)
        nearest[share >= 1] = len(self.sizes) - 1
        nearest[share == 0] = -1
        return nearest

    def kept(self, chosen: torch.Tensor) -> float:
        """Kept fraction of all visual pairs."""
        area = torch.where(chosen >= 0, self.area[chosen], 0.0)
        weight = self.time_size[:, None] * self.time_size
        return float((area * weight).sum() / weight.sum())

    def keep(self, chosen: torch.Tensor) -> torch.Tensor:
        """bool (slabs, rows, columns, slabs, rows, columns)."""
        slabs = chosen.shape[0]
        plane = torch.stack(
            [
                self.row_keep[r][:, None, :, None] & self.column_keep[c][None, :, None, :]
                for r, c in self.sizes
            ]
        )
        shape = slabs, self.rows, self.columns, slabs, self.rows, self.columns
        out = torch.zeros(shape, dtype=torch.bool)
        for i, j in itertools.product(range(slabs), repeat=2):
            if chosen[i, j] >= 0:
                out[i, :, :, j] = plane[chosen[i, j]]
        return out


def _weighted(keep: torch.Tensor, size: torch.Tensor) -> float:
    total: torch.Tensor = size @ keep.double() @ size / size.sum() ** 2
    return float(total)
