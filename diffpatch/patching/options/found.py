"""Weights of sparse attention that lie in the folder a model was loaded from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffpatch.methods.learned import checkpoint, files
from diffpatch.methods.registry import MethodLike

logger = logging.getLogger(__name__)


def with_found_weights(
    target: Any, model: Any, method: MethodLike, params: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters of "dynamic" or "linear" with the weights that the model has, if found.

    diffusers passes over them as it loads the folder, so that nothing else tells of them. Where a
    caller asks for something else than the weights allow, they are left alone, with a warning.

    Args:
        target: the pipeline or the transformer.
        model: its transformer.
        method: what is asked for; all but the name "dynamic" have their parameters already.
        params: parameters given by the caller.
    """
    given = dict(params)
    if "weights" in given or not isinstance(method, str) or method not in _HOLDS:
        return given
    folders = filter(None, map(_folder, (target, model)))
    folder = next(filter(_HOLDS[method], folders), None)
    if folder is None:
        return given
    if others := sorted(given.keys() - {"kept", "near"}):
        logger.warning(
            "%s holds weights of the sparse attention it was trained with; %s=%r goes without them",
            folder, others[0], given[others[0]],
        )  # fmt: skip
        return given
    return given | {"weights": folder}


def _folder(loaded: Any) -> str | None:
    """The folder that something was loaded from, if it is on this disk."""
    name = getattr(getattr(loaded, "config", None), "_name_or_path", None)
    if not isinstance(name, str | Path) or not str(name) or not Path(name).is_dir():
        return None
    return str(name)


# Method -> whether a folder holds weights for it.
_HOLDS: dict[str, Callable[[str], bool]] = {
    "dynamic": checkpoint.is_trained,
    "linear": lambda folder: (Path(folder) / files.FILE).is_file(),
}
