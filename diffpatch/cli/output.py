"""Files appear whole or not at all: written under a temporary name, then moved into place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffpatch.cli.errors import UsageError


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose entries move into `folder` if the block ends without an exception.

    Entries of the same name are replaced. After an exception, Ctrl-C included, nothing remains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        stage = Path(name)
        yield stage
        for entry in sorted(stage.iterdir()):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Note in a file how results beside it are made, and refuse to go on in another way.

    Raises:
        UsageError: what is there was made in another way, and would pass for finished work.
    """
    text = to_json(settings)
    if not path.is_file():
        write_text(path, text)
    elif (found := json.loads(path.read_text(encoding="utf-8"))) != json.loads(text):
        changed = sorted(key for key in settings if found.get(key) != json.loads(text)[key])
        raise UsageError(
            f"{path.parent} holds results made with another {', '.join(changed)}; choose another -o"
        )


def to_json(data: Any) -> str:
    """JSON as every command writes it; a method in a method becomes its text."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step; a folder of that name stays and is an error."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    with staged(path.parent) as stage:
        (stage / path.name).write_text(text, encoding="utf-8")


def check_free(paths: list[Path], overwrite: bool, option: str = "-o") -> None:
    """Refuse to replace results, and folders that cannot be written, before any work is done."""
    taken = [path for path in paths if path.exists()]
    if taken and not overwrite:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise UsageError(f"{taken[0]}{more} exists; add --overwrite or choose another {option}")
    for folder in {path.parent for path in paths}:
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not nearest.is_dir():
            raise UsageError(f"{nearest} is not a folder; choose another {option}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UsageError(f"{nearest} cannot be written to; choose another {option}")
