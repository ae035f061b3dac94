"""Files that people write, as their editors write them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from diffpatch.cli import generation
from diffpatch.eval.quality.items import read_captions
from diffpatch.eval.quality.vbench import videos
from diffpatch.eval.sweep.spec import read_spec
from diffpatch.files import read_prompts, read_text
from diffpatch.targets.settings import Settings
from tests.targets.test_settings import made

MARK = "\ufeff"  # what Windows' Notepad begins a file in UTF-8 with


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", MARK])
def test_a_mark_and_ends_of_lines_are_no_part_of_a_prompt(
    tmp_path: Path, mark: str, end: str
) -> None:
    path, spec = tmp_path / "prompts.txt", tmp_path / "sweep.yaml"
    lines = ["# two animals", "a fox", "", "  a cat \u00e9 "]
    path.write_bytes((mark + end.join(lines)).encode())
    expected = ["a fox", "a cat \u00e9"]
    assert read_prompts(path) == expected
    assert generation.prompts(Namespace(prompt=[], prompt_file=path)) == expected
    sweep = ["model: demo", "prompt_file: prompts.txt", "methods:", "  - radial"]
    spec.write_bytes((mark + end.join(sweep)).encode())
    assert [prompt.text for prompt in read_spec(spec).prompts] == expected


@pytest.mark.parametrize("mark", ["", MARK])
def test_a_mark_is_no_part_of_a_name_and_breaks_no_json(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "captions.tsv"
    path.write_bytes(f"{mark}0001\ta fox\n".encode())
    assert read_captions(path) == {"0001": "a fox"}
    named = tmp_path / "captions.json"
    named.write_bytes((mark + json.dumps({"0001": "a fox"})).encode())
    assert read_captions(named) == {"0001": "a fox"}
    path.write_bytes(f"{mark}a fox\n".encode())
    assert videos(path, samples=1) == [("a fox", 0)]
    settings = tmp_path / "demo.json"
    settings.write_bytes((mark + json.dumps(made())).encode())
    assert Settings.load(settings) == Settings.model_validate(made())


def test_another_encoding_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "x.txt")
