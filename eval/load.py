"""How busy a machine was while something was timed: what else ran there decides no speedup."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Mapping

import torch

from diffpatch.pipelines.running.sampling import Sample

QUIET = 0.8  # of the wall time that a run must have had a processor, or of the GPU's highest clock


def load_of(sample: Sample, device: torch.device) -> dict[str, float]:
    """How busy the machine was during a run that just ended, ready for JSON.

    Returns:
        On the CPU `cpu`, the share of the wall time in which the run had a processor. On NVIDIA
        GPUs `gpu_others`, how many other processes compute there, and `gpu_clock`, the clock as a
        fraction of the highest; what the driver does not tell is missing.
    """
    if device.type == "cpu":
        return {"cpu": round(sample.cpu_share, 3)}
    return _gpu(device) if device.type == "cuda" else {}


def worst(loads: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The busiest of several moments, each sign by itself."""
    found: dict[str, float] = {}
    for load in loads:
        for sign, value in load.items():
            choose = max if sign == "gpu_others" else min
            found[sign] = choose(value, found.get(sign, value))
    return found


def busy(load: Mapping[str, float]) -> str | None:
    """Why times taken then are unreliable, in a few words; None for a quiet machine."""
    if (share := load.get("cpu", 1.0)) < QUIET:
        return f"{share:.0%} CPU"
    if others := int(load.get("gpu_others", 0)):
        return f"{others} other process{'es' if others > 1 else ''} on the GPU"
    if (clock := load.get("gpu_clock", 1.0)) < QUIET:
        return f"GPU at {clock:.0%} of its clock"
    return None


def _gpu(device: torch.device) -> dict[str, float]:
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", "?"))
    own = [line for line in _smi("gpu", "uuid,clocks.sm,clocks.max.sm") if uuid in line[0]]
    apps = [line for line in _smi("compute-apps", "gpu_uuid,pid") if uuid in line[0]]
    found: dict[str, float] = {"gpu_others": float(max(0, len(apps) - 1))} if apps else {}
    # A part of a GPU, or a driver that does not tell, has no clock.
    with contextlib.suppress(IndexError, ValueError, ZeroDivisionError):
        found["gpu_clock"] = round(float(own[0][1]) / float(own[0][2]), 3)
    return found


def _smi(what: str, columns: str) -> list[list[str]]:
    """Lines that nvidia-smi prints about GPUs or processes; none where it is not there."""
    command = ["nvidia-smi", f"--query-{what}={columns}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    return [line for line in lines if len(line) == len(columns.split(","))]
