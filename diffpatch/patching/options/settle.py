"""From what a caller asked for to a method and a schedule, filled up with published settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffpatch.errors import BadParameter, choices
from diffpatch.methods.base import Method
from diffpatch.methods.registry import MethodLike, make_method, one_method
from diffpatch.patching.options import composition
from diffpatch.patching.options.schedule import BARE, Amount, Schedule
from diffpatch.pipelines.families.info import Trained
from diffpatch.pipelines.families.presets import Preset
from diffpatch.pipelines.families.table import FamilyInfo

# What a sparse call keeps at each level: about this fraction of the pairs of visual tokens.
QUALITIES: Mapping[str, float] = {"high": 0.5, "balanced": 0.25, "fast": 0.125}

# What "auto" stands for: the method that suits a kind of model without being told anything.
AUTO: Mapping[str, str] = {"video": "radial", "image": "neighborhood"}


def settle(
    method: MethodLike,
    params: Mapping[str, Any],
    family: FamilyInfo | None,
    kind: str,
    *,
    dense_steps: Amount | None = None,
    dense_last_steps: Amount = 0,
    dense_layers: Amount | Collection[int] | None = None,
    stepless: bool = False,
    quality: str | None = None,
    experts: bool = False,
    trained: Trained | None = None,
    cross_attention: bool = False,
) -> tuple[Method, Schedule]:
    """The method and the schedule of a patch or a plan.

    What the caller leaves open is taken from the family's published preset for the method, then
    from the method itself. A method given as an object already says everything but the schedule.

    Args:
        method: "auto" (see `AUTO`), a name, a combination such as "radial+temporal", as a list
            too, or an object.
        params: parameters given by the caller.
        family: where presets come from, if known.
        kind: "video" or "image".
        dense_steps: as given by the caller, or None.
        dense_last_steps: as given by the caller.
        dense_layers: as given by the caller, or None.
        stepless: whether denoising steps are unknown (a bare transformer), so that none are dense.
        quality: a level of `QUALITIES`, or None for the published setting.
        experts: whether the model is one of two that share the steps.
        trained: what the model was trained at, if known.
        cross_attention: whether cross-attention stands beside the model's self-attention.

    Raises:
        UnknownMethod, BadParameter: the method or a parameter cannot work.
    """
    preset, method = Preset(), one_method(method)
    method = AUTO[kind] if method == "auto" else method
    if isinstance(method, str) and family is not None:
        preset = family.presets.get(method.partition("+")[0], preset)
        preset = preset.experts if experts and preset.experts is not None else preset
    if params.get("weights"):  # presets were published for models that were trained dense
        preset = Preset()
    chosen = make_method(method, **{**preset.params, **params})
    if kind not in chosen.kinds:
        raise BadParameter(
            f"{chosen.name} works on {' and '.join(chosen.kinds)} models only and this is an"
            f" {kind} model: use neighborhood or window"
        )
    if quality is not None:
        chosen = _at_quality(method, chosen, quality, params, kind)
    frames, size = (None, None) if trained is None else (trained.num_frames, trained.size)
    chosen = chosen.for_model(frames, size, cross_attention)
    composition.check_method(chosen)
    if stepless and chosen.needs_steps:
        instead = ", or choose in every call with refresh=1" if chosen.name == "dynamic" else ""
        raise BadParameter(
            f"{chosen.name} carries results from step to step, but a bare transformer knows no"
            f" steps: patch the pipeline{instead}"
        )
    if stepless and (dense_steps or dense_last_steps):
        raise BadParameter(
            f"dense_steps={dense_steps or 0}, dense_last_steps={dense_last_steps} need to know the"
            f" denoising steps, but {BARE}"
        )
    if dense_steps is None:
        dense_steps = 0 if stepless else _first(preset.dense_steps, chosen.default_dense_steps)
    if dense_layers is None:
        dense_layers = _first(preset.dense_layers, chosen.default_dense_layers)
    return chosen, Schedule(dense_steps, dense_last_steps, dense_layers)


def no_effect(method: Method, quality: str | None, params: Mapping[str, Any]) -> str | None:
    """What to say where a caller's parameters already set how much is kept; None elsewhere.

    Args:
        method: as `settle` returns it.
        quality: as given by the caller.
        params: parameters given by the caller.
    """
    own = [f"{name}={params[name]!r}" for name in method.kept_parameters if name in params]
    if quality is None or not own:
        return None
    sets = "sets" if len(own) == 1 else "set"
    given = " and ".join(own)
    return f"quality={quality!r} has no effect beside {given}, which {sets} how much is kept"


def _at_quality(
    method: str | Method,
    chosen: Method,
    quality: str,
    params: Mapping[str, Any],
    kind: str,
) -> Method:
    if quality not in QUALITIES:
        raise BadParameter(f"unknown quality {quality!r}: {choices(str(quality), QUALITIES)}")
    if not isinstance(method, str):
        raise BadParameter(
            f"quality={quality!r} chooses the size of a method and {chosen} has one: give the name"
            f" {chosen.name!r}, or leave quality out"
        )
    if no_effect(chosen, quality, params) is not None:
        return chosen
    return chosen.with_kept(QUALITIES[quality], kind)


def _first(published: Amount | None, default: Amount) -> Amount:
    return default if published is None else published
