"""Where a command may write: what is in the way is said before any work is done."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from diffpatch import files
from diffpatch.cli.errors import UsageError
from diffpatch.files import to_json


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Note in a file how results beside it are made, and refuse to go on in another way.

    Raises:
        UsageError: what is there was made in another way, and would pass for finished work.
        DamagedFile: the file is cut off.
    """
    text = to_json(settings)
    if not path.is_file():
        write_text(path, text)
    elif (found := files.read_json(path)) != (wanted := json.loads(text)):
        before = found if isinstance(found, dict) else {}
        changed = sorted(k for k in {**before, **wanted} if before.get(k) != wanted.get(k))
        raise UsageError(
            f"{path.parent} holds results made with another {', '.join(changed)}; choose another -o"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step; a folder of that name stays and is an error."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    files.write_text(path, text)


def check_free(paths: list[Path], overwrite: bool, option: str = "-o") -> None:
    """Refuse to replace results, before any work is done."""
    taken = [path for path in paths if path.exists()]
    if taken and not overwrite:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise UsageError(f"{taken[0]}{more} exists; add --overwrite or choose another {option}")
    tried: set[Path] = set()
    for folder in dict.fromkeys(path.parent for path in paths):
        if (nearest := _nearest(folder)) not in tried:  # one try a place, of thousands of folders
            check_writable(folder, option)
            tried.add(nearest)


def check_file(path: str | Path | None, option: str = "--json") -> None:
    """Refuse a file for a result that could not be written, before any work is done.

    None and "-", which is stdout, always pass; an earlier result is replaced in the end.

    Raises:
        UsageError: it is a folder, or its folder cannot be written to.
    """
    if path is None or str(path) == "-":
        return
    if Path(path).is_dir():  # such as OUT in `--json OUT --reference DENSE`
        raise UsageError(f"{option} {path} is a folder; give a file, or put {option} last")
    check_free([Path(path)], overwrite=True, option=option)


def check_writable(folder: Path, option: str = "-o") -> None:
    """Refuse a folder that files cannot be written into, by trying; nothing is left of the try.

    Raises:
        UsageError: the folder cannot be made, or a file in it.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise UsageError(f"{nearest} is not a folder; choose another {option}")
    made = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to ({error.strerror}); choose another {option}"
        ) from None
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _nearest(path: Path) -> Path:
    """The path itself or the closest folder above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
