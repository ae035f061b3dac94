"""The command line: `diffpatch …`, the same as `python -m diffpatch …`.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 the
request cannot work as it is written, 130 interrupted. Errors are one line; `--debug` shows where
they come from.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  diffpatch render --prompt "a large red circle moves left over a black background" \\
      --method radial --compare dense -o out/
  diffpatch plan --model wan-14b --height 720 --width 1280 --num-frames 81
  diffpatch methods
  diffpatch families
  diffpatch bench attention --grid 33x16x16 --method radial
  diffpatch eval --model demo --method radial --count 8
  diffpatch sweep -m demo -p "a large red circle moves left over a black background" -o runs/demo
  diffpatch tune -m demo --prompt-file prompts.txt -o demo.json
"""


# The commands and what `diffpatch --help` says of them, which needs none of their modules.
COMMANDS = {
    "render": "make a video or an image, and compare it with dense attention",
    "plan": "estimate what methods save, without running the model",
    "tune": "measure your model, to choose settings for targets such as '30 dB'",
    "calibrate": "find thresholds for temporal attention from one prompt",
    "bench": "measure speed",
    "eval": "measure quality: of files, or of methods on a model",
    "sweep": "compare methods on your model: which one is fastest, and at what quality",
    "methods": "list the methods and their parameters",
    "families": "list the supported model families",
}


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        words: what it will parse: of the commands only the one that is in it is loaded, because
            most of them load torch. None loads all.
    """
    import diffpatch
    from diffpatch.cli.parser import Parser

    parser = Parser(
        prog="diffpatch",
        description="Make diffusers pipelines faster by changing their attention.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"diffpatch {diffpatch.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, dest="command"
    )
    for name, help in COMMANDS.items():
        if words is None or name in words[:1]:
            importlib.import_module(f"diffpatch.cli.options.{name}").add_parser(commands)
        else:
            commands.add_parser(name, help=help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words  # understood by every command, also before parsing succeeds
    words = [word for word in words if word != "--debug"]
    args = None
    try:
        args = build_parser(words).parse_args(words)
        code = int(args.run(args))
        sys.stdout.flush()  # so that a closed pipe is found here
        return code
    except SystemExit as end:  # --help and --version
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        from diffpatch.cli.interrupted import how_to_go_on

        said = f"interrupted; no file was left half-written; {how_to_go_on(args)}"
        print(f"diffpatch: {said}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        return _fail(error)


def _fail(error: Exception) -> int:
    """One line on stderr, and the exit code."""
    from diffpatch.cli.errors import RunError, UsageError
    from diffpatch.errors import (
        BadParameter,
        DiffpatchError,
        NotPatched,
        UnknownFamily,
        UnknownMethod,
    )
    from diffpatch.files import is_full

    message = " ".join(str(error).split())
    if is_full(error):
        place = getattr(error, "filename", None) or "what was to be written"
        message = f"no space is left on the disk for {place}"
    elif not isinstance(error, RunError | UsageError | DiffpatchError):
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    print(f"diffpatch: {message}", file=sys.stderr)
    mendable = UsageError | BadParameter | UnknownMethod | UnknownFamily | NotPatched
    return 2 if isinstance(error, mendable) else 1
