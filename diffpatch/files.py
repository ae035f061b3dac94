"""Files that appear whole or not at all, and say their name where the disk is full."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffpatch.errors import DiffpatchError

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space on the disk, or none of ours
SCRAP = 2**16  # bytes: with less left, a writer that gave up did so for want of space


class DiskFull(OSError):
    """There was no space for a file; `filename` says which."""


class DamagedFile(DiffpatchError):
    """A file of results is cut off or was overwritten; the message says which."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the path where writing it fails for want of space; writers often leave it out.

    Raises:
        DiskFull: the disk is full.
    """
    try:
        yield
    except DiskFull:  # named already
        raise
    except OSError as error:
        if not is_full(error) and (error.errno is not None or not _no_space(path)):
            raise
        raise DiskFull(errno.ENOSPC, "no space left on the disk for", str(path)) from error


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    return isinstance(error, OSError) and error.errno in FULL


def to_json(data: Any) -> str:
    """JSON as every result is written; what JSON does not know becomes its text."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one step."""
    write_text(path, to_json(data))


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, safe on the disk before it has its name.

    Raises:
        DiskFull: there was no space; nothing is left of the file.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step, as `write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """A text file that a person wrote, in UTF-8; the mark that some editors begin it with goes."""
    return path.read_text(encoding="utf-8-sig")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one a line; empty lines and those that begin with ``#`` are none."""
    lines = read_text(path).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_json(path: Path) -> Any:
    """JSON from a file, None if there is no such file.

    Raises:
        DamagedFile: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise DamagedFile(
            f"{path} is damaged: it is not JSON; delete it and repeat the command that wrote it"
        ) from None


@contextlib.contextmanager
def staged(folder: Path, last: str | None = None) -> Iterator[Path]:
    """A temporary folder whose entries move into `folder` if the block ends without an exception.

    Entries of the same name are replaced. After an exception, Ctrl-C included, nothing remains.

    Args:
        folder: made if it is not there.
        last: the entry that says that all others are there. An earlier one goes before anything
            moves, and the new one comes when everything has: after a kill in between there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        stage = Path(name)
        yield stage
        if last is not None:
            (folder / last).unlink(missing_ok=True)
        for entry in sorted(stage.iterdir(), key=lambda path: (path.name == last, path)):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)


def _no_space(path: Path) -> bool:
    """Whether the disk has next to nothing left: programs such as ffmpeg fail without a number."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(nearest).free < SCRAP
