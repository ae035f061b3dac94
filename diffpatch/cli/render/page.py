"""index.html beside the files of a comparison: dense and the method playing side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffpatch.cli.render import summary
from diffpatch.eval.card import faster

PLAYED = (".mp4",)  # by a video element; everything else is a picture, moving or not


def page(result: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The page of one result.

    Args:
        result: what render.json holds, with a speedup and a quality.
        names: of the files beside the page, by what is in them.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = summary.card_text(dict(result))
    head, *rows = summary.lines(dict(result))
    gain = f"{text.speedup:.2f}"
    clips = []
    for name, run in result["runs"].items():
        file, kept = names[name], f", {run['kept']:.0%} of pairs" * (name != "dense")
        if not Path(file).suffix:  # a folder of numbered frames
            file += "/0000.png"
        facts = f"{run['seconds']['total']:.1f} s{kept}"
        video = Path(file).suffix in PLAYED
        clips.append({"name": name, "file": file, "facts": facts, "video": video})
    return templates.get_template("page.html").render(
        method=text.label, speedup=gain, gained=faster(float(gain)), prompt=text.prompt,
        seed=result["seed"], model=result["model"], busy=text.busy, clips=clips, line=text.line,
        head=head, rows=rows, measured=result["measured"], machine=text.small,
        moving="moving_card" in names,
    )  # fmt: skip
