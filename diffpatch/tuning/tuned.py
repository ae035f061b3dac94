"""Tuning a model once: what was found out is kept in the user's cache folder and read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from diffpatch.checking import checked
from diffpatch.errors import BadParameter
from diffpatch.patching.target import transformers
from diffpatch.targets.settings import Settings, fingerprint
from diffpatch.tuning.front import OnAdvance, measure_front
from diffpatch.tuning.tune import Progress, tune
from diffpatch.tuning.unfinished import digest_of


@checked()
def tuned(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    on_progress: Progress | None = None,
    on_clip: OnAdvance | None = None,
    **options: Any,
) -> Settings:
    """The settings of a model: read where they were found out before, else tuned and kept.

    ::

        diffpatch.patch(pipe, settings=diffpatch.tuned(pipe, prompts), target="30 dB")

    The first call takes as long as `tune` and `measure_front`; stopped, it goes on when it is
    called again. Later ones, with the same weights, prompts and arguments, read a file.

    Args:
        pipe: a diffusers pipeline of a known family.
        prompts: as in `tune`.
        call: as there; size and steps are part of what the settings are kept for.
        seed: of the noise.
        folder: where files are kept; None takes ``diffpatch/settings`` in the user's cache folder.
        on_progress: as in `tune`.
        on_clip: ``on_progress`` of `measure_front`.
        **options: ``sparse``, ``dense_steps``, ``caches`` and ``holds`` of `measure_front`.

    Raises:
        BadParameter, UnknownFamily: as in `tune` and `measure_front`.
    """
    unknown = sorted(set(options) - {"sparse", "dense_steps", "caches", "holds"})
    if unknown:
        raise BadParameter(
            f"tuned: unknown argument {unknown[0]!r}: sparse, dense_steps, caches and holds are"
            " known"
        )
    found = {name: model for name, model, _ in transformers(pipe, None)}
    dtypes = sorted({str(model.dtype) for model in found.values()})
    digest = digest_of(fingerprint(found), dtypes, list(prompts), call, seed, options)
    if folder is None:
        folder = Path(platformdirs.user_cache_dir("diffpatch", appauthor=False)) / "settings"
    path = Path(folder) / f"{type(pipe).__name__}-{digest[:16]}.json"
    if (known := finished(path)) is not None:
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = path.with_suffix(".curves.json")
    settings = finished(curves)
    if settings is None:
        settings = tune(
            pipe, prompts, call=call, seed=seed, pairs=0, path=curves, on_progress=on_progress
        )
    settings = measure_front(
        pipe, settings, call=call, seed=seed, path=path, on_progress=on_clip, **options
    )
    curves.unlink(missing_ok=True)
    return settings


def finished(path: Path) -> Settings | None:
    """The settings of a file that only we read; None if it is not there.

    One that is damaged, or of another version, is removed: what it held is measured again.
    """
    if not path.is_file():
        return None
    try:
        return Settings.load(path)
    except BadParameter:
        path.unlink()
        return None
