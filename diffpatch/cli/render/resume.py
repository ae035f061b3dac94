"""Whether an earlier attempt at a rendering finished, and was asked for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpatch.cli.errors import UsageError
from diffpatch.files import DamagedFile, read_json, to_json


def is_finished(
    files: Mapping[str, Path], expected: Mapping[str, Any], runs: Mapping[str, Any]
) -> bool:
    """Whether an earlier attempt wrote all files, with the same request.

    Args:
        files: what is written for one prompt, the result file under "result".
        expected: entries of the result that must be the same.
        runs: the options of every run in it, by name.

    Raises:
        UsageError: they are complete and of another request.
    """
    if not all(path.exists() for path in files.values()):
        return False
    try:
        result = read_json(files["result"])
        result["runs"] = {name: run.get("options", {}) for name, run in result["runs"].items()}
    except (DamagedFile, AttributeError, KeyError, TypeError):
        return False  # cut off, or of something else: rendered again
    wanted = json.loads(to_json({**expected, "runs": runs}))
    other = next((key for key in wanted if result.get(key) != wanted[key]), None)
    if other is not None:
        raise UsageError(
            f"{files['result']} is of another request: its {other} is"
            f" {_short(result.get(other))}, not {_short(wanted[other])}; repeat that request, add"
            " --overwrite instead of --resume, or choose another -o"
        )
    return True


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
