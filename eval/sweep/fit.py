"""Methods at equal cost: each fitted so that a whole run keeps the same fraction of the pairs."""

from __future__ import annotations

from typing import Any

import diffpatch
from diffpatch.eval.sweep.plan import Rendering
from diffpatch.eval.sweep.schema import BadSweep
from diffpatch.planning.fit import fit_kept, kept_of


def fit_run(pipe: Any, run: Rendering) -> diffpatch.Method:
    """The method of a run, set so that the run keeps about the fraction that is wanted.

    The fraction is of the whole run, dense steps and layers and refreshes included: what they keep
    leaves less for the sparse calls.

    Raises:
        BadSweep: dense steps and layers alone keep more than is wanted.
    """
    method, wanted = run.way.method, run.way.wanted
    assert method is not None and wanted is not None
    made = diffpatch.make_method(method.name, **method.parameters)
    plan = plan_run(pipe, run, made)
    sparse = kept_of(made, plan.grid)
    # The run keeps always + (1 - always) × what its sparse calls keep.
    always = (plan.kept - sparse) / (1 - sparse) if sparse < 1 else 0.0
    if always >= wanted:
        raise BadSweep(
            f"kept: {wanted} cannot be met by {method.label}: its dense steps and layers and its"
            f" refreshes alone keep {always:.0%} of a run; make them fewer (schedules)"
        )
    return fit_kept(made, plan.grid, (wanted - always) / (1 - always))


def plan_run(pipe: Any, run: Rendering, method: diffpatch.Method) -> diffpatch.Plan:
    """What a run will cost with a method.

    Raises:
        BadSweep: the sweep does not say how large the pictures are.
    """
    way, call = run.way, run.scene.call
    options: dict[str, Any] = {
        **way.options,
        **(way.method.options if way.method else {}),
    }
    options = {
        key: value for key, value in options.items() if key not in ("backend", "cache", "hold")
    }
    sizes: dict[str, Any] = {
        key: call[key] for key in ("height", "width", "num_frames") if key in call
    }
    missing = {"height", "width"} - set(sizes)
    if missing:
        raise BadSweep(f"kept: a kept fraction needs sizes with {' and '.join(sorted(missing))}")
    if run.scene.steps is not None:
        sizes["num_inference_steps"] = run.scene.steps
    return diffpatch.plan(pipe, method, **sizes, **options)
