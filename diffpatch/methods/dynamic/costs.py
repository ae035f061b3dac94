"""What a choice of tiles costs, counted before anything runs."""

from __future__ import annotations

from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.kernels.pieces import cut
from diffpatch.kernels.selection.api import MAPS, MAX_PAIRS
from diffpatch.methods.selection import Levels
from diffpatch.patterns.pattern import BlockPattern

PRODUCTS = 3  # of the size of a map: mean scores, spread of scores, mean output


def work(pattern: BlockPattern, strip: int, levels: Levels, backend: str, chosen: bool) -> Work:
    """One call of one head: exact strips, virtual tokens with their correction, and the choice
    where it is made anew.

    Strips count with their mean length, which makes it exact where all are alike.

    Args:
        pattern: all pairs of tiles.
        strip: keys of a strip.
        levels: what is computed how.
        backend: "triton" computes everything at once, others gather the keys of every row.
        chosen: whether the call chooses.
    """
    blocks = pattern.blocks.to("cpu")
    table, tokens = tile_table(blocks, strip), blocks.num_tokens
    rows = levels.counts[0].rows.double().mean(0)  # strips of each tile
    mean = tokens / len(table.strips)
    pairs = float(rows @ blocks.sizes.double()) * mean
    pieces = sum(len(cut(blocks, size, strip)) for size in levels.sizes[1:])
    pools = len(levels.sizes) - 1
    maps = PRODUCTS * table.num_tiles * len(table.strips) if chosen else 0
    means = table.num_tiles * tokens if levels.corrected else 0
    total = Work(
        calls=1 + pools,
        keys=float(tokens),
        rows=2.0 * tokens * (1 + pools),
        virtual=float(tokens * pieces + maps + means),
        pooled=float(tokens * (pools + 3 * chosen)),
    )
    if backend == "triton":
        return total + Work(pairs=pairs)
    return total + Work(keys=float(rows.sum()) * mean, pairs_of_few=pairs)


def scratch(pattern: BlockPattern, strip: int, heads: int) -> int:
    """Bytes of the fp32 maps that are held while one batch entry chooses."""
    table = tile_table(pattern.blocks, strip)
    pairs = table.num_tiles * len(table.strips)
    return 4 * MAPS * pairs * min(heads, max(1, MAX_PAIRS // pairs))
