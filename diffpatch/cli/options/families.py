"""What `diffpatch families` takes."""

from __future__ import annotations

from typing import Any

from diffpatch.cli.options.arguments import later

EXAMPLES = """\
examples:
  diffpatch families
  diffpatch families wan
  diffpatch families --json
  diffpatch families --markdown    # the tables of pipelines/README.md
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "families",
        help="list the supported model families",
        description="The diffusers transformers that diffpatch knows. Every pipeline that holds\n"
        "one can be patched, unless the table says why not.",
        epilog=EXAMPLES,
    )
    parser.add_argument("like", nargs="?", help="a part of a name, such as wan or image")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.set_defaults(run=later("diffpatch.cli.families"))
