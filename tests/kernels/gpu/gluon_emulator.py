"""Run Gluon kernels for Hopper in Python, as unkindly as the hardware may.

Triton's interpreter knows no Gluon. Here the body of a kernel runs as plain Python on torch
tensors; the partitions of `warp_specialize` are threads of which one runs at a time, changed at
random wherever they synchronize. What the hardware does on its own is put off as long as it may be:

* A copy into shared memory makes its target NaN at once and lands when nobody can go on without it.
* Tensor cores read their operands when they are told to and when they are waited for; if those are
  not the same numbers, a buffer was given away too early, and that is an error.
* Sums that have not been waited for are no tensors: computing with them is an error.
* Shared memory that was written in the usual way needs a fence before tensor cores read it.

Layouts are left to the compiler, which checks them for itself.
"""

from __future__ import annotations

import random
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction

WAIT_SECONDS = 60.0  # for another thread; a limit for errors of this file


class KernelError(Exception):
    """What would hang or give wrong numbers on a GPU."""


class Pointer:
    """A place in a tensor, or a tensor of places."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def places(self, mask: Any) -> torch.Tensor:
        """The offsets, 0 where masked; all must lie in the tensor's memory."""
        at = torch.as_tensor(self.offset)
        at = at if mask is None else torch.where(mask, at, 0)
        if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < self.memory.numel():
            raise KernelError(f"offsets {int(at.min())}..{int(at.max())} of {self.memory.shape}")
        return at

    def load(self, mask: Any = None, other: Any = 0) -> torch.Tensor:
        found = self.memory[self.places(mask)]
        found = found.long() if not found.is_floating_point() else found
        return found if mask is None else torch.where(mask, found, torch.as_tensor(other).to(found))

    def store(self, value: torch.Tensor, mask: Any = None) -> None:
        at = self.places(mask)
        chosen = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand_as(at)
        self.memory[at[chosen]] = value.expand_as(at)[chosen].to(self.memory.dtype)


class Shared:
    """Shared memory, with the number of the partition that wrote a place without a fence, or 0."""

    def __init__(self, data: torch.Tensor, unfenced: torch.Tensor | None = None) -> None:
        self.data = data
        self.unfenced = torch.zeros(data.shape, dtype=torch.int8) if unfenced is None else unfenced

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)], self.unfenced[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order), self.unfenced.permute(order))

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.data.dtype
        assert value.shape == self.data.shape
        self.data.copy_(value)
        self.unfenced.fill_(Partition.current().number)

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.count = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes, self.phase = 0, 0

    def arrive(self, count: int, expected: int = 0) -> None:
        self.missing -= count
        self.bytes += expected
        if self.missing < 0:
            raise KernelError("more arrivals at a barrier than it counts")
        self.turn()

    def turn(self) -> None:
        if self.missing == self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count

    def passed(self, phase: int) -> bool:
        return self.phase != phase


class Barriers:
    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Descriptor:
    """A tensor descriptor; what is past the end reads as 0."""

    def __init__(self, host: Any) -> None:
        self.rows, self.box = host.base, host.block_shape
        self.layout, self.dtype = host.layout, host.base.dtype
        nbytes = self.box[0] * self.box[1] * self.rows.itemsize
        self.block_type = types.SimpleNamespace(nbytes=nbytes)

    def read(self, row: int, column: int) -> torch.Tensor:
        if not (column >= 0 and column + self.box[1] <= self.rows.shape[1] and row >= 0):
            raise KernelError(f"a box at {row}, {column} of {tuple(self.rows.shape)}")
        found = self.rows[row : row + self.box[0], column : column + self.box[1]]
        return torch.cat([found, found.new_zeros(self.box[0] - len(found), self.box[1])])


class Sums:
    """What tensor cores are computing."""

    def __init__(self, left: Any, right: Shared, start: torch.Tensor, use_start: bool) -> None:
        self.left, self.right = left, right
        self.start = start if use_start else torch.zeros_like(start)
        self.early = self._now()
        self.value: torch.Tensor | None = None

    def _now(self) -> torch.Tensor:
        left = self.left.data if isinstance(self.left, Shared) else self.left
        return self.start + left.float() @ self.right.data.float()

    def finish(self) -> None:
        self.value = self._now()
        if not torch.equal(self.value.nan_to_num(1e9), self.early.nan_to_num(1e9)):
            raise KernelError("a buffer changed while tensor cores were reading it")


class Partition(threading.Thread):
    """One partition of warps, with the products it has in flight."""

    def __init__(self, machine: Machine, number: int, body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.machine, self.number, self.body = machine, number, body
        self.turn = threading.Semaphore(0)
        self.flying: deque[Sums] = deque()
        self.blocked_on: tuple[Barrier, int] | None = None
        self.failure: BaseException | None = None
        self.done = False

    @staticmethod
    def current() -> Partition:
        thread = threading.current_thread()
        assert isinstance(thread, Partition)
        return thread

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.machine.failed:
                self.body()
        except BaseException as error:
            self.failure = error
        self.done = True
        self.machine.back.release()

    def pause(self) -> None:
        """Let another partition run, maybe."""
        self.machine.back.release()
        self.turn.acquire()
        if self.machine.failed:
            raise SystemExit

    def can_go_on(self) -> bool:
        return self.blocked_on is None or self.blocked_on[0].passed(self.blocked_on[1])


class Machine:
    """One program: its partitions, its copies under way, and the order of things by chance."""

    def __init__(self, program: tuple[int, ...], chance: random.Random) -> None:
        self.program, self.chance = program, chance
        self.copies: list[tuple[Barrier, Shared, torch.Tensor]] = []
        self.partitions: list[Partition] = []
        self.back = threading.Semaphore(0)
        self.failed = False

    def specialize(self, parts: Any, warps: Any, registers: Any) -> None:
        assert len(parts) - 1 == len(warps) == len(registers)
        self.partitions = [
            Partition(self, number, partial(body, *args))
            for number, (body, args) in enumerate(parts, 1)
        ]
        for partition in self.partitions:
            partition.start()
        while any(not p.done for p in self.partitions):
            ready = [p for p in self.partitions if not p.done and p.can_go_on()]
            if self.copies and (not ready or self.chance.random() < 0.05):
                self._land(self.chance.randrange(len(self.copies)))
                continue
            if not ready:
                self._stop()
                raise KernelError("deadlock: every partition waits")
            chosen = self.chance.choice(ready)
            chosen.turn.release()
            assert self.back.acquire(timeout=WAIT_SECONDS)
            if chosen.failure is not None:
                self._stop()
                raise chosen.failure
        if self.copies or any(p.flying for p in self.partitions):
            raise KernelError("the program ended with copies or products under way")

    def _land(self, which: int) -> None:
        barrier, target, data = self.copies.pop(which)
        target.data.copy_(data)
        barrier.bytes -= data.numel() * data.itemsize
        barrier.turn()

    def _stop(self) -> None:
        self.failed = True
        for partition in self.partitions:
            partition.turn.release()
            partition.join(WAIT_SECONDS)

    def load(self, source: Descriptor, at: Any, barrier: Barrier, target: Shared) -> None:
        data = source.read(*(int(x) for x in at))
        target.data.fill_(torch.nan)
        self.copies.append((barrier, target, data))
        Partition.current().pause()

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        partition = Partition.current()
        if pred:
            partition.blocked_on = (barrier, int(phase))
            partition.pause()
            partition.blocked_on = None

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier.arrive(count)
        Partition.current().pause()

    def multiply(
        self, left: Any, right: Shared, start: torch.Tensor, *, use_acc: bool = True, is_async: bool
    ) -> Sums:
        if not is_async:
            raise KernelError("only asynchronous products are emulated")
        for operand in (left, right):
            if isinstance(operand, Shared) and operand.unfenced.any():
                raise KernelError("tensor cores read shared memory written without a fence")
        sums = Sums(left, right, start, use_acc)
        Partition.current().flying.append(sums)
        Partition.current().pause()
        return sums

    def finish(self, still_flying: int, deps: Sequence[Any]) -> Any:
        partition = Partition.current()
        partition.pause()
        while len(partition.flying) > still_flying:
            partition.flying.popleft().finish()
        if any(isinstance(dep, Sums) and dep.value is None for dep in deps):
            raise KernelError("sums are used that have not been waited for")
        found = [dep.value if isinstance(dep, Sums) else dep for dep in deps]
        return found[0] if len(found) == 1 else tuple(found)


class _Layout:
    """Stands for any layout."""

    def __init__(self, *_: Any, **named: Any) -> None: ...

    @classmethod
    def get_default_for(cls, *_: Any) -> _Layout:
        return cls()


class _BarrierLayout(_Layout): ...


def _language(machine: Machine, allocated: list[Shared]) -> Any:
    def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared | Barriers:
        if isinstance(layout, _BarrierLayout):
            return Barriers(shape[0])
        allocated.append(Shared(torch.full(tuple(shape), torch.nan, dtype=dtype)))
        return allocated[-1]

    kinds = ("DistributedLinear", "NVMMADistributed", "NVMMAShared", "DotOperand", "Slice")
    return types.SimpleNamespace(
        **{f"{kind}Layout": _Layout for kind in (*kinds, "Blocked")},
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        program_id=lambda axis: torch.tensor(machine.program[axis]),
        load=lambda at, mask=None, other=0: at.load(mask, other),
        store=lambda at, value, mask=None: at.store(value, mask),
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        where=torch.where,
        maximum=torch.maximum,
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        static_range=range,
        allocate_shared_memory=allocate,
        warp_specialize=machine.specialize,
    )


def _names(machine: Machine) -> dict[str, Any]:
    """What a kernel's module imports, by the names it has there."""
    allocated: list[Shared] = []

    def fence() -> None:
        for shared in allocated:
            shared.unfenced[shared.unfenced == Partition.current().number] = 0

    return {
        "gl": _language(machine, allocated),
        "async_load": machine.load,
        "fence_async_shared": fence,
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_wait": machine.finish,
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=_BarrierLayout,
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, nbytes: barrier.arrive(1, nbytes),
            wait=machine.wait,
            arrive=machine.arrive,
        ),
    }


def _python(kernel: Any, machine: Machine) -> Callable[..., None]:
    """The kernel as a Python function whose names mean this file's things."""
    module = kernel.fn.__globals__
    scope = dict(module) | _names(machine)
    for name, value in module.items():
        if isinstance(value, GluonJITFunction):
            scope[name] = types.FunctionType(value.fn.__code__, scope, name)
        elif isinstance(value, gl.constexpr):
            scope[name] = value.value
    return types.FunctionType(kernel.fn.__code__, scope, kernel.fn.__name__)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        size = value.untyped_storage().nbytes() // value.itemsize
        flat = torch.as_strided(value, (size - value.storage_offset(),), (1,))
        return Pointer(flat)
    return Descriptor(value) if hasattr(value, "block_shape") else value


class Emulated:
    """What stands for a kernel: ``kernel[grid](...)`` runs every program here."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.kernel, self.chance = kernel, random.Random(seed)

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **options: Any) -> None:
            options.pop("enable_fp_fusion")
            values = [_argument(value) for value in args]
            for program in product(*map(range, grid)):
                machine = Machine(program, self.chance)
                _python(self.kernel, machine)(*values, **options)

        return launch


@contextmanager
def emulated(module: Any, name: str, seed: int = 0) -> Iterator[None]:
    """Have the kernel of that name in a module run here, in an order that the seed decides."""
    with mock.patch.object(module, name, Emulated(getattr(module, name), seed)):
        yield
