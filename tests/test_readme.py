"""Every command in a README runs, or at least parses; code marked `# runs` runs; paths exist."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffpatch.cli import build_parser, main
from diffpatch.eval.card import DESCRIPTION, card_text
from diffpatch.eval.media import save, to_images
from tests.scripts import load_example

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = ("eval/results", "examples", "kernels", "pipelines")
PAGES = (README, ROOT / "examples" / "own_models.md", *(ROOT / n / "README.md" for n in FOLDERS))
QUICK = ("methods", "families", "plan")
COMMANDS = ("diffpatch", "make", "pip", "git", "cd", "python", "source")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command in a bash block, split into words; lines that end in a backslash are joined."""
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    split = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in split if words]


def programs() -> list[str]:
    """The python blocks that say they run."""
    return [code for code in blocks("python") if "# runs" in code]


def test_the_readme_has_only_commands_that_are_checked_here() -> None:
    assert commands()
    assert [words for words in commands() if words[0] not in COMMANDS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_finished_and_their_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^[A-Z_]{4,}$", text, flags=re.MULTILINE)
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


def test_every_path_in_contributing_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|\w+\.(?:md|toml))`", text))
    assert len(paths) > 20
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    if words[:3] == ["python", "-m", "diffpatch"]:
        words = words[2:]
    if words[0] == "diffpatch":
        monkeypatch.chdir(tmp_path)
        for option, value in itertools.pairwise(words):
            if option in ("--image", "--prompt-file"):
                Path(value).touch()  # the parser only wants it to be there
        build_parser().parse_args(words[1:])
        if words[1] == "render":
            assert main([*words[1:], "--dry-run"]) == 0
        if words[1] in QUICK:
            assert main(words[1:]) == 0
            assert capsys.readouterr().out
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("code", programs())
def test_programs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


PICTURE = ROOT / "examples" / "card.webp"


def test_the_picture_says_what_the_table_says() -> None:
    """`make demo` makes it from the JSON behind the table."""
    text = README.read_text(encoding="utf-8")
    picture, *_ = re.findall(r"!\[[^\]]*\]\(([^)]+\.webp)\)", text)  # the first
    assert ROOT / picture == PICTURE
    said = card_text(PICTURE)
    rows = json.loads((ROOT / "eval/results/demo_sweep.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if row["facts"]["method"] == said.label)
    assert said.speedup == row["speedup"]["total"]["median"]
    assert (said.psnr, said.kept) == (row["quality"]["psnr"], row["kept"])
    [line] = [x for x in text.splitlines() if x.startswith(f"| `{said.label}` |") and "×" in x]
    assert f"| {said.kept:.1%}".replace("%", " %") in line
    assert f"| {said.speedup:.2f}× | {said.psnr:.1f} dB |" in line


def test_make_demo_ends_with_the_picture() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    _, _, recipe = makefile.partition("\ndemo:")
    recipe, _, _ = recipe.partition("\n\n")
    assert recipe.index("diffpatch render") < recipe.index("examples/readme_card.py out/")
    [prompt] = re.findall(r"^PROMPT \?= (.+)$", makefile, flags=re.MULTILINE)
    assert card_text(PICTURE).prompt == prompt


def test_make_demo_writes_the_picture_only_where_it_says_something_else(tmp_path: Path) -> None:
    module = load_example("readme_card")
    shown = card_text(PICTURE)
    runs = {"dense": {}, "radial": {"options": {"decay": 0.5, "dense_steps": 2}}}
    result = {"prompt": "a blue ring", "model": "demo-long", "runs": runs}
    clip = torch.rand(3, 3, 16, 16)
    for name in ("dense", "radial"):
        save(to_images(clip), tmp_path / f"{name}.mp4", 8)
    card = tmp_path / "card.webp"

    def made(**other: Any) -> str:
        (tmp_path / "render.json").write_text(json.dumps(result | other), encoding="utf-8")
        return str(module.write(tmp_path, card))

    assert "stays as it is" in made(model="demo")
    assert "stays as it is" in made(runs={"dense": {}, "window": {"options": {}}})
    assert "stays as it is" in made(runs={"dense": {}, "radial": {"options": {"decay": 0.2}}})
    assert not card.exists()
    assert made() == f"wrote {card}"
    assert card_text(card) == replace(shown, prompt="a blue ring")
    before = card.read_bytes()
    assert "already says" in made(prompt="a red square")
    assert card.read_bytes() == before
    other = Image.open(card)
    exif = other.getexif()
    exif[DESCRIPTION] = json.dumps(asdict(replace(shown, speedup=9.0)))
    other.save(card, exif=exif)
    assert made() == f"wrote {card}" and card_text(card).speedup == shown.speedup
