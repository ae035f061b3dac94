"""What a command says after Ctrl-C: what is left, and how to go on."""

from __future__ import annotations

import argparse

ANEW = "the same command starts again"
RESUMED = "the same command goes on where it was"


def how_to_go_on(args: argparse.Namespace | None) -> str:
    """One half sentence; `args` are the words of the command, None if they were not read yet."""
    if args is None:
        return ANEW
    command = args.command
    if command in ("sweep", "tune"):
        return RESUMED
    if command == "render" and not _single(args):
        instead = " in place of --overwrite" if args.overwrite else ""
        return f"--resume{instead} renders only what is missing"
    if command == "eval" and args.vbench_export is not None:
        return f"{ANEW}; name another --vbench-export: {args.vbench_export} keeps clips"
    if command == "bench" and args.what == "kernels" and args.json not in (None, "-"):
        return f"{args.json} holds what was measured; {ANEW}"
    return ANEW


def _single(args: argparse.Namespace) -> bool:
    """Whether a rendering is of one prompt, of which nothing is written until it is done."""
    return len(args.prompt) == 1 and args.prompt_file is None
