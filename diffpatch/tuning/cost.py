"""What tuning will take, before it is begun: from two timed steps of the model."""

from __future__ import annotations

from dataclasses import dataclass

from diffpatch.pipelines.running.sampling import Sample
from diffpatch.tuning.probe import PARTS
from diffpatch.tuning.tune import RULES, SIZES

TRIED = len(RULES) * len(SIZES)  # candidates beside a sampled call
FASTER = 0.6  # of the dense time that a clip of the front takes, about


@dataclass(frozen=True)
class Cost:
    """What it will take.

    Attributes:
        seconds: in all.
        dense_runs: the same in dense runs.
        extra_bytes: memory beside that of a dense run, at most: frames that are compared.
    """

    seconds: float
    dense_runs: float
    extra_bytes: int


def cost(
    two_steps: Sample, steps: int, *, curves: int, fronts: int, ways: int, checks: int
) -> Cost:
    """The cost of tuning.

    Args:
        two_steps: a timed call of two steps.
        steps: of a run.
        curves: prompts that curves are made from.
        fronts: prompts that the front is rendered with.
        ways: clips of the front for each, beside the dense one.
        checks: prompts to check with.
    """
    timed = two_steps.step_seconds or [two_steps.total_seconds / 2]
    step = timed[-1]  # the first warms up
    around = max(0.0, two_steps.total_seconds - sum(timed))
    run = step * steps + around
    # A candidate computes about half of the pairs of attention, and that about half of a step.
    tried = min(PARTS, steps) * TRIED * 0.25 * step
    seconds = curves * (run + tried) + fronts * run * (1 + FASTER * ways) + (fronts > 0) * run
    seconds += checks * run * (1 + FASTER)
    frames = two_steps.frames
    return Cost(seconds, seconds / run, 2 * frames.numel() * frames.element_size())
