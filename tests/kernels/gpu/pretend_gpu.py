"""A Triton driver for a GPU that is not here: launches compile and are recorded, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from diffpatch.kernels.gpu.support import GPUS


class PretendGPU:
    """What the launcher asks of a driver; CPU tensors stand for those of the GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[dict[str, Any]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return {"max_shared_mem": GPUS[self.arch].shared, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[str, str, int, int, int]:
        """Module, function, registers, spills, most threads of a block."""
        return "module", "function", 0, 0, 1024

    def unload_module(self, module: str) -> None: ...

    def launcher_cls(self, source: Any, metadata: SimpleNamespace) -> Any:
        def launch(x: int, y: int, z: int, *_: Any) -> None:
            self.launches.append({"name": metadata.name, "grid": (x, y, z)})

        return launch


@contextmanager
def pretend_gpu(arch: int) -> Iterator[PretendGPU]:
    """Launch Triton kernels as on a GPU of this compute capability (90 for 9.0)."""
    before = driver._active
    gpu = PretendGPU(arch)
    driver.set_active(gpu)
    try:
        yield gpu
    finally:
        driver._active = before
