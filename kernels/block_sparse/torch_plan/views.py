"""What the queries of a pattern see: rows and keys that are alike, found in the block index.

Query rows are told apart by *parts*, sets that no group parts, keys by *classes*. Where a pattern
repeats, over frames say, a part is all rows that see exactly the same keys, in whatever tile, and a
class all keys that are seen by the same rows. Where it does not, a part is a tile, and a class is
the keys of one tile that every query tile sees in the same way.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from diffpatch.kernels.blocks import BlockIndex

MAX_KINDS = 4096  # parts, or classes, beyond which rows that see the same are not sought
MAX_SEEN = 1 << 26  # (tile, key) pairs up to which keys of a tile are told apart


class Kinds:
    """The places of tile order, sorted into kinds.

    Attributes:
        of_place: int64 (S,), the kind of each place; every number up to the largest is used.
        sizes: (K,), how many places are of each kind.
    """

    def __init__(self, of_place: np.ndarray) -> None:
        self.of_place = of_place
        self.sizes = np.bincount(of_place)

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.argsort(self.of_place, kind="stable")

    @cached_property
    def _ends(self) -> np.ndarray:
        return self.sizes.cumsum()

    @cached_property
    def first(self) -> np.ndarray:
        """The first place of each kind."""
        return self._sorted[self._ends - self.sizes]

    def places(self, kinds: np.ndarray) -> np.ndarray:
        """The places of some kinds, one kind after the other."""
        ends, sizes = self._ends, self.sizes
        return np.concatenate([self._sorted[ends[i] - sizes[i] : ends[i]] for i in kinds])


class Views:
    """What the query rows of one pattern see.

    Attributes:
        starts: (N + 1,), the first place of each tile.
        sizes: (N,), its tokens.
        ids: int64 (N, N), rows of `masks`, or NOTHING or EVERYTHING: [query tile, key tile].
        exact: whether the rows of a part see the same.
        parts: of the query rows.
        classes: of the keys.
        sees: bool (P, C), whether any row of the part sees the class.
        sees_all: bool (P, C), whether all do.
    """

    def __init__(self, blocks: BlockIndex, pattern: int, table: torch.Tensor) -> None:
        self.starts = blocks.starts.numpy()
        self.sizes = np.diff(self.starts)
        self.ids = blocks.derived("mask map", BlockIndex.mask_map)[pattern].numpy()
        masks = table.cpu().numpy()
        parts = _alike(self.ids, masks, self.sizes)
        classes = None if parts is None else _alike(self.ids.T, masks.swapaxes(1, 2), self.sizes)
        self.exact = classes is not None
        if parts is None or classes is None:
            self._by_tiles(masks.sum(1, dtype=np.float32))
            return
        self.parts, self.classes = Kinds(parts), Kinds(classes)
        (tile, row), (key_tile, key) = (self.within(x.first) for x in (self.parts, self.classes))
        self.sees = self.sees_all = masks[self.ids[np.ix_(tile, key_tile)], row[:, None], key]

    def within(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tiles that places lie in, and where in these."""
        tile = np.searchsorted(self.starts, places, side="right") - 1
        return tile, places - self.starts[tile]

    def _by_tiles(self, seen_by: np.ndarray) -> None:
        """Tiles as parts; classes by how many queries see each key of a mask (M + 2, T)."""
        self.parts = Kinds(np.repeat(np.arange(len(self.sizes)), self.sizes))
        if self.sizes.shape[0] * int(self.starts[-1]) > MAX_SEEN:
            seen_by[:-2] = 0.5  # tell no keys of a tile apart: some are seen, not by all
        tile_of: list[int] = []
        column_of: list[int] = []
        class_of: list[np.ndarray] = []
        for tile, size in enumerate(self.sizes):
            seen = seen_by[np.unique(self.ids[:, tile]), :size]
            _, first, inverse = np.unique(seen, axis=1, return_index=True, return_inverse=True)
            class_of.append(inverse.reshape(-1) + len(tile_of))
            tile_of += [tile] * len(first)
            column_of += first.tolist()
        self.classes = Kinds(np.concatenate(class_of))
        count = seen_by[self.ids[:, tile_of], column_of]
        self.sees = count > 0
        self.sees_all = count >= self.sizes[:, None]

    def count(self, classes: np.ndarray) -> np.ndarray:
        """How many keys sets of classes have: bool (..., C) -> (...)."""
        keys: np.ndarray = classes.astype(np.float32) @ self.classes.sizes.astype(np.float32)
        return keys

    def common(self, parts: np.ndarray) -> np.ndarray:
        """bool (C,), the classes that every row of some parts sees."""
        seen: np.ndarray = self.sees_all[parts].all(0)
        return seen

    def seen(self, parts: np.ndarray, without: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
        """bool (C,), the classes that any row of the parts sees, and whether some rows do not.

        Args:
            parts: of the query rows.
            without: bool (C,), classes to leave out.
        """
        sees = self.sees[parts].any(0)
        if without is not None:
            sees &= ~without
        return sees, not bool(self.sees_all[np.ix_(parts, sees)].all())


def _alike(ids: np.ndarray, masks: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
    """Which rows see the same keys: the kind of each, (S,); None if there are too many kinds.

    Args:
        ids: (N, N), rows of `masks`: [query tile, key tile].
        masks: bool (M + 2, T, T).
        sizes: (N,), rows of each tile.
    """
    packed = np.packbits(masks, axis=2)
    whole = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[2])))
    _, row_ids = np.unique(whole, return_inverse=True)
    row_ids = row_ids.reshape(masks.shape[:2]).astype(np.int32)
    numbers: dict[bytes, int] = {}
    of_tile: dict[tuple[bytes, int], np.ndarray] = {}
    found = []
    for line, size in zip(ids, sizes, strict=True):
        name = line.tobytes(), int(size)
        if name not in of_tile:
            rows = np.ascontiguousarray(row_ids[line].T)
            kinds = [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows[:size]]
            of_tile[name] = np.array(kinds)
            if len(numbers) > MAX_KINDS:
                return None
        found.append(of_tile[name])
    return np.concatenate(found)
