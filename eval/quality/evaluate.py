"""Quality of folders against a reference folder, and of methods against dense runs of a model.

Every result has a floor: what dense against dense gives, below which no difference means anything.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffpatch import patched, report
from diffpatch.checking import refuse_dense
from diffpatch.eval.environment import environment
from diffpatch.eval.processes import Process
from diffpatch.eval.quality import items
from diffpatch.eval.quality.distances import compare, halves
from diffpatch.eval.quality.scores import Tools
from diffpatch.eval.quality.tally import Tally, measure
from diffpatch.internals import execution_device
from diffpatch.pipelines.running.sampling import named, sample, warm_up

Say = Callable[[str], None]
Keep = Callable[[str, int, torch.Tensor], None]
OTHER_NOISE = 1_000_003  # added to a seed for the floor of other noise
ARITHMETIC, NOISE = "dense, other arithmetic", "dense, other noise"
HALVES = "reference, halves"


def evaluate_folders(
    folders: Mapping[str, Path],
    reference: Path,
    tools: Tools,
    *,
    floor: Path | None = None,
    captions: Mapping[str, str] | None = None,
    process: Process = Process(),  # noqa: B008
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Compare folders of pictures or clips with a reference folder, file by file and as sets.

    Args:
        folders: name of a row -> its folder.
        reference: the folder with the dense files.
        tools: the networks.
        floor: dense once more, from other noise or on another machine. Without it, the floor is
            the distance between the two halves of the reference, and there is none for pairs.
        captions: prompts by the names in the reference folder; missing ones are looked up in the
            render.json beside a file.
        process: one of those that share the files; each returns the whole result.
        say: told what comes next.

    Raises:
        ItemError: files do not fit each other, or cannot be read.
    """
    dense = items.find_items(reference)
    chosen = dict(folders) if floor is None else {"floor": floor, **folders}
    pairs = {name: items.match(items.find_items(path), dense) for name, path in chosen.items()}
    notes = [_unmatched(name, found, len(dense)) for name, found in pairs.items()]
    texts = {} if captions is None else captions
    prompts = {name: texts.get(name) or items.prompt_beside(path) for name, path in dense.items()}
    used = {path: name for name, path in dense.items()}
    say(f"measuring {len(dense)} of {reference}")
    base = _together(process, [
        measure(name, items.read_frames(path), tools, prompt=prompts[name])
        for name, path in process.mine(list(dense.items()))
    ])  # fmt: skip
    rows = [base.row("reference", role="reference")]
    if floor is None and len(dense) > 1:
        rows.append(_halves(base))
    for row, found in pairs.items():
        say(f"measuring {len(found)} of {chosen[row]}")
        parts = []
        for own, other in process.mine(list(found.values())):
            name = used[other]
            frames, wanted = items.read_frames(own), items.read_frames(other)
            if frames.shape != wanted.shape:
                raise items.ItemError(
                    f"{own} has frames {tuple(frames.shape)}, {other} has {tuple(wanted.shape)},"
                    " (F, 3, H, W): render both with the same size and number of frames"
                )
            parts.append(measure(name, frames, tools, prompt=prompts[name], reference=wanted))
        role = "floor" if row == "floor" and floor is not None else "candidate"
        rows.append(_together(process, parts).row(row, base, role=role, folder=str(chosen[row])))
    notes.append(_lossy({p for found in pairs.values() for pair in found.values() for p in pair}))
    if floor is None:
        notes.append(NO_FLOOR)
    return _result("folders", rows, tools, base.reasons(), [note for note in notes if note])


def evaluate_model(
    pipe: Any,
    call: Mapping[str, Any],
    prompts: Sequence[str],
    methods: Mapping[str, Mapping[str, Any]],
    tools: Tools,
    *,
    seed: int = 0,
    process: Process = Process(),  # noqa: B008
    keep: Keep = lambda row, number, frames: None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Render every prompt dense and with each method, and compare in memory.

    Clip i starts from the noise of seed + i in every row but the floor of other noise. There are
    two floors: dense with another implementation of attention, which is what rounding alone does,
    and dense from other noise, which is what chance alone does to sets.

    Args:
        pipe: an unpatched pipeline.
        call: its arguments, without the prompt.
        prompts: what to render.
        methods: method name -> options for `diffpatch.patch`.
        tools: the networks.
        seed: of the first clip.
        process: one of those that share the prompts; each returns the whole result.
        keep: given the row, the number of the prompt and the frames of every clip.
        say: told what comes next.

    Raises:
        NonFiniteOutput: a row yields NaN or infinity; it names the row, the prompt and the seed.
        BadParameter: a method is called "dense", as what all are compared with is.
    """
    refuse_dense(methods)
    call = dict(call)
    for name, options in methods.items():  # settings that cannot work fail before the dense runs
        say(f"warming up {name}")
        every = {**options, "dense_steps": 0, "dense_last_steps": 0}
        with named(f"warming up {name}"), patched(pipe, name, **every):
            warm_up(pipe, call | {"prompt": prompts[0]}, seed)
    tallies: dict[str, list[Tally]] = {n: [] for n in ("dense", ARITHMETIC, NOISE, *methods)}
    kept: dict[str, dict[int, float]] = {name: {} for name in methods}
    mine, started = process.mine(list(enumerate(prompts))), time.monotonic()
    for done, (number, prompt) in enumerate(mine):
        name, one = f"{number:04d}", call | {"prompt": prompt}
        reference: torch.Tensor | None = None
        for row, parts in tallies.items():
            left = _left(done, len(mine), started)
            say(f"prompt {number + 1} of {len(prompts)}: {row}{left}")
            start = seed + number + (OTHER_NOISE if row == NOISE else 0)
            with named(row), _variant(pipe, row, methods):
                frames = sample(pipe, one, start).frames
                if row in methods:
                    kept[row][number] = report(pipe).kept
            keep(row, number, frames)
            parts.append(measure(name, frames, tools, prompt=prompt, reference=reference))
            reference = frames if reference is None else reference
    merged = {row: _together(process, parts) for row, parts in tallies.items()}
    shares = {row: {n: s for part in process.gather(own) for n, s in part.items()}
              for row, own in kept.items()}  # fmt: skip
    base = merged["dense"]
    rows = [base.row("dense", role="reference", kept=1.0)]
    rows += [merged[row].row(row, base, role="floor", kept=1.0) for row in (ARITHMETIC, NOISE)]
    rows += [
        merged[row].row(row, base, role="method", kept=_mean(shares[row]), options=dict(options))
        for row, options in methods.items()
    ]
    result = _result("model", rows, tools, base.reasons(), [], execution_device(pipe))
    plain = {key: value for key, value in call.items() if isinstance(value, str | int | float)}
    return {"prompts": list(prompts), "seed": seed, "call": plain, **result}


@contextlib.contextmanager
def _variant(pipe: Any, row: str, methods: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """The pipeline as a row wants it."""
    if row in methods:
        with patched(pipe, row, **methods[row]):
            yield
    elif row == ARITHMETIC:
        # Neither is what torch takes by itself; the plain one would need memory for every pair.
        on_cpu = execution_device(pipe).type == "cpu"
        with sdpa_kernel(SDPBackend.MATH if on_cpu else SDPBackend.EFFICIENT_ATTENTION):
            yield
    else:
        yield


def _together(process: Process, parts: Sequence[Tally]) -> Tally:
    """The clips of all processes."""
    return Tally().merge(*process.gather(Tally().merge(*parts)))


def _left(done: int, total: int, started: float) -> str:
    """How long the prompts that are left will take, once one is done."""
    if not done:
        return ""
    seconds = (time.monotonic() - started) / done * (total - done)
    return f" (about {max(1, round(seconds / 60))} min left)"


def _mean(values: Mapping[int, float]) -> float:
    return math.fsum(values.values()) / len(values)


def _halves(base: Tally) -> dict[str, Any]:
    sets = {maker: compare(*halves(found)) for maker, found in base.features.items()}
    return {
        "name": HALVES, "role": "floor", "count": len(base.scores), "scores": {},
        "sets": sets, "items": {},
    }  # fmt: skip


def _unmatched(name: str, found: Mapping[str, Any], total: int) -> str:
    if len(found) == total:
        return ""
    return f"{name}: {len(found)} of the {total} files of the reference have a partner"


def _lossy(files: Collection[Path]) -> str:
    lossy = sum(items.is_lossy(path) for path in files if path.is_file())
    if not lossy:
        return ""
    return (
        f"{lossy} of {len(files)} files are lossy (mp4, jpg, gif, animated webp), which alone "
        "costs PSNR; compare png, apng or npy"
    )


def _result(
    kind: str,
    rows: list[dict[str, Any]],
    tools: Tools,
    missing: Mapping[str, str],
    notes: list[str],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    if any(found["small_sample"] for row in rows for found in row["sets"].values()):
        notes = [*notes, SMALL]
    return {
        "kind": kind,
        "rows": rows,
        "missing": dict(missing),
        "notes": notes,
        "tools": tools.names(),
        "environment": environment(device),
    }


NO_FLOOR = "pairs have no floor here; give dense once more, from elsewhere, with --floor FOLDER"
SMALL = (
    "fewer than two rows per feature: these Fréchet distances are mostly bias; compare them only "
    "with the floor, or use more clips"
)
