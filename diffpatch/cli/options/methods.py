"""What `diffpatch methods` takes."""

from __future__ import annotations

from typing import Any

from diffpatch.cli.options.arguments import later

EXAMPLES = """\
examples:
  diffpatch methods
  diffpatch methods --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "methods",
        help="list the methods and their parameters",
        description="The methods that --method and diffpatch.patch accept, with their parameters.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=later("diffpatch.cli.methods"))
