"""Whether Triton can run our kernels on a device, in words where it cannot.

"Can" means what was compiled: the NVIDIA GPUs of `GPUS`, with the Triton versions from
`OLDEST_TRITON` on. Others are refused by name rather than tried, as a compiler that does not know a
GPU may end the process and not just the call.
"""

from __future__ import annotations

import functools
import logging
import sys
from importlib.util import find_spec
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

OLDEST_TRITON = (3, 6)  # of those that the kernels were compiled with


class GPU(NamedTuple):
    """What the kernels need to know of a compute capability.

    Attributes:
        like: the compute capability whose configurations it takes.
        shared: bytes of shared memory a block may use (CUDA programming guide, technical
            specifications per compute capability).
    """

    like: int
    shared: int


# By compute capability, 90 for 9.0. 7.5 and below lack bf16 tensor cores and asynchronous copies;
# 11.0 (Thor) is unknown to the assembler of Triton 3.6, and with 3.9 not every kernel compiles.
GPUS = {
    80: GPU(80, 166912),
    86: GPU(89, 101376),
    87: GPU(80, 166912),
    89: GPU(89, 101376),
    90: GPU(90, 232448),
    100: GPU(100, 232448),
    103: GPU(100, 232448),
    120: GPU(120, 101376),
    121: GPU(120, 101376),
}
FP8 = 89  # from here on tensor cores multiply 8-bit floats


def arch(device: torch.device) -> int:
    """The compute capability whose configurations a GPU takes, 90 for 9.0; 0 for other devices."""
    if device.type != "cuda":
        return 0
    capability = _capability(device)
    return GPUS[capability].like if capability in GPUS else capability


def fp8_reason(device: torch.device) -> str | None:
    """Why the tensor cores of a GPU cannot multiply 8-bit floats; None if they can, or it is none.

    Asked of the GPU itself: 8.6 takes the configurations of 8.9, but has no such tensor cores.
    """
    capability = _capability(device) if device.type == "cuda" else FP8
    if capability >= FP8:
        return None
    return (
        f"8-bit floats need tensor cores of compute capability {FP8 / 10} or above (Ada, Hopper,"
        f" Blackwell), and this GPU has {capability / 10}"
    )


def unsupported_reason(device: torch.device) -> str | None:
    """Why no Triton kernel of ours can run on a device, or None if they can.

    The first time that a GPU is refused, the reason is logged as a warning too: whoever asked for
    the backend "auto" sees nothing else of it but the time that PyTorch takes.
    """
    if device.type == "cpu":
        return "triton needs a GPU and q is on the cpu"
    if device.type != "cuda":
        return f"the triton kernels are for NVIDIA GPUs and q is on {device.type}"
    return _gpu_reason(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_reason(index: int) -> str | None:
    device = torch.device("cuda", index)
    reason = _version_reason() or _capability_reason(_capability(device)) or _driver_reason()
    if reason:
        log.warning("no Triton kernels on %s, slower ones of PyTorch instead: %s", device, reason)
    return reason


def _version_reason() -> str | None:
    if torch.version.hip:
        return (
            f"this PyTorch is for ROCm ({torch.version.hip}), and the triton kernels were compiled"
            " for NVIDIA GPUs only"
        )
    if "triton" not in sys.modules and not find_spec("triton"):
        return "triton is not installed"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {triton.__version__} is too old, {oldest} or newer can"
    return None


def _capability_reason(capability: int) -> str | None:
    oldest = min(GPUS)
    if capability < oldest:
        return (
            f"this GPU has compute capability {capability / 10}, and the triton kernels need"
            f" {oldest / 10} or above (bf16 tensor cores and asynchronous copies)"
        )
    if capability not in GPUS:
        known = ", ".join(str(gpu / 10) for gpu in GPUS)
        return (
            f"this GPU has compute capability {capability / 10}, and the triton kernels were only"
            f" compiled for {known}"
        )
    return None


def _driver_reason() -> str | None:
    """Why Triton cannot launch anything: it builds a library for that, with a C compiler."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of every kind: no compiler, no headers of Python, no libcuda
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return f"triton cannot start here: {words[:200]}"
    return None


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
