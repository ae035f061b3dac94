"""--help answers at once, tells the truth, and its examples can be typed as they stand."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diffpatch
from diffpatch.cli import COMMANDS, build_parser, main
from diffpatch.cli.options import names
from diffpatch.cli.render.sheets import VIDEO_FORMATS
from diffpatch.eval.bench.kernels.bench import PARTS
from diffpatch.eval.bench.kernels.shapes import SHAPES
from diffpatch.eval.bench.kernels.variants import LAYOUTS, LOADS
from diffpatch.kernels.block_sparse.backends import BACKENDS
from diffpatch.patching.options.settle import QUALITIES
from diffpatch.patterns.drawing import KINDS
from diffpatch.pipelines.running.loading import DTYPES, OFFLOADS
from diffpatch.planning.profiles import profile_names
from diffpatch.tuning.front import SPARSE

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "diffusers", "transformers", "PIL", "pydantic", "jinja2"}
BENCHES = ("attention", "render", "model", "profile", "kernels")
# What examples name and only a user has.
THEIRS = ("prompts.txt", "start.png", "prompts.json", "demo.json", "wan.json", "my-card.json")


def helps() -> list[list[str]]:
    return [[], *([name] for name in COMMANDS), *(["bench", name] for name in BENCHES)]


def examples() -> list[list[str]]:
    """The words of every example of every help, once each."""
    texts = [vars(importlib.import_module("diffpatch.cli"))["EXAMPLES"]]
    for name in COMMANDS:
        known = vars(importlib.import_module(f"diffpatch.cli.options.{name}"))
        texts += [text for key, text in known.items() if key == "EXAMPLES" or key.startswith("OF_")]
    joined = "\n".join(texts).replace("\\\n", " ")
    lines = re.findall(r"^  (?:accelerate launch .*?-m )?diffpatch (.*)$", joined, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in dict.fromkeys(lines)]


@pytest.mark.parametrize("words", helps(), ids=" ".join)
def test_no_help_waits_for_what_is_heavy(words: list[str]) -> None:
    code = f"import sys; from diffpatch.cli import main; main({[*words, '--help']!r})"
    code += "; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "usage: diffpatch" in done.stdout, done.stderr
    assert HEAVY & set(done.stderr.split()) == set()


def test_names_are_those_of_the_modules_that_know_them() -> None:
    assert names.BACKENDS == BACKENDS
    assert tuple(QUALITIES) == names.QUALITIES and tuple(DTYPES) == names.DTYPES
    assert names.OFFLOADS == OFFLOADS and names.VIDEO_FORMATS == VIDEO_FORMATS
    assert names.PICTURES == KINDS and list(names.DEVICES) == profile_names()
    assert names.PARTS == PARTS and tuple(SHAPES) == names.SHAPES
    assert names.LAYOUTS == LAYOUTS and names.LOADS == LOADS
    parsed = build_parser(["tune"]).parse_args(["tune", "-p", "a"])
    assert tuple(parsed.kept) == SPARSE


@pytest.mark.parametrize(
    ("command", "function"), [("calibrate", diffpatch.calibrate), ("tune", diffpatch.measure_front)]
)
def test_a_command_and_its_function_have_the_same_defaults(command: str, function: Any) -> None:
    parsed = vars(build_parser([command]).parse_args([command, "-p", "a"]))
    given = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    common = [name for name in given if name in parsed and name != "prompt"]
    assert len(common) > 3
    for name in common:
        default = given[name]
        assert parsed[name] == (list(default) if isinstance(default, tuple) else default), name


def test_every_command_shows_examples() -> None:
    assert {words[0] for words in examples()} == set(COMMANDS)
    assert {words[1] for words in examples() if words[0] == "bench"} == set(BENCHES)


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_examples_run_or_at_least_parse(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is quick runs, what can only be checked with --dry-run is, the others are parsed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in THEIRS:
        (tmp_path / name).write_text("a fox in snow\n")
    theirs = [w for w in words if w in THEIRS or w.startswith(("./", "Wan-AI/", "my_", "runs/wan"))]
    if "--help" in words:
        assert main(words) == 0
        return
    assert build_parser(words).parse_args(words).run
    if theirs:
        return
    if words[0] in ("methods", "families", "plan"):
        assert main(words) == 0 and capsys.readouterr().out
    elif words[0] in ("render", "sweep") and "--report-only" not in words:
        assert main(words if "--dry-run" in words else [*words, "--dry-run"]) == 0
        assert capsys.readouterr().out
