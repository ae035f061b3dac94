"""The parser of every command."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from diffpatch.cli.errors import UsageError
from diffpatch.errors import choices


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, which reads --dense_steps as --dense-steps."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; unknown options are reported here, where the known ones are at hand."""
        args = sys.argv[1:] if args is None else args
        parsed, unknown = super().parse_known_args([_dashes(arg) for arg in args], namespace)
        for word in unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            hint = choices(word.partition("=")[0], known) if word.startswith("-") else ""
            self.error(f"unknown argument {word!r}" + (f": {hint}" if hint else ""))
        return parsed, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As in argparse, with the closest right value for a wrong one."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r}: {choices(value, action.choices)}")

    def error(self, message: str) -> NoReturn:
        """Fail with one line; `--help` has the rest."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def _dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value
