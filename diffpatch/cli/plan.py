"""`diffpatch plan`: what a method will gain on a model at a size, before anything runs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from PIL import Image

import diffpatch
from diffpatch.cli import progress
from diffpatch.cli.errors import UsageError
from diffpatch.cli.options import arguments
from diffpatch.cli.output import check_writable
from diffpatch.cli.parameters import method_parameters
from diffpatch.cli.render import sheets
from diffpatch.eval.tuned.table import answer, describe
from diffpatch.files import staged, to_json
from diffpatch.patterns.drawing import KINDS, draw, tile_picture
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import preset_call, settings_of
from diffpatch.pipelines.shapes.find import find_shape
from diffpatch.planning.prediction import duration
from diffpatch.planning.profiles import load_profile
from diffpatch.planning.words import operations
from diffpatch.tables import table
from diffpatch.targets.settings import Settings

# Of a model that does not say.
USUAL = {"num_inference_steps": 50, "height": None, "width": None, "num_frames": 1}
PICTURES = (".png", ".webp", ".jpg")
WORTH = 1.05  # a step must gain this much before a method is recommended


def run(args: argparse.Namespace) -> int:
    """Print the plan or the comparison; returns the exit code."""
    if args.settings is not None or args.target is not None:
        return _tuned(args)
    if args.model is None:
        raise UsageError("give --model: a plan is of a model at a size")
    if args.method is None and args.set:
        raise UsageError("--set is about one method: name it with --method")
    if args.dtype and not args.device_profile:
        raise UsageError("--dtype is about times: name a device with --device-profile")
    folder = args.draw is not None and (args.draw.is_dir() or not args.draw.suffix)
    if args.draw and not folder and args.draw.suffix.lower() not in PICTURES:
        raise UsageError(f"--draw {args.draw} cannot be written: give {' or '.join(PICTURES)}")
    if args.draw:
        check_writable(args.draw if folder else args.draw.absolute().parent, "--draw")
    progress.hush_libraries()
    device = None if args.device_profile is None else load_profile(args.device_profile)
    shape = find_shape(args.model)  # once, for all methods
    _fill(args)
    if args.method is not None:
        values = method_parameters(args.method, args.set)
        made = _plan(args, shape, device, args.method, values)
        if args.draw:
            _draw(args, made, folder)
            progress.say(f"wrote {args.draw}")
        print(to_json(made.to_dict()) if args.json else made, end="" if args.json else "\n")
        return 0
    plans, refused = {}, {}
    for name in _comparable():
        try:
            plans[name] = _plan(args, shape, device, name, {})
        except diffpatch.DiffpatchError as error:
            refused[name] = str(error)
    if not plans:
        raise UsageError(next(iter(refused.values())))
    if args.draw:
        _draw_all(args, plans, folder)
        progress.say(f"wrote {args.draw}")
    plans = dict(sorted(plans.items(), key=lambda item: _cost(item[1])))
    if args.json:
        print(to_json([plan.to_dict() for plan in plans.values()]), end="")
        return 0
    print(_comparison(plans))
    missed = [
        f"{name} {made.missed_quality}" for name, made in plans.items() if made.missed_quality
    ]
    if missed:
        print(f"the nearest to --quality {args.quality} on this grid: {', '.join(missed)}")
    for name, why in refused.items():
        print(f"{name}: {why}")
    print(recommendation(plans, args.quality))
    return 0


def _tuned(args: argparse.Namespace) -> int:
    """What tuned settings say, and what a target comes to; nothing is planned anew."""
    arguments.check_target(args, args.method)
    settings = Settings.load(args.settings)
    found = answer(settings, args.target)
    if args.json:
        chosen = None if found.chosen is None else dataclasses.asdict(found.chosen)
        print(to_json({"target": found.target, "chosen": chosen, "refused": found.refused}), end="")
    else:
        print(describe(settings, found))
    return 0 if found.chosen is not None else 1


def _fill(args: argparse.Namespace) -> None:
    """Take the size and the steps that are not given from the pipeline of the model."""
    own: dict[str, Any] = {}
    try:
        source = loading.find(args.model)
        own = settings_of(preset_call(source), source)
    except diffpatch.DiffpatchError:  # a built-in shape, or a transformer alone
        pass
    for name, usual in USUAL.items():
        if getattr(args, name) is None:
            setattr(args, name, own.get(name, usual))
    for name in ("height", "width"):
        if getattr(args, name) is None:
            raise UsageError(f"give --{name}: {args.model} has no size of its own")


def _draw(args: argparse.Namespace, made: diffpatch.Plan, folder: bool) -> None:
    kinds = KINDS if folder else (args.draw_kind,)
    _save({kind: made.draw(kind, args.draw_query) for kind in kinds}, args.draw, folder)


def _draw_all(args: argparse.Namespace, plans: dict[str, diffpatch.Plan], folder: bool) -> None:
    """Every method's picture on one sheet, or a sheet for each kind of picture in a folder."""
    sheet = {}
    for kind in KINDS if folder else (args.draw_kind,):
        pictures = {
            f"{name}, {plan.kept_sparse:.1%} kept": tile_picture(plan.patterns[0], 400)
            if kind == "tiles"
            else draw(plan.patterns[0], kind, query=args.draw_query)
            for name, plan in plans.items()
            # Where the data decide, or nothing is left out, there is nothing to see.
            if plan.patterns and plan.patterns[0].kept < 1 and plan.kept_sparse < 1
        }
        sheet[kind] = sheets.named(pictures)
    _save(sheet, args.draw, folder)


def _save(pictures: dict[str, Image.Image], path: Path, folder: bool) -> None:
    """The pictures by kind in a folder, or the only one as a file."""
    with staged(path if folder else path.absolute().parent) as stage:
        for kind, picture in pictures.items():
            picture.save(stage / (f"{kind}.png" if folder else path.name))


def _comparable() -> list[str]:
    """Every method, and those that wrap another one over radial and neighborhood."""
    known = diffpatch.list_methods()
    wrappers = [n for n, info in known.items() if info.wraps]
    plain = [n for n in known if n not in wrappers and n != "dense"]
    return plain + [f"{n}+{w}" for w in wrappers for n in ("radial", "neighborhood")]


def _plan(
    args: argparse.Namespace, shape: Any, device: Any, method: str, params: dict[str, Any]
) -> diffpatch.Plan:
    return diffpatch.plan(
        shape,
        method,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        references=args.reference,
        num_inference_steps=args.num_inference_steps,
        dense_steps=args.dense_steps,
        dense_layers=args.dense_layers,
        dense_last_steps=args.dense_last_steps,
        quality=args.quality,
        profile=device,
        dtype=args.dtype,
        backend=_backend(args.backend) if device is None else None,
        **params,
    )


def _backend(asked: str) -> str:
    """Whose tiles are counted: the backend asked for, or the one that runs on this machine."""
    if asked == "auto":
        return "torch" if loading.choose_device().type == "cpu" else "triton"
    return asked


def _gain(plan: diffpatch.Plan) -> float:
    """The speedup of the transformer: predicted, or the bound by what is computed."""
    return plan.computed_speedup if plan.predicted is None else plan.predicted.step_speedup


def _cost(plan: diffpatch.Plan) -> tuple[bool, bool, float]:
    """For an order from the cheapest on; last what is only bounded, and what would be refused."""
    return not plan.fits, plan.predicted is None, -_gain(plan)


def _comparison(plans: dict[str, diffpatch.Plan]) -> str:
    first = next(iter(plans.values()))
    device = first.predicted  # predicted ones come first
    header = ["", "kept / sparse call", "computed", "kept / run", "attention ≤", "step ≤", "state"]
    if device is not None:
        header[6:6] = ["attention, predicted", "step, predicted", "a step"]
    rows = [header]
    for name, plan in plans.items():
        row = [
            name,
            ("≤ " if plan.at_most else "") + f"{plan.kept_sparse:.1%}",
            "" if plan.computed is None else f"{plan.computed:.1%}",
            f"{plan.kept:.1%}",
            f"{plan.attention_speedup:.2f}×",
            f"{plan.step_speedup:.2f}×",
            f"{plan.state_bytes / 2**20:,.0f} MiB" if plan.state_bytes else "",
        ]
        if not plan.fits:
            row[6] += ": refused"
        if plan.at_most:  # the data decide how much more
            row[4:6] = [f"{plan.attention_speedup:.2f}× +", f"{plan.step_speedup:.2f}× +"]
        if device is not None:
            row[6:6] = ["", "", ""] if plan.predicted is None else _times(plan)
        rows.append(row)
    lines = [
        f"{first.model}: grid {first.grid} = {first.tokens:,} tokens, {first.steps} steps,"
        f" attention {first.attention_share:.0%} of a dense step's"
        f" {operations(first.dense_step_flops)}",
        table(rows),
    ]
    if device is None:
        lines.append(
            "≤: bounds on speedups by operations; computed: pairs in the blocks of the"
            f" {first.backend} backend, by which methods are ranked; --device-profile predicts"
            " times"
        )
    else:
        how = "fitted to measurements" if device.calibrated else (
            "UNCALIBRATED: at published peaks, which no kernel reaches; trust the order, not the"
            " seconds (`diffpatch bench profile` measures your device)"
        )  # fmt: skip
        lines.append(
            f"≤: bounds by operations; predicted for {device.device} in {device.dtype}, {how};"
            f" a dense step: {duration(device.dense_step_seconds)}"
        )
    return "\n".join(lines)


def _times(plan: diffpatch.Plan) -> list[str]:
    assert plan.predicted is not None
    made = plan.predicted
    return [
        f"{made.attention_speedup:.2f}×",
        f"{made.step_speedup:.2f}×",
        duration(made.step_seconds),
    ]


def recommendation(plans: dict[str, diffpatch.Plan], quality: str | None) -> str:
    """Which method to use, as far as cost can tell."""
    name, best = min(plans.items(), key=lambda item: _cost(item[1]))
    gain = _gain(best)
    level = f"at quality {quality!r}" if quality else "at the methods' published settings"
    how = "by what is computed" if best.predicted is None else "predicted"
    if gain < WORTH:
        return (
            f"which one? none: the best, {name}, gains {gain:.2f}× a step ({how}); attention is too"
            " small a part at this size"
        )
    fair = "" if quality else ", which keep different fractions (--quality makes them similar)"
    return (
        f"which one? {name} is the fastest {level}{fair}: {gain:.2f}× a step ({how})."
        " Equal fractions do not mean equal quality: `diffpatch sweep` compares that"
    )
