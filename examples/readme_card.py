"""The README's picture: the clip that `make demo` rendered, with the figures of the README's table.

`make demo` ends with this and writes `examples/card.webp`. The times are not those of the clip at
hand but of the sweep behind the table, the means over its prompts, so that the picture and the
table say the same; `tests/test_readme.py` checks it. A picture that already says so is left as it
is: the pixels of a clip differ a little from machine to machine, and a demo should change no file
of the repository. To make the picture afresh, delete it first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffpatch import TokenGrid, make_method
from diffpatch.eval.card import CardText, card_text, machine, thumbnail, write_card
from diffpatch.eval.quality.items import read_frames
from diffpatch.eval.sweep.paste import line

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "eval" / "results" / "demo_sweep.json"
PICTURE = ROOT / "examples" / "card.webp"
METHOD = "radial"
GRID = TokenGrid(33, 16, 16)  # of the long demo
FPS = 8.0


def row_of(table: Path, method: str) -> dict[str, Any]:
    """The first row of a method in the summary of a sweep."""
    rows: list[dict[str, Any]] = json.loads(table.read_text(encoding="utf-8"))["rows"]
    return next(row for row in rows if row["facts"]["method"] == method)


def text_of(row: dict[str, Any], prompt: str) -> CardText:
    """What the card says of a row."""
    options = {name: row[name] for name in ("dense_steps", "dense_layers")}
    return CardText(
        label=METHOD,
        speedup=row["speedup"]["total"]["median"],
        psnr=row["quality"]["psnr"],
        kept=row["kept"],
        line=line(METHOD, row["facts"]["parameters"] | options),
        prompt=prompt,
        small=machine(row["facts"]["environment"], [row["setting"]]),
    )


def write(folder: Path, picture: Path = PICTURE) -> str:
    """Write the picture, if another is needed; returns what was done, in a sentence.

    Args:
        folder: what `make demo` wrote, with render.json in it.
        picture: where to.
    """
    result = json.loads((folder / "render.json").read_text(encoding="utf-8"))
    row = row_of(TABLE, METHOD)
    text, wanted = text_of(row, result["prompt"]), row["facts"]["parameters"]
    options = result["runs"].get(METHOD, {}).get("options", {})
    if row["facts"]["model"] != result["model"] or not wanted.items() <= options.items():
        return f"{picture.name} shows {text.line} on {row['facts']['model']} and stays as it is"
    if picture.is_file() and replace(card_text(picture), prompt=text.prompt) == text:
        return f"{picture.name} already says what the README's table says"
    dense, fast = (read_frames(folder / f"{name}.mp4") for name in ("dense", METHOD))
    pattern = thumbnail(make_method(METHOD, **wanted).pattern(GRID).tile_map()[0])
    with tempfile.TemporaryDirectory() as made:
        write_card(Path(made), dense, fast, text, pattern, FPS)
        shutil.move(Path(made) / "card.webp", picture)
    return f"wrote {picture}"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what `make demo` wrote, with render.json in it")
    print(write(parser.parse_args().folder))


if __name__ == "__main__":
    main()
