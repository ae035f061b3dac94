"""From what a caller asked for to a method and a schedule, filled up with published settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method, make_method
from diffpatch.pipelines.families import FamilyInfo
from diffpatch.pipelines.presets import Preset
from diffpatch.schedule import Amount, Schedule


def settle(
    method: str | Method,
    params: Mapping[str, Any],
    family: FamilyInfo | None,
    kind: str,
    *,
    dense_steps: Amount | None = None,
    dense_last_steps: Amount = 0,
    dense_layers: Amount | Collection[int] | None = None,
    stepless: bool = False,
) -> tuple[Method, Schedule]:
    """The method and the schedule of a patch or a plan.

    What the caller leaves open is taken from the family's published preset for the method, then
    from the method itself. A method given as an object already says everything but the schedule.

    Args:
        method: a name, a combination such as "radial+temporal", or an object.
        params: parameters given by the caller.
        family: where presets come from, if known.
        kind: "video" or "image".
        dense_steps: as given by the caller, or None.
        dense_last_steps: as given by the caller.
        dense_layers: as given by the caller, or None.
        stepless: whether denoising steps are unknown (a bare transformer), so that none are dense
            unless the caller insists.

    Raises:
        UnknownMethod, BadParameter: the method or a parameter cannot work.
    """
    preset = Preset()
    if isinstance(method, str) and family is not None:
        preset = family.presets.get(method.partition("+")[0], preset)
    chosen = make_method(method, **{**preset.params, **params})
    if kind not in chosen.kinds:
        raise BadParameter(
            f"{chosen.name} works on {' and '.join(chosen.kinds)} models only and this is an"
            f" {kind} model: use neighborhood or window"
        )
    if stepless and chosen.needs_steps:
        raise BadParameter(
            f"{chosen.name} carries results from step to step, but a bare transformer knows no"
            " steps: patch the pipeline"
        )
    if dense_steps is None:
        dense_steps = 0 if stepless else _first(preset.dense_steps, chosen.default_dense_steps)
    if dense_layers is None:
        dense_layers = _first(preset.dense_layers, chosen.default_dense_layers)
    return chosen, Schedule(dense_steps, dense_last_steps, dense_layers)


def _first(published: Amount | None, default: Amount) -> Amount:
    return default if published is None else published
