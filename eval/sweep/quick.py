"""A sweep that needs no file: what to compare on a model, where nobody said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import diffpatch
from diffpatch.eval.sweep.schema import BadSweep
from diffpatch.files import write_text
from diffpatch.pipelines.running.calls import preset_call, steps_of
from diffpatch.pipelines.running.loading import Source

# The most promising first: a time budget may end before the last.
CANDIDATES = ("dynamic", "radial", "neighborhood", "linear", "sliding_tile", "window")
KEPT = (0.5, 0.25)
HOLD = 0.005  # tolerance of held steps beside them: in long runs they gain most
MANY_STEPS = 16
FIRST_STEPS = 0.1  # of the run stays dense: the first steps decide what is in the picture
SIZES = ("height", "width", "num_frames")
FILE = "sweep.yaml"


def quick_sweep(
    source: Source,
    prompts: Sequence[str],
    *,
    image: Path | None = None,
    call: Mapping[str, Any] | None = None,
    kept: Sequence[float] = KEPT,
    **more: Any,
) -> dict[str, Any]:
    """What its YAML file would hold: every method that suits the model, fitted to equal costs.

    Args:
        source: the model.
        prompts: what to render.
        image: the first frame, for models that start from one.
        call: height, width, num_frames and num_inference_steps, where the model's own are not
            wanted.
        kept: fractions of the pairs of a run that every method is fitted to.
        **more: further keys, such as dtype.

    Raises:
        BadSweep: the model has no size of its own.
    """
    known = source.arguments
    wanted = {**preset_call(source), **(call or {})}
    sizes = {key: wanted.get(key) or known.get(key) for key in SIZES if key in known}
    if lacking := [f"--{key.replace('_', '-')}" for key, size in sizes.items() if size is None]:
        raise BadSweep(f"{source.name} has no size of its own: give {' and '.join(lacking)}")
    steps = steps_of(wanted, source) or 50
    held = [{"method": "dense", "hold": [HOLD], "kept": []}] if steps >= MANY_STEPS else []
    shown: list[Any] = list(prompts)
    if image is not None:
        shown = [{"prompt": prompt, "image": str(image.absolute())} for prompt in prompts]
    spec = {
        "title": f"Which method makes {source.name} faster?",
        "model": source.name,
        "prompts": shown,
        "sizes": sizes,
        "schedules": {"dense_steps": round(FIRST_STEPS * steps), "dense_layers": 0},
        "methods": [*held, *suitable(source)],
        "kept": list(kept),
        "noise_floor": [],
    }
    if call and "num_inference_steps" in call:
        spec["steps"] = call["num_inference_steps"]
    return spec | more


def suitable(source: Source) -> list[str]:
    """The methods to compare on a model, the most promising first."""
    known, kind = diffpatch.list_methods(), "video" if source.is_video else "image"
    return [name for name in CANDIDATES if name in known and kind in known[name].cls().kinds]


def keep_file(spec: Mapping[str, Any], folder: Path) -> Path:
    """Write the file for later into the folder of the sweep; returns its path.

    Raises:
        BadSweep: another sweep is there.
    """
    path = folder / FILE
    text = yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True, width=96)
    # The first line names the folder as it was called from, which is not about the sweep.
    if path.is_file() and path.read_text("utf-8", errors="replace").partition("\n")[2] != text:
        raise BadSweep(
            f"{path} describes another sweep: choose another -o, or go on with"
            f" `diffpatch sweep {path} -o {folder}`"
        )
    write_text(path, f"# diffpatch sweep {path} -o {folder}\n{text}")
    return path
