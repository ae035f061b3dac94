"""What asks for a backend: every operator, and the call on which its backends are compared."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch

from diffpatch.kernels.blocks import BlockIndex

if TYPE_CHECKING:
    from diffpatch.kernels.block_sparse.backends import Backend

Results = tuple[torch.Tensor, ...]  # an output, its log-sum-exp, and other outputs


class Inputs(NamedTuple):
    """Of a trial: q (B, S, H, D), k and v (B, S, K, D), the tiles, and bool (B, S) or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: BlockIndex
    key_mask: torch.Tensor | None

    @property
    def scale(self) -> float:
        """The factor on q·k."""
        return float(self.q.shape[-1] ** -0.5)


class Operator(NamedTuple):
    """What asks for a backend.

    Attributes:
        name: what the rows call it.
        words: what it computes.
        trial: "folder.module:name" in kernels of the call that backends are compared on: told the
            backend, or None for the definition, and the `Inputs`, it returns `Results`.
        fp32_by_torch: whether "auto" leaves fp32 to torch: without tensor cores cuBLAS, which torch
            uses, is as fast as a kernel of ours.
    """

    name: str
    words: str
    trial: str
    fp32_by_torch: bool = False

    def tried(self, backend: Backend | None, inputs: Inputs) -> Results:
        """What a backend makes of the trial, or what the definition says."""
        module, _, name = self.trial.partition(":")
        results: Results = getattr(import_module(f"diffpatch.kernels.{module}"), name)(
            backend, inputs
        )
        return results


BLOCK_SPARSE = Operator("block_sparse", "block-sparse attention", "block_sparse.trial:trial")
ACTIVE_TILES = Operator(
    "active_tiles",
    "attention to tiles that change from head to head",
    "active_tiles.trial:trial",
)
VIRTUAL_TOKENS = Operator(
    "virtual_tokens", "virtual tokens", "virtual_tokens.trial:trial", fp32_by_torch=True
)
SELECTION = Operator("selection", "the choice of tiles", "selection.trial:trial")
LINEAR = Operator("linear", "linear attention", "linear.trial:trial", fp32_by_torch=True)
OPERATORS = (BLOCK_SPARSE, ACTIVE_TILES, VIRTUAL_TOKENS, SELECTION, LINEAR)
