"""Every operator has its backends checked before "auto" takes one, and loses one that fails later.

A CPU stands for the GPU, and PyTorch for its kernels, with mistakes put in.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import diffpatch
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles import torch_impl as active_torch
from diffpatch.kernels.active_tiles import triton_impl as active_triton
from diffpatch.kernels.block_sparse import api as block_sparse
from diffpatch.kernels.block_sparse import backends, chooser, operators
from diffpatch.kernels.block_sparse.backends import choose_backend, passed_over
from diffpatch.kernels.block_sparse.chooser import Chooser, Setting
from diffpatch.kernels.block_sparse.gpu import triton_backward, triton_forward
from diffpatch.kernels.block_sparse.operators import Operator
from diffpatch.kernels.block_sparse.torch_plan.attend import attend_torch
from diffpatch.kernels.block_sparse.trial_blocks import small_blocks
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support
from diffpatch.kernels.linear import api as linear
from diffpatch.kernels.linear import triton_impl as linear_triton
from diffpatch.kernels.pieces import cut
from diffpatch.kernels.selection import choose as choosing
from diffpatch.kernels.selection import triton_impl as selection_triton
from diffpatch.kernels.selection.rules import RULES
from diffpatch.kernels.virtual_tokens import api as virtual_tokens
from diffpatch.kernels.virtual_tokens import torch_impl as virtual_torch
from diffpatch.kernels.virtual_tokens import triton_impl as virtual_triton
from diffpatch.kernels.virtual_tokens.trial import PIECE
from tests import tiny
from tests.kernels.random_blocks import random_blocks, random_qkv

ALL = (
    operators.BLOCK_SPARSE, operators.ACTIVE_TILES, operators.VIRTUAL_TOKENS,
    operators.SELECTION, operators.LINEAR,
)  # fmt: skip
Kernel = Callable[..., Any]


class Case(NamedTuple):
    """An operator's kernel, what stands for it, and a call."""

    operator: Operator
    module: Any
    kernel: str
    right: Kernel
    call: Callable[..., torch.Tensor]


def _cumulants(q: Any, k: Any, v: Any, blocks: Any, scale: float, mask: Any) -> Any:
    return linear._cumulants(q, k, v, blocks, scale, mask)


def _virtual(
    q: Any, tokens: Any, blocks: Any, scale: float, near: Any, shown: Any, missed: Any
) -> Any:
    return virtual_torch.attend(q, tokens, blocks, scale, shown)


def _call_virtual(q: Any, k: Any, v: Any, blocks: Any, backend: str) -> Any:
    tokens = virtual_tokens.pool(k, v, blocks, 8, backend="torch")
    return virtual_tokens.attend_virtual(q, tokens, blocks, 0.2, backend=backend)[0]


CASES = {
    "block_sparse": Case(
        operators.BLOCK_SPARSE,
        triton_backward,
        "attend_with_gradients",
        attend_torch,
        lambda q, k, v, blocks, name: block_sparse.block_sparse_attention(
            q, k, v, blocks, backend=name
        ),
    ),
    "active_tiles": Case(
        operators.ACTIVE_TILES,
        active_triton,
        "attend",
        active_torch.attend,
        lambda q, k, v, blocks, name: active_tiles.attend(q, k, v, blocks, backend=name).out,
    ),
    "virtual_tokens": Case(
        operators.VIRTUAL_TOKENS, virtual_triton, "attend", _virtual, _call_virtual
    ),
    "linear": Case(
        operators.LINEAR,
        linear_triton,
        "attend_cumulants",
        _cumulants,
        lambda q, k, v, blocks, name: linear.attend_cumulants(q, k, v, blocks, 0.2, backend=name)[
            0
        ],
    ),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chooser:
    """The chooser of a CPU that stands for a GPU with the rows "triton" and "torch"."""
    made = Chooser(tmp_path, clock=lambda row, _: {"triton": 1.0, "torch": 2.0}[row.name])
    for module in (chooser, backends):
        monkeypatch.setattr(module, "chooser", lambda: made)
    monkeypatch.setattr(chooser, "DEVICES", ("cpu",))
    monkeypatch.setenv("DIFFPATCH_CHOOSER", "on")
    monkeypatch.setattr(support, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(triton_forward, "unsupported_reason", lambda q, blocks: None)
    for name in ("gluon", "flex"):
        absent = backends.ROWS[name]._replace(reason=lambda q, blocks: "not on this device")
        monkeypatch.setitem(backends.ROWS, name, absent)
    # Those parts of the trials that a test does not replace.
    monkeypatch.setattr(virtual_triton, "pool", _pool)
    monkeypatch.setattr(virtual_triton, "moments", _moments)
    monkeypatch.setattr(linear_triton, "attend_features", _weighted)
    return made


def _weighted(x: Any, y: Any, v: Any, blocks: BlockIndex, mask: Any) -> Any:
    """`attend_features` of what φ made already, which "relu" leaves as it is."""
    return linear._features(x, y, v, blocks, "relu", mask)


def _pool(k: Any, v: Any, blocks: BlockIndex, first: Any, *rest: Any) -> Any:
    made = virtual_torch.pool(k, v, cut(blocks, PIECE), *rest)
    return made.keys, made.values, made.variance, made.log_count


def _moments(x: Any, blocks: BlockIndex, first: Any, mask: Any) -> Any:
    """Piece by piece, as the kernel is given them."""
    means, variances, counts = [], [], []
    for a, b in itertools.pairwise(first.tolist()):
        tokens = blocks.order[a:b]
        counted = x.new_ones(len(x), b - a).bool() if mask is None else mask[:, tokens]
        weight = counted[..., None, None].float()
        count = weight.sum(1).clamp(min=1)
        piece = x[:, tokens].float()
        means.append((piece * weight).sum(1) / count)
        variances.append(((piece - means[-1][:, None]).square() * weight).sum(1) / count)
        counts.append(counted.sum(1).float().log())
    return torch.stack(means, 1), torch.stack(variances, 1), torch.stack(counts, 1)


def stand_in(monkeypatch: pytest.MonkeyPatch, case: Case, kernel: Kernel) -> None:
    monkeypatch.setattr(case.module, case.kernel, kernel)


def inputs(tokens: tuple[int, ...] = (8, 8)) -> tuple[Any, ...]:
    blocks = random_blocks(list(tokens), kept=0.5)
    return *random_qkv(1, sum(tokens), 2, 32, torch.bfloat16), blocks


def chosen(case: Case, q: Any, k: Any, v: Any, blocks: BlockIndex) -> str:
    return choose_backend(case.operator, "auto", blocks, q, k, v)


@pytest.mark.parametrize("name", CASES)
def test_a_right_kernel_is_taken_and_a_wrong_one_is_not(
    name: str, made: Chooser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case, call = CASES[name], inputs()
    stand_in(monkeypatch, case, case.right)
    assert chosen(case, *call) == "triton"
    assert passed_over(call[0]) == {}
    made._known.clear()
    for file in made.folder.iterdir():
        file.unlink()

    def a_little_off(*args: Any) -> Any:
        out, *rest = case.right(*args)
        return (out * 1.03, *rest) if name != "active_tiles" else (
            active_tiles.Result(out * 1.03, *rest)
        )  # fmt: skip

    stand_in(monkeypatch, case, a_little_off)
    assert chosen(case, *call) == "torch"
    (reason,) = passed_over(call[0]).values()
    assert "wrong by 0.03" in reason
    assert case.operator is operators.BLOCK_SPARSE or case.operator.words in reason
    chosen(case, *call)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_that_crashes_or_is_slow_is_not_taken(
    name: str, made: Chooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, call = CASES[name], inputs()

    def crashes(*args: Any) -> Any:
        raise RuntimeError("out of resource: shared memory")

    stand_in(monkeypatch, case, crashes)
    assert chosen(case, *call) == "torch"
    assert "RuntimeError: out of resource" in passed_over(call[0])["triton"]

    def slow(*args: Any) -> Any:
        time.sleep(0.03)
        return case.right(*args)

    stand_in(monkeypatch, case, slow)
    made.clock, made.folder = chooser.seconds, made.folder / "again"
    monkeypatch.setattr(chooser, "timed_blocks", small_blocks)
    monkeypatch.setattr(chooser, "REPEATS", 1)
    monkeypatch.setattr(chooser, "HEADS", 2)
    monkeypatch.setattr(chooser, "KEY_HEADS", 1)
    made._known.clear()
    ranking = chooser.ranking_of(call[0], backends._candidates(case.operator), case.operator)
    assert ranking is not None and not ranking.refused
    assert ranking.seconds["triton"] > 0.03


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_that_fails_in_a_later_call_is_replaced_in_that_call(
    name: str, made: Chooser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    small, large = inputs(), inputs((8, 8, 8))
    tried: list[int] = []

    def fails_later(q: Any, *args: Any) -> Any:
        tried.append(q.shape[1])
        if q.shape[1] == 24:
            raise RuntimeError("out of resource: shared memory, 300000 bytes")
        return case.right(q, *args)

    stand_in(monkeypatch, case, fails_later)
    assert torch.equal(case.call(*small, "auto"), case.call(*small, "torch"))
    assert tried[-1] == 16 and not caplog.records
    expected = case.call(*large, "torch")
    assert torch.equal(case.call(*large, "auto"), expected)
    assert tried[-1] == 24
    tried.clear()
    assert torch.equal(case.call(*large, "auto"), expected)  # and the kernel is not asked again
    case.call(*small, "auto")
    assert not tried
    (record,) = caplog.records
    assert "'triton'" in record.getMessage() and case.operator.words in record.getMessage()
    assert "300000 bytes" in passed_over(large[0])["triton"]
    assert passed_over(large[0].float()) == {}  # another dtype may do
    with pytest.raises(RuntimeError, match="300000 bytes"):
        case.call(*large, "triton")  # who asks by name is told


def test_memory_that_runs_out_takes_nothing_out(
    made: Chooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, call = CASES["active_tiles"], inputs()

    def full(q: Any, *args: Any) -> Any:
        if q.shape[1] == 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return case.right(q, *args)

    stand_in(monkeypatch, case, full)
    with pytest.raises(torch.OutOfMemoryError):
        case.call(*call, "auto")
    assert passed_over(call[0]) == {}


def test_the_last_backend_raises_what_it_has_to_say(
    made: Chooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("both are broken")

    case, call = CASES["active_tiles"], inputs()
    monkeypatch.setenv("DIFFPATCH_CHOOSER", "off")  # what fails is replaced without comparing, too
    stand_in(monkeypatch, case, broken)
    monkeypatch.setattr(active_torch, "attend", broken)
    with pytest.raises(RuntimeError, match="both are broken"):
        case.call(*call, "auto")
    assert set(passed_over(call[0])) == {"triton"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", ALL, ids=lambda x: x.name)
def test_pytorch_passes_every_trial(operator: Operator, dtype: torch.dtype) -> None:
    setting = Setting(torch.device("cpu"), dtype, 32, (("device", "Pretended"),), operator)
    assert chooser.wrong(backends.ROWS["torch"], setting) is None


def test_a_run_goes_on_and_its_report_says_so(
    made: Chooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel fails in the third call of a patched model."""
    calls = 0

    def fails_later(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("an illegal instruction was encountered")
        return attend_torch(*args)

    made.check = lambda row, setting: None
    stand_in(monkeypatch, CASES["block_sparse"], fails_later)
    model = tiny.wan()
    with diffpatch.patched(model.pipe, "window", window=0.5, dense_steps=0):
        model.run()
        report = diffpatch.report(model.pipe)
    assert calls == 3 and set(report.backends) == {"triton", "torch"}
    (note,) = (note for note in report.notes if "illegal instruction" in note)
    assert note.startswith("backend 'triton' is not taken: it fails here")


def test_a_kernel_that_chooses_the_wrong_tiles_is_not_taken(
    made: Chooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen_by(sign: float) -> Kernel:
        def choose(scores: Any, seen: Any, fixed: Any, counts: Any) -> Any:
            return [choosing.choose(sign * scores, seen, fixed, count) for count in counts]

        return choose

    rule = RULES["error"]
    monkeypatch.setattr(selection_triton, "scores", lambda tiles, name: rule.score(tiles))
    q, k, v, blocks = inputs()
    for sign, taken in ((1.0, "triton"), (-1.0, "torch")):
        made._known.clear()
        made.folder = made.folder / taken
        monkeypatch.setattr(selection_triton, "choose", chosen_by(sign))
        assert choose_backend(operators.SELECTION, "auto", blocks, q, k, v) == taken
    assert "for the choice of tiles: wrong by" in passed_over(q)["triton"]
