"""VBench and `diffpatch eval`: clips out as VBench wants them, its scores in beside ours."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffpatch import files
from diffpatch.cli import output
from diffpatch.cli.errors import UsageError
from diffpatch.eval import media
from diffpatch.eval.processes import Process
from diffpatch.eval.quality import items, vbench
from diffpatch.tables import table


def read_results(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The scores by row, of one or several files a row.

    Raises:
        UsageError: not ROW=FILE, or no such file.
        VBenchError: a file is not a result of VBench.
    """
    files: dict[str, list[Path]] = {}
    for text in given:
        row, equal, path = text.partition("=")
        if not (row and equal and path):
            raise UsageError(f"--vbench-results takes ROW=FILE, such as radial=r.json, got {text}")
        if not Path(path).is_file():
            raise UsageError(f"--vbench-results: there is no file {path}")
        files.setdefault(row, []).append(Path(path))
    return {row: vbench.read_result(paths) for row, paths in files.items()}


def describe(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores of all rows side by side."""
    rows = [["VBench", *results]]
    for name in (*vbench.QUALITY, *vbench.SEMANTIC):
        found = [result["dimensions"].get(name) for result in results.values()]
        if any(value is not None for value in found):
            rows.append([name, *("" if value is None else f"{value:.2%}" for value in found)])
    for name in ("quality", "semantic", "total"):
        shown = (f"{r[name]:.2%}" if name in r else "incomplete" for r in results.values())
        rows.append([name, *shown])
    return table(rows)


@dataclass(frozen=True)
class Export:
    """What writes clips into a folder a row, under the names that VBench reads.

    Attributes:
        folder: of all rows.
        names: of the files, by the number of the prompt; those of this process.
        fps: frames per second.
        faults: why clips were not kept; after the first, no other is tried.
    """

    folder: Path
    names: Mapping[int, str]
    fps: float
    faults: list[OSError] = field(default_factory=list)

    @classmethod
    def of(
        cls, folder: Path, prompts: Sequence[str], fps: float, rows: Sequence[str], process: Process
    ) -> Export:
        """Names for all prompts; a prompt that comes again gets the next index.

        Raises:
            UsageError: there are clips of an earlier export, or there is no ffmpeg.
            VBenchError: a prompt cannot be a file name.
        """
        if not media.has_ffmpeg():
            raise UsageError("--vbench-export writes mp4: pip install 'diffpatch[video]'")
        seen: Counter[str] = Counter()
        names = []
        for prompt in prompts:
            names.append(vbench.file_name(prompt, seen[prompt]))
            seen[prompt] += 1
        export = cls(folder, dict(process.mine(list(enumerate(names)))), fps)
        paths = [export.path(row, number) for row in rows for number in export.names]
        if taken := next((path for path in paths if path.exists()), None):
            raise UsageError(f"{taken} exists; choose another --vbench-export")
        output.check_free(paths, overwrite=True, option="--vbench-export")
        return export

    def path(self, row: str, number: int) -> Path:
        """Where a clip goes; rows are folders that a shell need not quote."""
        return self.folder / re.sub(r"[^\w.+=]+", "-", row).strip("-.") / self.names[number]

    def write(self, row: str, number: int, frames: torch.Tensor) -> None:
        """A clip (F, 3, H, W) in [0, 1]."""
        path = self.path(row, number)
        with files.staged(path.parent) as stage:
            media.save(media.to_images(frames), stage / path.name, self.fps)

    def keep(self, row: str, number: int, frames: torch.Tensor) -> None:
        """The same beside a measurement, which goes on where a clip cannot be written."""
        if self.faults:
            return
        try:
            self.write(row, number, frames)
        except OSError as error:
            self.faults.append(error)

    def copy(self, row: str, number: int, source: Path) -> None:
        """A clip on disk: an mp4 as it is, anything else encoded."""
        if source.suffix.lower() != ".mp4":
            return self.write(row, number, items.read_frames(source))
        path = self.path(row, number)
        with files.staged(path.parent) as stage:
            shutil.copyfile(source, stage / path.name)


def export_folders(
    folder: Path,
    folders: Mapping[str, Path],
    reference: Path,
    captions: Mapping[str, str] | None,
    fps: float,
    process: Process,
) -> None:
    """Everything in the folders and the reference, under the prompts of the reference.

    Raises:
        UsageError: a file's prompt is not known.
        ItemError: files do not fit each other.
    """
    dense = items.find_items(reference)
    prompts = []
    for name, path in dense.items():
        prompt = (captions or {}).get(name) or items.prompt_beside(path)
        if prompt is None:
            raise UsageError(f"--vbench-export: no prompt is known for {name}; give --captions")
        prompts.append(prompt)
    rows = {"reference": reference, **folders}
    export = Export.of(folder, prompts, fps, list(rows), process)
    numbers = {path: number for number, path in enumerate(dense.values())}
    for row, place in rows.items():
        for own, other in items.match(items.find_items(place), dense).values():
            if numbers[other] in export.names:
                export.copy(row, numbers[other], own)
