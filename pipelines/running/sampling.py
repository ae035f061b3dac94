"""One call of a pipeline, timed step by step, with its frames as a tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from diffpatch.errors import DiffpatchError
from diffpatch.pipelines.running.loading import Pipeline, call_arguments, denoisers

CLOCKS = ("total", "denoising", "step_median")  # of a run

OnStep = Callable[[int, float], None]


class NonFiniteOutput(DiffpatchError, RuntimeError):
    """The model produced NaN or infinity."""


@contextmanager
def named(what: str) -> Iterator[None]:
    """Say whose output it was that holds NaN or infinity."""
    try:
        yield
    except NonFiniteOutput as error:
        raise NonFiniteOutput(f"{what}: {error}") from error


@dataclass(frozen=True, eq=False)
class Sample:
    """What one call made, and how long it took.

    Attributes:
        frames: float32 (F, 3, H, W) in [0, 1], on the CPU; one frame for an image.
        total_seconds: the whole call, from encoding the prompt to decoding the frames.
        step_seconds: every denoising step; empty where the pipeline has no step callback.
        peak_bytes: most accelerator memory allocated; None on the CPU.
        cpu_share: share of the whole call in which the thread that made it had a processor. On
            the CPU much less than 1 says that others had it, and that the times are too long.
    """

    frames: torch.Tensor
    total_seconds: float
    step_seconds: list[float]
    peak_bytes: int | None
    cpu_share: float = 1.0

    @property
    def clocks(self) -> dict[str, float]:
        """Seconds by clock, of `CLOCKS`; those of steps are missing where nobody tells of them."""
        steps = self.step_seconds
        timed = {"denoising": sum(steps), "step_median": median(steps)} if steps else {}
        return {"total": self.total_seconds, **timed}


def sample(
    pipe: Pipeline, call: dict[str, Any], seed: int, on_step: OnStep | None = None
) -> Sample:
    """Call a pipeline and time it; the device is synchronised before every reading of the clock.

    Args:
        pipe: any diffusers pipeline for images or videos.
        call: its arguments, without generator, output type and callback.
        seed: of a generator on the CPU, so that every device starts from the same noise.
        on_step: called after each step with its number and its seconds.

    Raises:
        NonFiniteOutput: at the end of the first step that yields NaN or infinity; it names the
            step, the prompt and the seed.
    """
    from diffpatch.internals import execution_device  # diffusers is slow to import

    device = execution_device(pipe)
    clock = _StepClock(device, on_step)
    extra: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed)}
    if "callback_on_step_end" in call_arguments(pipe):
        extra["callback_on_step_end"] = clock.step_ended
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prompt = f"prompt {call['prompt']!r}, seed {seed}" if "prompt" in call else f"seed {seed}"
    with named(prompt):
        with clock.watching(denoisers(pipe)):
            start, had = clock.now(), time.thread_time()
            output = pipe(**call, **extra, output_type="pt")
            total, had = clock.now() - start, time.thread_time() - had
        frames = as_frames(output[0])
        if not torch.isfinite(frames).all():
            raise NonFiniteOutput("the decoded frames hold NaN or infinity")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Sample(frames, total, clock.seconds, peak, cpu_share=min(1.0, had / total))


def warm_up(pipe: Pipeline, call: dict[str, Any], seed: int) -> None:
    """A short call (two steps) whose result is dropped: allocations, compilers, first decode."""
    short = {"num_inference_steps": 2} if "num_inference_steps" in call_arguments(pipe) else {}
    sample(pipe, call | short, seed)


def as_frames(output: Any) -> torch.Tensor:
    """The first image or video of a pipeline output as float32 (F, 3, H, W) on the CPU."""
    first = output[0]
    if isinstance(first, list):  # a video as a list of frames
        first = torch.stack([torch.as_tensor(frame) for frame in first])
    channels_last = isinstance(first, np.ndarray)
    frames = torch.as_tensor(first).detach().float().cpu()
    frames = frames if frames.ndim == 4 else frames[None]
    return frames.permute(0, 3, 1, 2) if channels_last else frames


@dataclass
class _StepClock:
    """What measures steps: from the first call of a denoiser, then from callback to callback."""

    device: torch.device
    on_step: OnStep | None = None
    seconds: list[float] = field(default_factory=list)
    _mark: float | None = None

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    @contextmanager
    def watching(self, models: list[Any]) -> Iterator[None]:
        """Notes when one of the models is called first: there the first step begins."""
        self._mark = None if models else self.now()
        handles = [model.register_forward_pre_hook(self._model_called) for model in models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _model_called(self, *_: Any) -> None:
        if self._mark is None:
            self._mark = self.now()

    def step_ended(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        now = self.now()
        self.seconds.append(now - (self._mark or now))
        latents = tensors.get("latents")
        if latents is not None and not torch.isfinite(latents).all():
            raise NonFiniteOutput(f"step {step + 1} yields NaN or infinity")
        if self.on_step is not None:
            self.on_step(step, self.seconds[-1])
        self._mark = self.now()  # what this callback itself took belongs to no step
        return tensors
