"""Every kernel against the definition of its operator, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffpatch.eval.bench.kernels.measurements import Measurements, Result
from diffpatch.eval.bench.kernels.watch import Watch
from diffpatch.kernels.block_sparse import chooser
from diffpatch.kernels.block_sparse.backends import ROWS, Backend
from diffpatch.kernels.block_sparse.chooser import Setting
from diffpatch.kernels.block_sparse.operators import OPERATORS
from diffpatch.kernels.block_sparse.trial_blocks import small_blocks
from diffpatch.pipelines.running.loading import DTYPES

SIZES = (64, 128)  # of heads


def check_backends(made: Measurements, dtypes: Sequence[str], sizes: Sequence[int] = SIZES) -> None:
    """Add a row to "checks" for every operator, backend, dtype and head size.

    On edge tiles, masked tiles, queries that see nothing, hidden keys and grouped heads. 8 bits,
    which differ on purpose, are left to the rows that time them.
    """
    for size in sizes:
        for dtype in dtypes:
            for operator in OPERATORS:
                setting = Setting(made.device, DTYPES[dtype], size, (), operator)
                for row in ROWS.values():
                    if operator.name in row.operators and row.name != "reference" and not row.error:
                        _check(made, row, setting, dtype)


def _check(made: Measurements, row: Backend, setting: Setting, dtype: str) -> None:
    about = {"operator": setting.operator.name, "backend": row.name, "dtype": dtype}

    def measure(watch: Watch) -> Result:
        reason = _refusal(row, setting)
        if reason:
            return {"unsupported": reason}
        with watch(f"{row.name}, {setting.operator.name}"):
            reason = chooser.wrong(row, setting)
        return {"failed": reason} if reason else {}

    made.add("checks", about | {"head_dim": setting.size}, measure)


def _refusal(row: Backend, setting: Setting) -> str | None:
    blocks = small_blocks().to(setting.device)
    shape = (1, blocks.num_tokens, 1, setting.size)
    return row.reason(torch.empty(shape, dtype=setting.dtype, device=setting.device), blocks)
