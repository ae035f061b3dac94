"""What a measurement ran on: versions, device, commit. Part of every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("diffpatch", "torch", "diffusers", "transformers", "accelerate", "triton", "numpy")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, the device and the commit, ready for JSON."""
    device = torch.device(device)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": commit(),
        **({"gpu": _gpu(device)} if device.type == "cuda" else {}),
        **({"instructions": _instructions()} if device.type == "cpu" else {}),
    }


def threads(about: Mapping[str, Any]) -> str:
    """How many threads an `environment` had, in words."""
    count = about["threads"]
    return "1 thread" if count == 1 else f"{count} threads"


def device_name(device: torch.device | str) -> str:
    """The model of the device, such as "NVIDIA H100 80GB HBM3" or the name of the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The commit of the checkout we run from, with "-dirty" if it changed; None if installed.

    A copy of the files without the repository can name it in the variable DIFFPATCH_COMMIT.
    """
    named = os.environ.get("DIFFPATCH_COMMIT")
    if named:
        return named
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    """What a speed depends on besides the name of the GPU; None for what cannot be found out."""
    properties = torch.cuda.get_device_properties(device)
    asked = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
    query = ["nvidia-smi", f"--query-gpu=uuid,{','.join(asked)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        lines = [line.split(", ") for line in done.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError):
        lines = []
    lines = [line for line in lines if len(line) == 1 + len(asked)]
    uuid = str(getattr(properties, "uuid", "?"))
    # A part of a GPU (MIG) has another id; what drives the first GPU drives all.
    own = [line for line in lines if uuid in line[0]] or lines[:1]
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(asked, own[0][1:] if own else [None] * len(asked), strict=True)),
    }


def _instructions() -> str:
    """What torch computes with on this CPU: "AVX2", or "AVX512, amx_bf16" with matrix units.

    Speeds depend on it more than on the name: matrix units make dense attention in bf16 three times
    as fast as it is without.
    """
    vectors = torch.backends.cpu.get_cpu_capability()
    flags = _cpu_line("flags").split()
    units = sorted(flag for flag in flags if flag.startswith("amx_") and flag != "amx_tile")
    return ", ".join([vectors, *units])


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.processor() or platform.machine()


def _cpu_line(name: str) -> str:
    """What Linux says of the first CPU under a name; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")
