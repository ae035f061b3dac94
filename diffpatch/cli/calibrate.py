"""`diffpatch calibrate`: thresholds of temporal attention for a model, from one prompt."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import time
from collections.abc import Iterator
from typing import Any

import diffpatch
from diffpatch.cli import generation, progress
from diffpatch.cli.errors import UsageError
from diffpatch.cli.options import arguments
from diffpatch.cli.parameters import method_parameters
from diffpatch.files import to_json
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import fitted_call


def run(args: argparse.Namespace) -> int:
    """Calibrate and print; returns the exit code."""
    if not args.method.endswith("temporal"):
        raise UsageError(
            f"--method {args.method} has no thresholds: give --method {args.method}+temporal"
        )
    # Before loading, so that what is wrong is found at once. A mode that the user gave comes last.
    parameters = method_parameters(args.method, ["mode=skip", *args.set])
    progress.hush_libraries()
    source = loading.find(args.model)
    call = generation.call_arguments(args, source)
    pipe = generation.load(source, generation.load_options(args))
    with _bar(source, args.quiet) as watched:
        try:
            found = diffpatch.calibrate(
                pipe,
                args.method,
                prompt=args.prompt,
                call=fitted_call(call, pipe) | watched,
                max_error=args.max_error,
                spread=args.spread,
                seed=args.seed,
                **arguments.method_options(args),
                **parameters,
            )
        except diffpatch.BadParameter as error:  # in the words of the command line
            said = str(error).replace("max_error", "--max-error").replace("spread=", "--spread ")
            raise UsageError(said) from error
    options = _options(args, found.threshold)
    if args.json:
        print(to_json(found.to_dict() | {"options": options}), end="")
    else:
        print(f"{found}\n\n{options}")
    return 0


@contextlib.contextmanager
def _bar(source: loading.Source, quiet: bool) -> Iterator[dict[str, Any]]:
    """What a pipeline call takes to advance a bar; how many runs it needs, nobody knows before."""
    if "callback_on_step_end" not in source.arguments:
        yield {}
        return
    with progress.steps("calibrating", None, None, quiet) as advance:
        last = time.monotonic()

        def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal last
            now = time.monotonic()
            advance(step, now - last)
            last = now
            return tensors

        yield {"callback_on_step_end": ended}


def _options(args: argparse.Namespace, threshold: tuple[float, ...]) -> str:
    """What other commands take to use the result."""
    own = [text for text in args.set if text.split("=")[0] not in ("mode", "threshold")]
    sets = ["mode=skip", f"threshold={','.join(f'{t:g}' for t in threshold)}", *own]
    words = ["--method", args.method, *(w for text in sets for w in ("--set", text))]
    for name in ("quality", "dense_steps", "dense_layers", "dense_last_steps"):
        value = getattr(args, name)
        if value is not None and (value or name != "dense_last_steps"):  # 0 is not the default
            # Layer numbers have a comma even if there is only one; none of them is 0 layers.
            text = "".join(f"{n}," for n in value) if isinstance(value, list) else str(value)
            words += ["--" + name.replace("_", "-"), text or "0"]
    return shlex.join(words)
