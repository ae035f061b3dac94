"""What the commands share: the types of values, the groups of options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffpatch.checking import SEEDS
from diffpatch.cli.errors import UsageError
from diffpatch.cli.options import names
from diffpatch.errors import BadParameter
from diffpatch.targets.target import Target

Run = Callable[[argparse.Namespace], int]

MODEL_HELP = "demo, demo-long, a folder that save_pretrained wrote, or a hub id such as owner/name"


def later(module: str, name: str = "run") -> Run:
    """A function of a module that is loaded when it is called."""
    return lambda args: int(getattr(importlib.import_module(module), name)(args))


def number(
    kind: type[int] | type[float], at_least: float, below: float = float("inf")
) -> Callable[[str], Any]:
    """A type of numbers with a lower limit, and perhaps a limit that they stay below."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not at_least <= value < below:
            noun = "a whole number" if kind is int else "a number"
            limit = "" if below == float("inf") else f" and below {below}"
            raise argparse.ArgumentTypeError(
                f"{text!r} must be {noun} of at least {at_least}{limit}"
            )
        return value

    return parse


def fraction(text: str) -> float:
    """A share of the pairs, such as 0.25."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a fraction of the pairs in (0, 1], such as 0.25"
        )
    return value


def amount(text: str) -> int | float:
    """A count such as 12, or a fraction such as 0.25."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a count such as 12 or a fraction such as 0.25"
        )
    return value


def layers(text: str) -> int | float | list[int]:
    """A count, a fraction, or layer numbers such as 0,1,39 (a single one with a comma: 5,)."""
    if "," not in text:
        return amount(text)
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be layer numbers such as 0,1,39") from None


def existing_file(text: str) -> Path:
    """A file that is there, or a pipe such as the shell's <(…)."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def backend(text: str) -> str:
    """The name of a backend; an unknown one is the same error here as in Python."""
    from diffpatch.kernels.block_sparse.backends import check_backend

    try:
        check_backend(text)
    except BadParameter as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_method_options` asked for beside --set, as `diffpatch.patch` takes it."""
    wanted = ("quality", "dense_steps", "dense_layers", "dense_last_steps", "backend")
    return {name: getattr(args, name) for name in wanted}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """--set, --quality, --dense-steps, --dense-layers, --dense-last-steps, --backend."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the method, repeatable; `diffpatch methods` lists them",
    )
    group.add_argument(
        "--quality",
        choices=names.QUALITIES,
        help="sparse calls keep about 50, 25 or 12.5 %% of the pairs, unless --set says how much",
    )
    group.add_argument(
        "--dense-steps",
        type=amount,
        metavar="N",
        help="first denoising steps that stay dense: a count (12) or a fraction (0.25) (as"
        " published for the model and method, else the method's own)",
    )
    group.add_argument(
        "--dense-layers",
        type=layers,
        metavar="N",
        help="first layers that stay dense: a count, a fraction, or layer numbers (0,1,39) (as"
        " for --dense-steps)",
    )
    group.add_argument(
        "--dense-last-steps",
        type=amount,
        default=0,
        metavar="N",
        help="last denoising steps that stay dense: a count or a fraction (0)",
    )
    add_backend_option(group)


def add_hold_option(parser: argparse.ArgumentParser) -> None:
    """--hold."""
    parser.add_argument_group("steps").add_argument(
        "--hold", type=number(float, 1e-6), metavar="T",
        help="hold steps: give the transformer's last result again, without running it, while that"
        " leads astray by at most this fraction of it (such as 0.005); --method dense holds steps"
        " alone",
    )  # fmt: skip


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """--settings, --target."""
    group = parser.add_argument_group("settings for a target")
    group.add_argument(
        "--settings", type=existing_file, metavar="FILE",
        help="file of settings that `diffpatch tune` wrote for this model; chooses the method",
    )  # fmt: skip
    group.add_argument("--target", help="what to choose: '30 dB', '2x', 'kept 0.25' or 'error 5%%'")


def check_target(args: argparse.Namespace, method: str | None) -> None:
    """Refuse a target without settings, settings without a target, and a method beside both.

    Raises:
        UsageError: says what to give.
        BadParameter: the target is not one.
    """
    if args.settings is not None and getattr(args, "hold", None) is not None:
        raise UsageError("--target chooses which steps are held: leave out --hold")
    if (args.settings is None) != (args.target is None):
        raise UsageError(
            "--settings and --target go together: --settings FILE that `diffpatch tune` wrote,"
            " --target '30 dB'"
        )
    if args.settings is None:
        return
    Target.parse(args.target)
    given = {"--method": method, "--set": args.set, "--quality": args.quality}
    if named := [option for option, value in given.items() if value]:
        raise UsageError(f"--target chooses the method and its parameters: drop {named[0]}")


def add_backend_option(group: Any) -> None:
    """--backend."""
    group.add_argument(
        "--backend",
        type=backend,
        default="auto",
        metavar=f"{{{','.join(names.BACKENDS)}}}",
        help="implementation of the attention (auto)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", "--model-id", default="demo", help=f"{MODEL_HELP} (demo)")
    group.add_argument(
        "--dtype",
        choices=("auto", *names.DTYPES),
        default="auto",
        help="of the weights (auto: fp32 on the CPU, else bf16)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (the accelerator, if there is one)")
    group.add_argument(
        "--offload",
        choices=names.OFFLOADS,
        default="none",
        help="keep idle weights in main memory: of whole models, single layers or groups of layers"
        " (none)",
    )
    group.add_argument("--vae-tiling", action="store_true", help="decode in tiles to save memory")
    group.add_argument("--compile", action="store_true", help="torch.compile the denoiser's blocks")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """What to generate; defaults come from the pipeline or the demo preset."""
    group = parser.add_argument_group("generation (defaults: those of the pipeline)")
    group.add_argument("--negative-prompt", help="what to avoid")
    group.add_argument("--image", type=existing_file, help="first frame, or image to start from")
    group.add_argument("--height", type=number(int, 1), help="in pixels")
    group.add_argument("--width", type=number(int, 1), help="in pixels")
    group.add_argument("--num-frames", type=number(int, 1), help="of a video")
    group.add_argument(
        "--num-inference-steps", "--steps", type=number(int, 1), help="denoising steps"
    )
    group.add_argument(
        "--guidance-scale", type=number(float, 0), help="of classifier-free guidance"
    )
    group.add_argument(
        "--seed", type=number(int, 0, SEEDS), default=0, help="of the noise, made on the CPU (0)"
    )
