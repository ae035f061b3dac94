"""From tuned settings, and what a caller wants of them, to what is done to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffpatch.errors import BadParameter, choices
from diffpatch.patching.options.settle import QUALITIES
from diffpatch.targets.choice import Chosen, choose_for, chosen_for
from diffpatch.targets.front import Applied
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target


def from_settings(
    models: Mapping[str, torch.nn.Module],
    settings: str | Path | Settings | None,
    target: str | None,
    quality: str | None,
    given: Sequence[str],
) -> tuple[Settings, Chosen]:
    """The settings, and what they come to for a target or a level of quality.

    Args:
        models: the transformers that are patched, by name.
        settings: a file that was tuned, or what it holds.
        target: such as "30 dB".
        quality: a level of `QUALITIES`, which sparse calls keep; no step is cached or held then.
        given: what the caller said about the method, which settings choose.

    Raises:
        BadParameter: settings or target are missing, something is said twice, the settings are not
            of these models, or the target cannot be reached.
    """
    if settings is None:
        raise BadParameter(
            f"target={target!r} needs settings=: a file that `diffpatch tune` wrote for this model,"
            " or diffpatch.tuned(pipe, prompts)"
        )
    if (target is None) == (quality is None):
        both = f", not beside quality={quality!r}" if quality is not None else ""
        raise BadParameter(f"settings= needs target=, such as '30 dB', 'kept 0.25' or '2x'{both}")
    if given:
        raise BadParameter(
            f"target={target or quality!r} chooses the method and its parameters: leave out"
            f" {', '.join(given)}"
        )
    loaded = settings if isinstance(settings, Settings) else Settings.load(settings)
    loaded.check_model(models)
    if target is not None:
        return loaded, choose_for(loaded, Target.parse(target))
    if quality is None or quality not in QUALITIES:
        raise BadParameter(f"unknown quality {quality!r}: {choices(str(quality), QUALITIES)}")
    return loaded, chosen_for(loaded, Applied(QUALITIES[quality], loaded.measured_on.dense_steps))


def promised(choice: Chosen, wanted: str | None, dense: Mapping[str, Any]) -> str:
    """What the report says of a choice: what it is for, and is predicted to give.

    Args:
        choice: for the target.
        wanted: the target, or the level of quality.
        dense: what the caller says of dense steps and layers, by the names of `patch`.
    """
    usual = {"dense_steps": choice.dense_steps}
    other = [
        f"{name}={value!r}"
        for name, value in dense.items()
        if choice.budgets and value is not None and (value or 0) != usual.get(name, 0)
    ]
    said = f"chosen for {wanted!r}: {choice.promise}"
    return f"{said}; that is not about {', '.join(other)}" if other else said
