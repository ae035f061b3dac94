"""What errors of attention do to a prediction, and guidance to that: `linear` beside `radial`.

    python examples/guided_errors.py -o guided_errors.json    # about 10 minutes

Renders captions of the demo dense and keeps what each forward was given. The methods, set to the
same kept fraction and with nothing dense, then answer the same forwards, so that errors of steps do
not add up. Prints a table and writes it with versions, device and commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

import diffpatch
from diffpatch.eval.environment import environment
from diffpatch.eval.medians import paired_interval
from diffpatch.files import write_json
from diffpatch.pipelines.running.calls import fitted_call, preset_call
from diffpatch.pipelines.running.loading import find, load_pipeline
from diffpatch.pipelines.running.sampling import sample
from diffpatch.planning.fit import fit_kept
from diffpatch.tables import table

CAPTIONS = Path(__file__).with_name("dynamic.yaml")  # that no rule was designed with
METHODS = ("linear", "radial")
# Relative L1 of attention; relative L2 of the predictions with the prompt and without (c and u),
# of the guided one, u + scale · (c − u), and of c − u.
COLUMNS = ("attention", "with prompt", "without", "guided", "difference")

Forward = tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]  # its arguments, and its output


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Errors of attention, predictions and guidance.")
    parser.add_argument("-m", "--model", default="demo", help="one of the demos (demo)")
    parser.add_argument("-p", "--prompt", nargs="+", help="captions (the 12 of dynamic.yaml)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps (8)")
    parser.add_argument("--kept", type=float, default=0.25, help="fraction of the pairs (0.25)")
    parser.add_argument("-o", "--output", type=Path, default=Path("guided_errors.json"))
    args = parser.parse_args(argv)
    source = find(args.model)
    pipe = load_pipeline(source)
    wanted = {**preset_call(source), "num_inference_steps": args.steps}
    sizes = {name: wanted[name] for name in ("height", "width", "num_frames")}
    grid = diffpatch.plan(pipe, "dense", **sizes).grid
    call = fitted_call(wanted, pipe)  # of which Wan's pipeline makes as many frames as are wanted
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for prompt in args.prompt or yaml.safe_load(CAPTIONS.read_text(encoding="utf-8"))["prompts"]:
        steps = recorded(pipe, call | {"prompt": prompt})
        for name, found in rows.items():
            method = fit_kept(name, grid, args.kept)
            wrong = errors(pipe.transformer, method, steps, call["guidance_scale"])
            found.append({"caption": prompt, **wrong})
    between = apart(rows)
    print(shown(rows, between))
    about = {"environment": environment(), "model": args.model, "call": call, "kept": args.kept}
    write_json(args.output, {**about, "rows": rows, "apart": between})
    print(f"wrote {args.output}")


def recorded(pipe: Any, call: dict[str, Any]) -> list[tuple[Forward, Forward]]:
    """The forwards of a dense run with the prompt and without, step by step."""
    found: list[Forward] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        found.append((args, kwargs, output[0]))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        sample(pipe, call, 0)
    finally:
        handle.remove()
    return list(zip(found[::2], found[1::2], strict=True))


@torch.no_grad()
def errors(
    model: Any, method: diffpatch.Method, steps: Sequence[tuple[Forward, Forward]], scale: float
) -> dict[str, float]:
    """The means over steps of every column, as fractions of what dense gives."""
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS[1:]}
    with (
        diffpatch.patched(model, method, dense_steps=0, dense_layers=0),
        diffpatch.attention_error(model) as found,
    ):
        for first, second in steps:
            prompt, none = (model(*args, **kwargs)[0] for args, kwargs, _ in (first, second))
            mine = made(prompt, none, scale)
            dense = made(first[2], second[2], scale)
            for name, own, right in zip(columns, mine, dense, strict=True):
                columns[name].append(float((own - right).norm() / right.norm()))
    return {"attention": found.mean, **{name: fmean(column) for name, column in columns.items()}}


def made(prompt: torch.Tensor, none: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """What the last four columns are errors of."""
    difference = prompt - none
    return prompt, none, none + scale * difference, difference


def apart(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How much larger errors of the first method are than those of the second, over captions."""
    pairs = list(zip(*rows.values(), strict=True))
    return {
        column: paired_interval([one[column] - other[column] for one, other in pairs])
        for column in COLUMNS
    }


def shown(rows: dict[str, list[dict[str, float]]], between: dict[str, dict[str, float]]) -> str:
    """Means over captions, and how far the methods are apart."""
    lines = [["", *COLUMNS]]
    for name, each in rows.items():
        lines.append([name, *(f"{fmean(one[column] for one in each):.1%}" for column in COLUMNS)])
    intervals = (between[column] for column in COLUMNS)
    lines.append(["apart", *(f"{x['low']:+.1%} to {x['high']:+.1%}" for x in intervals)])
    return table(lines)


if __name__ == "__main__":
    main()
