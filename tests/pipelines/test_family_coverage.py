"""Nobody's model is silently missing, and what the table says of diffusers is looked up there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import transformers

import diffpatch
from diffpatch.cli import main
from diffpatch.cli.families import COLUMNS, markdown
from diffpatch.pipelines.families.table import FamilyInfo
from diffpatch.pipelines.shapes.find import find_shape
from tests.tiny.families import CASES
from tests.tiny.parts import Bare

ROWS = diffpatch.list_families()
README = Path(__file__).parents[2] / "pipelines" / "README.md"
OTHERS = {  # models of diffusers' transformers that denoise no tokens of an image or video
    "DreamLiteTransformer2DModel": "a part of a UNet",
    "Transformer2DModel": "a part of a UNet; diffusers replaces it by DiT and PixArt's own classes",
    "TransformerTemporalModel": "a part of a UNet",
    "PriorTransformer": "makes one embedding",
    "T5FilmDecoder": "makes spectrograms of notes",
    "MiniMaxMusic3RVQDepthDecoder": "decodes codes of sound one after the other",
    "RFD4ProteinaTransformer": "makes proteins, whose tokens are pairs of residues",
}


@cache
def classes() -> dict[str, Any]:
    """Every model class that diffusers defines among its transformers."""
    found = {}
    for info in pkgutil.walk_packages(transformers.__path__, transformers.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__
            if own and issubclass(cls, diffusers.ModelMixin):
                found[name] = cls
    return found


@cache
def pipeline_sources() -> list[str]:
    """The source of every pipeline of diffusers, none of it run."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    return [path.read_text(encoding="utf-8") for path in folder.rglob("pipeline_*.py")]


def guidance_in(source: str) -> str:
    """How a pipeline asks with and without the prompt, as far as its source tells."""
    if re.search(r"cat\(\[\w*(?:latents|model_input)\w*\] \* 2|cat\(\[latents, latents\]", source):
        return "batch"
    two_calls = len(re.findall(r"self\.transformer\(", source)) > 1
    return "calls" if two_calls or "self.guider" in source else "distilled"


def test_every_transformer_of_diffusers_is_accounted_for() -> None:
    known = {row.transformer for row in ROWS}
    assert not known & OTHERS.keys()
    assert sorted(classes().keys() - known - OTHERS.keys()) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.transformer)
def test_facts_of_a_row_are_those_of_the_class(row: FamilyInfo) -> None:
    cls = classes().get(row.transformer)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {row.transformer}")
    if row.refused:
        assert (row.guidance, row.regional, row.ulysses) == ("", False, False)
        return
    assert row.regional == bool(getattr(cls, "_repeated_blocks", None))
    assert row.ulysses == bool(getattr(cls, "_cp_plan", None))


WITHOUT_PIPELINE = [
    row
    for row in ROWS
    if not row.refused
    and all(
        isinstance(case.build(), Bare)
        for case in CASES.values()
        if case.transformer == row.transformer and not case.missing()
    )
]


@pytest.mark.parametrize("row", WITHOUT_PIPELINE, ids=lambda row: row.transformer)
def test_guidance_is_that_of_the_pipelines(row: FamilyInfo) -> None:
    """Of the rows whose tiny model is a transformer alone; the matrix counts the others' calls."""
    own = re.compile(rf"transformer: [^,\n]*\b{row.transformer}\b")
    found = [guidance_in(source) for source in pipeline_sources() if own.search(source)]
    found.sort(key=["batch", "calls", "distilled"].index)  # some beside the ordinary one ask once
    assert (found or [""])[0] == row.guidance


@pytest.mark.skipif(not hasattr(diffusers, "DreamLiteUNetModel"), reason="diffusers is older")
def test_dreamlite_is_refused_as_a_unet() -> None:
    with torch.device("meta"):
        unet: Any = diffusers.DreamLiteUNetModel()
    with pytest.raises(diffpatch.UnknownFamily, match="DreamLiteUNetModel is a U-Net"):
        diffpatch.patch(SimpleNamespace(components={"unet": unet}), "window")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.missing()])
def test_every_family_can_be_planned_for(name: str) -> None:
    shape = find_shape(CASES[name].build().pipe)
    assert shape.heads * shape.head_dim > 0 and shape.transformer == CASES[name].transformer


def test_the_readme_shows_the_table() -> None:
    block = re.search(
        r"<!-- families -->\n(.*?)<!-- /families -->", README.read_text("utf-8"), re.S
    )
    assert block is not None
    assert block[1].strip() == markdown(ROWS), "put `diffpatch families --markdown` there"


def test_the_command_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == [*COLUMNS, "note"]
    wan = next(line for line in lines if "WanTransformer3DModel" in line)
    assert re.findall("calls|blocks|Ulysses|radial", wan) == [
        "calls",
        "blocks",
        "Ulysses",
        "radial",
    ]
    assert all(out.count(row.transformer) == 1 for row in ROWS)
    refused = next(line for line in lines if "SanaTransformer2DModel" in line)
    assert "already linear" in refused and lines.index(refused) > lines.index("Cannot be patched:")


def test_the_command_shows_the_families_that_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["families", "WAN"]) == 0
    out = capsys.readouterr().out
    assert "WanVACETransformer3DModel" in out and "FluxTransformer2DModel" not in out
    assert main(["families", "sana"]) == 0
    assert "Cannot be patched:" in capsys.readouterr().out
    assert main(["families", "nothing-like-it"]) == 2
    assert "no family is like 'nothing-like-it'" in capsys.readouterr().err


def test_markdown_tables_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--markdown"]) == 0
    tables = [t.splitlines() for t in capsys.readouterr().out.split("\n\n") if t.startswith("|")]
    assert [len({line.count("|") for line in lines}) for lines in tables] == [1, 1]
    assert sum(len(lines) - 2 for lines in tables) == len(ROWS)
