"""Every backend of every operator: one row each, and one chooser for all of them.

To add a backend, add its row to `ROWS`. Nothing else asks for one by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch

from diffpatch.kernels.block_sparse import backend_reasons as reasons
from diffpatch.kernels.block_sparse.chooser import (
    Ranking,
    chooser,
    comparable,
    ranking_of,
    setting_of,
    words_of,
)
from diffpatch.kernels.block_sparse.operators import (
    ACTIVE_TILES,
    BLOCK_SPARSE,
    LINEAR,
    SELECTION,
    VIRTUAL_TOKENS,
    Operator,
)
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.errors import BackendUnavailable, BadParameter, choices

Result = TypeVar("Result")
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Reason = Callable[[torch.Tensor, BlockIndex], str | None]  # why not with these queries
GradientReason = Callable[[torch.Tensor], str | None]  # why without gradients

# On normal noise, heads of 64 and 128, by `torch-int8` and `torch-fp8`, which round as kernels do.
INT8_ERROR = "queries and keys are rounded to 8 bits: about 1 % relative error of an output"
FP8_ERROR = (
    "queries and keys are rounded to 8 bits, weights and values to 8-bit floats: about 4 % relative"
    " error of an output"
)

_FOLDER = "diffpatch.kernels.block_sparse"


class Backend(NamedTuple):
    """One way to compute block-sparse attention, and what else is computed in the same way.

    Attributes:
        name: what a caller asks for.
        function: "module:name" of its block-sparse attention, loaded at the first call.
        work: "module:name" of what counts the `Work` of a call for a block index.
        reason: why it cannot compute a call with these queries, or None.
        operators: the names of the operators it computes, each with why it has no gradients for
            such queries, or None where it has.
        beside: what other operators are asked for where this computes the exact part of a call.
        unasked: whether "auto" may take it where nothing was measured.
        measured: whether "auto" may take it where it is right and fastest (see `chooser`).
        error: what it costs in accuracy, in words; nothing where only usual rounding differs.
    """

    name: str
    function: str
    work: str
    reason: Reason
    operators: Mapping[str, GradientReason]
    beside: str
    unasked: bool = False
    measured: bool = False
    error: str = ""

    @property
    def attend(self) -> Attend:
        """Its block-sparse attention: q, k, v, blocks, scale, key_mask, return_lse -> out, LSE."""
        attend: Attend = _loaded(self.function)
        return attend

    @property
    def count(self) -> Callable[[BlockIndex], Any]:
        """What it does for a block index, see `work`."""
        count: Callable[[BlockIndex], Any] = _loaded(self.work)
        return count


def _loaded(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(f"{_FOLDER}.{module}"), name)


_EVERY = (BLOCK_SPARSE.name, ACTIVE_TILES.name, VIRTUAL_TOKENS.name, SELECTION.name, LINEAR.name)

# Of those that "auto" may take, the first one that can.
ROWS = {
    row.name: row
    for row in (
        Backend(
            "triton",
            "gpu.triton_backward:attend_with_gradients",
            "work:triton_work",
            reasons.triton,
            dict.fromkeys(_EVERY, reasons.no_gradients)
            | {BLOCK_SPARSE.name: reasons.triton_gradients},
            beside="auto",
            unasked=True,
            measured=True,
        ),
        Backend(
            "triton-int8",
            "gpu.triton_forward:attend_triton_int8",
            "work:triton_work",
            reasons.triton_int8,
            {BLOCK_SPARSE.name: reasons.no_gradients_in_8_bits},
            beside="auto",
            error=INT8_ERROR,
        ),
        Backend(
            "triton-fp8",
            "gpu.triton_forward:attend_triton_fp8",
            "work:triton_work",
            reasons.triton_fp8,
            {BLOCK_SPARSE.name: reasons.no_gradients_in_8_bits},
            beside="auto",
            error=FP8_ERROR,
        ),
        Backend(
            "gluon",
            "gpu.gluon_forward:attend_gluon",
            "work:triton_work",
            reasons.gluon,
            {BLOCK_SPARSE.name: reasons.no_gradients},
            beside="auto",
            measured=True,
        ),
        Backend(
            "flex",
            "flex.attend:attend_flex",
            "flex.layout:flex_work",
            reasons.flex,
            {BLOCK_SPARSE.name: reasons.flex_gradients},
            beside="auto",
            measured=True,
        ),
        Backend(
            "torch",
            "torch_plan.attend:attend_torch",
            "work:torch_work",
            reasons.anywhere,
            dict.fromkeys(_EVERY, reasons.differentiable),
            beside="torch",
            unasked=True,
            measured=True,
        ),
        Backend(
            "torch-int8",
            "int8.reference:attend_torch_int8",
            "work:torch_work",
            reasons.anywhere,
            {BLOCK_SPARSE.name: reasons.no_gradients_in_8_bits},
            beside="torch",
            error=INT8_ERROR,
        ),
        Backend(
            "torch-fp8",
            "fp8.reference:attend_torch_fp8",
            "work:torch_work",
            reasons.torch_fp8,
            {BLOCK_SPARSE.name: reasons.no_gradients_in_8_bits},
            beside="torch",
            error=FP8_ERROR,
        ),
        Backend(
            "reference",
            "reference:attend_reference",
            "work:reference_work",
            reasons.anywhere,
            dict.fromkeys(_EVERY, reasons.differentiable),
            beside="reference",
        ),
    )
}
BACKENDS = ("auto", *ROWS)
LAST = "torch"  # runs everywhere: after it "auto" has nothing left


def check_backend(backend: str) -> None:
    """Refuse a name that is not in `BACKENDS`.

    Raises:
        BadParameter: names the nearest.
    """
    if backend not in BACKENDS:
        raise BadParameter(f"backend is {backend!r}: {choices(str(backend), BACKENDS)}")


def unsupported_reason(q: torch.Tensor, blocks: BlockIndex, backend: str) -> str | None:
    """Why a backend cannot attend with these queries, so that a caller can fall back and say so.

    Args:
        q: the queries, (B, S, H, D).
        blocks: which pairs to keep.
        backend: one of `BACKENDS`; "auto" always finds one.

    Returns:
        The reason in words, or None if the backend can.

    Raises:
        BadParameter: there is no such backend.
    """
    check_backend(backend)
    return None if backend == "auto" else ROWS[backend].reason(q, blocks)


def choose_backend(
    operator: Operator, backend: str, blocks: BlockIndex, *inputs: torch.Tensor
) -> str:
    """The backend that a call of an operator runs on: one of `BACKENDS`, not "auto".

    Args:
        operator: what is computed.
        backend: what was asked for, one of `BACKENDS`.
        blocks: the tiles of the call, and the pairs of them that it visits.
        inputs: the tensors of the call, (B, S, heads, D) each.

    Raises:
        BadParameter: there is no such backend.
        BackendUnavailable: the backend asked for cannot run this call; the message says why.
    """
    check_backend(backend)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if backend != "auto":
        reason = _reason(ROWS[backend], operator, blocks, inputs, gradients)
        if reason:
            raise BackendUnavailable(
                f"backend {backend!r} cannot run: {reason}; use backend='auto'."
            )
        return backend
    if operator.fp32_by_torch and any(x.dtype.itemsize > 2 for x in inputs):
        return "torch"
    rows = _candidates(operator)
    able = [row for row in rows if not _reason(row, operator, blocks, inputs, gradients)]
    found = ranking_of(inputs[0], rows, operator) if len(able) > 1 else None
    if chooser().refused:
        failing = chooser().refused.get(setting_of(inputs[0], operator), {})
        able = [row for row in able if row.name not in failing]
    order = [] if found is None else found.order(able)
    return (order or [row for row in able if row.unasked])[0].name  # torch can always


def _candidates(operator: Operator) -> list[Backend]:
    """What "auto" takes one of."""
    rows = (row for row in ROWS.values() if row.unasked or row.measured)
    return [row for row in rows if operator.name in row.operators]


def run(
    operator: Operator,
    backend: str,
    blocks: BlockIndex,
    inputs: tuple[torch.Tensor, ...],
    compute: Callable[[str], Result],
) -> tuple[Result, str]:
    """Compute a call, and where "auto" took a kernel that fails, go on with the next.

    What has failed is not taken again in this process with the device, dtype and head size of the
    call; one warning says so, and the report why. Memory that runs out is not a kernel's fault: the
    others take more of it.

    Args:
        operator: what is computed.
        backend: what was asked for, one of `BACKENDS`.
        blocks: the tiles of the call.
        inputs: the tensors of the call, (B, S, heads, D) each.
        compute: the name of a backend -> what it computes.

    Returns:
        The result, and the backend that computed it.

    Raises:
        BadParameter, BackendUnavailable: as `choose_backend`.
        Exception: what the backend raises that was asked for by name, or the last one of "auto".
    """
    while True:
        used = choose_backend(operator, backend, blocks, *inputs)
        try:
            return compute(used), used
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: of a compiler, of the driver, of a launch
            if backend != "auto" or used == LAST:
                raise
            chooser().take_out(setting_of(inputs[0], operator), used, words_of(error))


def passed_over(q: torch.Tensor) -> Mapping[str, str]:
    """The backends that "auto" does not take here because they are wrong or fail, each with why."""
    found: dict[str, str] = {}
    for setting, refused in list(chooser().refused.items()):
        if (setting.device, setting.dtype, setting.size) != (q.device, q.dtype, q.shape[-1]):
            continue
        for name, reason in refused.items():
            if setting.operator is not BLOCK_SPARSE:
                reason = f"for {setting.operator.words}: {reason}"
            found[name] = f"{found[name]}; {reason}" if name in found else reason
    return found


def compare_again(device: torch.device, dtype: torch.dtype, size: int) -> Ranking | None:
    """Compare the backends for a device, a dtype and a head size, whatever was found before.

    Returns:
        What was found, and is used from now on; None where nothing is compared (see `chooser`).
    """
    q = torch.empty(1, 1, 1, size, dtype=dtype, device=device)
    if not comparable(q):
        return None
    return chooser().ranking(setting_of(q), _candidates(BLOCK_SPARSE), redo=True)


def beside(backend: str) -> str:
    """What the other operators of a call are asked for, where this backend computes its exact part.

    Kernels on GPUs leave it to "auto", as not all of them exist for every operator.
    """
    return backend if backend == "auto" else ROWS[backend].beside


def _reason(
    row: Backend,
    operator: Operator,
    blocks: BlockIndex,
    inputs: tuple[torch.Tensor, ...],
    gradients: bool,
) -> str | None:
    if operator.name not in row.operators:
        lacking = "has no 8 bits for" if row.error else "does not compute"
        return f"it {lacking} {operator.words}"
    reason = row.operators[operator.name](inputs[0]) if gradients else None
    found = (row.reason(x, blocks) for x in inputs)
    return reason or next((x for x in found if x), None)
