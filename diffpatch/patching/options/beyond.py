"""What to say where a run goes beyond the size that a model was trained at."""

from __future__ import annotations

from diffpatch.patterns.grid import Grid, PackedGrid
from diffpatch.pipelines.families.info import Trained

AREA = 1.1  # of the trained one; models know several aspect ratios of about one area


def beyond(trained: Trained | None, grid: Grid, method: str) -> str | None:
    """What goes beyond training on a grid and which method is made for that; None if nothing does.

    Args:
        trained: what the model was trained at, None if that is not known.
        grid: of the run; of a packed sequence, its last grid is what it makes.
        method: the name of the method in use; one that is made for it needs no advice.
    """
    if trained is None:
        return None
    grid = grid.grids[-1] if isinstance(grid, PackedGrid) else grid
    said, used = [], method.split("+")
    if grid.num_frames > trained.num_frames and "longer" not in used:
        said.append(
            f"{grid.num_frames} frames of tokens, and the model was trained at"
            f" {trained.num_frames}: clips may repeat themselves, see method 'longer'"
        )
    height, width = trained.size or (grid.height, grid.width)
    if grid.height * grid.width > AREA * height * width and "larger" not in used:
        said.append(
            f"frames of {grid.height}×{grid.width} tokens, and the model was trained at"
            f" {height}×{width}: pictures may show things twice, see method 'larger'"
        )
    return "; ".join(said) or None
