"""What tests of sweeps share: the file that is written, and the results that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HOSTILE = '<script>alert("x")</script> & a cat'


def write(data: dict[str, Any], folder: Path) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("runs/*/run.json")}


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.glob("runs/*/run.json")}
