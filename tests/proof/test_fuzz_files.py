"""Files that people write or that were damaged: read, or refused in one sentence."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffpatch.cli.render.job import _slug
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.eval.quality.items import ItemError, read_captions
from diffpatch.eval.sweep.plan import Rendering, Scene, Way, plan_sweep
from diffpatch.eval.sweep.report.files import comma_separated, markdown
from diffpatch.eval.sweep.report.page import page
from diffpatch.eval.sweep.report.summary import summarize
from diffpatch.eval.sweep.spec import MethodSpec, Prompt, check_spec, read_spec
from diffpatch.methods.learned import files as learned
from diffpatch.pipelines.running.loading import ModelError
from diffpatch.targets.settings import Settings
from tests.eval.sweep.report.tiny_report import PROMPTS, made, write
from tests.proof.hostile import TEXTS, damaged, examples
from tests.targets.test_settings import made as made_settings

SWEEP: dict[str, Any] = {
    "title": "t", "model": "demo", "prompts": ["a cat", {"prompt": "a dog"}], "seeds": [0, 1],
    "sizes": {"height": 64, "width": 64}, "steps": [2], "call": {"guidance_scale": 3.0},
    "schedules": {"dense_steps": 1, "dense_layers": 0},
    "methods": ["window", {"method": "radial", "set": {"decay": 0.5}, "vary": {"sink": [True]}}],
    "kept": [0.5], "noise_floor": ["seed"], "attention_error": 1, "bar": {"psnr": 20},
}  # fmt: skip
SENTENCE = re.compile(r"\S.{5,900}", re.DOTALL)


def assert_said(error: Exception) -> None:
    """That an error is a sentence for people, not a dump."""
    text = str(error)
    assert SENTENCE.fullmatch(text), text[:200]
    assert "Traceback" not in text and "object at 0x" not in text, text


@examples(60)
@given(data=damaged(SWEEP))
def test_sweeps_are_planned_or_refused_in_a_sentence(data: Any) -> None:
    try:
        plan = plan_sweep(check_spec(data, Path.cwd()))
    except (DiffpatchError, ModelError) as error:
        assert_said(error)
    else:
        assert all(runs for runs in plan.values())


@examples(25)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)), cut=st.integers(0, 400))
def test_yaml_is_read_or_refused_in_a_sentence(text: str, cut: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    whole = yaml.safe_dump(SWEEP)
    path.write_bytes((whole[:cut] + text + whole[cut:]).encode(errors="surrogatepass"))
    try:
        read_spec(path)
    except DiffpatchError as error:
        assert_said(error)


@examples(60)
@given(data=damaged(json.loads(json.dumps(made_settings(floor=60.0)))), cut=st.integers(0, 4000))
def test_settings_are_read_or_refused_in_a_sentence(data: Any, cut: int) -> None:
    text = json.dumps(data)
    for one in (text, text[:cut]):
        try:
            found = Settings.parse(one)
        except BadParameter as error:
            assert_said(error)
        else:
            assert found.points()


def header(**changes: str | None) -> dict[str, str]:
    given = {"format": learned.FORMAT, "version": learned.VERSION, "family": "A",
             "method": json.dumps({"kept": 0.1})}  # fmt: skip
    return {k: v for k, v in (given | changes).items() if v is not None}


LAYERS = [learned.Layer("blocks.0.attn1", 2, 24)]
heads = st.sampled_from([None, "", "{", "[]", "3", "null", '{"kept": NaN}', *TEXTS[:8], "A", "1"])
shapes = st.lists(st.integers(0, 3), max_size=4)


@examples(40)
@given(
    changes=st.dictionaries(st.sampled_from(["format", "version", "family", "method"]), heads,
                            max_size=2),
    shape=shapes, name=st.sampled_from(["gate", "phi_q", "q_down", "q_up", "x", ""]),
    layer=st.sampled_from(["transformer.blocks.0.attn1", "transformer.blocks.9", "x", ""]),
    value=st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
    cut=st.one_of(st.none(), st.integers(0, 700)),
)  # fmt: skip
def test_weights_are_read_or_refused_in_a_sentence(
    changes: dict[str, str | None], shape: list[int], name: str, layer: str, value: float,
    cut: int | None, tmp_path_factory: Any,
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "w.safetensors"
    save_file({f"{layer}.{name}": torch.full(shape, value)}, path, metadata=header(**changes))
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    try:
        method = learned.read_method(path)
        assert isinstance(method, dict)
        learned.load(path, "transformer", "A", LAYERS)
    except BadParameter as error:
        assert_said(error)


@examples(30)
@given(content=st.one_of(st.binary(max_size=60), st.sampled_from(TEXTS).map(str.encode)))
def test_captions_are_read_or_refused_in_a_sentence(content: bytes, tmp_path_factory: Any) -> None:
    for suffix in (".json", ".txt"):
        path = tmp_path_factory.getbasetemp() / f"captions{suffix}"
        path.write_bytes(content)
        try:
            assert isinstance(read_captions(path), dict)
        except ItemError as error:
            assert_said(error)


@examples(60)
@given(prompt=st.one_of(st.sampled_from(TEXTS), st.text()), label=st.sampled_from(TEXTS))
def test_names_of_folders_are_harmless(prompt: str, label: str) -> None:
    scene = Scene("demo", "bf16", Prompt(prompt), 0, 0, {}, 2)
    for name in (
        Rendering(scene, Way("method", MethodSpec(label, {}, {}, None))).name,
        _slug(prompt),
    ):
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,120}", name)


class Tags(HTMLParser):
    """The tags of a page, and the texts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


MARK = '<img src=x onerror="boom()">\'"</script><script>boom()</script>{{ 7*7 }}| `x` [a](b)'
NAMED = {"name", "kind", "prompt"}  # what files are called, and what rows are told apart by


def everywhere(value: Any, key: str = "") -> Any:
    """A result with a hostile mark in every text, keys included."""
    if isinstance(value, dict):
        return {
            (k + MARK if key in ("settings", "parameters", "options", "patch") else k):
            everywhere(v, k) for k, v in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [everywhere(v, key) for v in value]
    return value + MARK if isinstance(value, str) and key not in NAMED else value


@pytest.mark.parametrize("failing", [False, True])
def test_no_text_of_a_result_becomes_a_tag(tmp_path: Path, failing: bool) -> None:
    found = []
    for prompt in PROMPTS:
        for result in (
            made("dense", "dense", prompt), made("method", "radial", prompt, 10.0, 30.0),
            made("method", "window", prompt, 5.0, 27.0),
        ):  # fmt: skip
            result |= {"settings": {"height": "64"}, "parameters": {"weights": "w"},
                       "options": {"backend": "x"}, "fitted": "F"}  # fmt: skip
            found.append(everywhere(result))
    write(tmp_path, found, {"psnr": 25.0})
    about = json.loads((tmp_path / "sweep.json").read_text())
    about["title"] += MARK
    if failing:
        name = "method-disc-0"
        failed = found[1] | {"name": name, "error": MARK, "traceback": MARK}
        about["runs"].append(name)
        (tmp_path / "failed").mkdir()
        (tmp_path / "failed" / f"{name}.json").write_text(json.dumps(failed))
    (tmp_path / "sweep.json").write_text(json.dumps(about))
    summary = summarize(tmp_path)
    text = page(summary, tmp_path)
    tags = Tags()
    tags.feed(text)
    images = [attrs for tag, attrs in tags.found if tag == "img"]
    assert not any("onerror" in attrs or attrs.get("src") == "x" for attrs in images)
    assert all(not key.startswith("on") for _, attrs in tags.found for key in attrs)
    assert text.count("</script>") == sum(tag == "script" for tag, _ in tags.found)
    assert "boom()" in text and "49|" not in text.replace(" ", "")
    plain = re.sub(r"```.*?```", "", markdown(summary), flags=re.DOTALL)
    assert "img src=x" in plain and not re.search(r"(?<!\\)<", plain)
    assert all(len(line) for line in comma_separated(summary).splitlines())


def test_slugs_of_the_same_prompt_are_told_apart() -> None:
    dense = Way("dense")
    runs = [Rendering(Scene("demo", "bf16", Prompt(text), 0, 0, {}, 2), dense) for text in TEXTS]
    assert len({run.name for run in runs}) == len(TEXTS)
