"""Every command in a README runs, or at least parses; code marked `# runs` runs; paths exist."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from diffpatch.cli import build_parser, main

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


def test_the_picture_says_what_the_table_says() -> None:
    """`make picture` makes it from the JSON behind the table."""
    from diffpatch.eval.card import card_text

    text = README.read_text(encoding="utf-8")
    [picture] = re.findall(r"!\[[^\]]*\]\(([^)]+\.webp)\)", text)
    said = card_text(ROOT / picture)
    rows = json.loads((ROOT / "eval/results/demo_sweep.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if row["facts"]["method"] == said.label)
    assert said.speedup == row["speedup"]["total"]["median"]
    assert (said.psnr, said.kept) == (row["quality"]["psnr"], row["kept"])
    [line] = [x for x in text.splitlines() if x.startswith(f"| `{said.label}` |") and "×" in x]
    assert f"| {said.kept:.1%}".replace("%", " %") in line
    assert f"| {said.speedup:.2f}× | {said.psnr:.1f} dB |" in line


def test_the_picture_of_the_front_shows_what_was_measured() -> None:
    found = json.loads((ROOT / "eval/results/front.json").read_text(encoding="utf-8"))
    timed = found["timed on an otherwise idle machine"]["demo-long, 30 steps"]["points"]
    picture = (ROOT / "examples/pictures/front.svg").read_text(encoding="utf-8")
    for point in timed:
        assert f"{point['label']}: {point['speedup']:.2f}×, {point['psnr']:.1f} dB" in picture
    assert len(timed) == 5 and picture.count("<circle") == len(timed) + 3 + 1  # legend, chosen


def test_the_page_of_the_front_says_what_was_measured() -> None:
    folder = ROOT / "eval/results"
    found = json.loads((folder / "front.json").read_text(encoding="utf-8"))
    page = (folder / "front.md").read_text(encoding="utf-8")
    for timed in found["timed on an otherwise idle machine"].values():
        for point in timed["points"]:
            assert f"{point['speedup']:.2f}× | {point['psnr']:.1f} dB" in page
    checked = found["fresh prompts, demo, 30 steps, target 30 dB"]
    for level in (30, 29):
        reached = sum(one["psnr"] >= level for one in checked)
        assert f"| {level} dB or more | {reached} of {len(checked)} |" in page
    near = sum(abs(one["psnr"] - one["predicted"]) <= 1.5 for one in checked)
    assert f"| within ±1.5 dB of the prediction | {near} of {len(checked)} |" in page
    tried: dict[tuple[str, str], float] = {
        (one["prompt"], one["way"]): one["psnr"]
        for one in found["auto beside the same fraction in every head, demo, 8 steps"]
    }
    for kept, row in (("0.25", "| 25 % | 5 |"), ("0.125", "| 12.5 %, heads from 6 % on | 4 |")):
        gains = [psnr - tried[prompt, f"dynamic {kept}"] for (prompt, way), psnr in tried.items()
                 if way == f"auto {kept}" and (prompt, f"dynamic {kept}") in tried]  # fmt: skip
        [line] = [line for line in page.splitlines() if line.startswith(row)]
        said = [float(x.replace("−", "-")) for x in re.findall(r"[+−][0-9.]+", line)]
        assert said[:-1] == pytest.approx(gains, abs=0.051)
        assert said[-1] == pytest.approx(sum(gains) / len(gains), abs=0.051)
