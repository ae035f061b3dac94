"""The file of a sweep: what it means, and what is refused before anything runs."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffpatch.cli import main
from diffpatch.eval.processes import Process
from diffpatch.eval.sweep import spec as specs
from diffpatch.eval.sweep.drive import run_sweep
from diffpatch.eval.sweep.plan import Rendering, Scene, Way, plan_sweep
from diffpatch.eval.sweep.quick import keep_file
from diffpatch.eval.sweep.schema import (
    BARS,
    KEYS,
    METHOD_KEYS,
    NETWORKS,
    SIZE_KEYS,
    BadSweep,
)
from diffpatch.eval.sweep.spec import MethodSpec, Prompt, check_spec
from diffpatch.eval.sweep.store import FIRST_SLOT, SLOTS, Store
from diffpatch.targets.settings import Settings
from tests.eval.sweep.tiny_sweep import write


def test_what_is_the_same_is_done_once(sweep: dict[str, Any], tmp_path: Path) -> None:
    """Repeated prompts, and schedules that a method's own replaces."""
    (tmp_path / "captions.txt").write_text("a dog\na cat\na dog\n")
    data = {
        **sweep,
        "prompts": ["a cat"],
        "prompt_file": "captions.txt",
        "schedules": [{"dense_layers": 0}, {"dense_layers": 1}],
        "methods": [{"method": "neighborhood", "dense_layers": 1, "kept": [0.12, 0.125]}],
        "noise_floor": [],
    }
    [runs] = plan_sweep(check_spec(data, tmp_path)).values()
    assert len({run.key for run in runs}) == len(runs) == 2 * (1 + 2)
    assert len({run.way.label for run in runs}) == 3


def test_what_decides_a_result_is_in_its_key(sweep: dict[str, Any], tmp_path: Path) -> None:
    def keys(**changes: Any) -> set[str]:
        [runs] = plan_sweep(check_spec({**sweep, **changes}, tmp_path)).values()
        return {run.key for run in runs}

    assert keys() == keys(title="other")
    assert not keys() & keys(offload="model") and not keys() & keys(vae_tiling=True)


def test_the_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help"]) == 0
    shown = capsys.readouterr().out
    for key in (*KEYS, *METHOD_KEYS, *SIZE_KEYS, *BARS, *NETWORKS):
        assert re.search(rf"\b{key}\b", shown), key


def test_a_dry_run_lists_and_writes_nothing(
    sweep: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert main(["sweep", write(sweep, tmp_path), "-o", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("10 runs, 2 of them dense") and len(lines) == 11
    assert any("neighborhood stride=1 dense_layers=1 at 75% | “a cat” seed 0" in x for x in lines)
    assert not out.exists()
    turns = {**sweep, "seeds": [3, 5], "seeds_in_turn": True, "noise_floor": []}
    assert main(["sweep", write(turns, tmp_path), "-o", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith("6 runs, 2 of them dense")
    assert "“a cat” seed 3" in shown and "“a cat” seed 5" not in shown and "seed 5" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promts": ["a"]}, "unknown key 'promts': did you mean 'prompts'"),
        ({"prompts": []}, "prompts: the list is empty"),
        ({"prompts": ["a", "a"]}, "prompts: 'a' stands in it twice"),
        ({"prompts": [3]}, "prompts: 3 must be a mapping"),
        ({"prompts": [1, 2]}, "{prompt: …, image: …}, or a text"),
        ({"prompt_file": "no.txt"}, "prompt_file"),
        ({"prompts": [{"prompt": "a", "image": "no.png"}]}, "there is no image"),
        ({"seeds": [True]}, "seeds: True must be a whole number"),
        ({"seeds": -1}, "seeds: -1 must be at least 0"),
        ({"seeds": 2**63}, "must be below 9223372036854775808"),
        ({"steps": [0]}, "steps: 0 must be at least 1"),
        ({"dtype": "fp8"}, "dtype: 'fp8'"),
        ({"sizes": {"heigth": 3}}, "did you mean 'height'"),
        ({"sizes": [64, 64]}, "64 must be a mapping {height: …, width: …, num_frames: …}"),
        ({"sizes": [{"height": 3}, {"height": 3}]}, "sizes: {'height': 3} stands in it twice"),
        ({"title": 3}, "title: 3 must be a text"),
        ({"prompts": [{}]}, "prompts: an entry is empty"),
        ({"prompt_file": "\0"}, "prompt_file"),
        ({1: 2}, "the sweep: the key 1 must be a text"),
        ({"methods": [{"settings": "\0", "target": "2x"}]}, "methods: "),
        ({"bar": {"psnr": "x"}}, "bar: psnr: 'x' must be a number"),
        ({"methods": [{"set": {}}]}, "methods: name the method"),
        ({"methods": [3]}, "methods: 3 must be a mapping {method: …"),
        ({"methods": [{"method": "radial", "dense_steps": -1}]}, "radial: dense_steps=-1 must be"),
        ({"sizes": {"height": 3.5}}, "sizes: height: 3.5 must be a whole number"),
        ({"call": {"prompt": "x"}}, "call: prompt is set by the sweep"),
        ({"call": {"height": 3}}, "call: height belongs under sizes"),
        ({"call": {"guidance": 3}}, "did you mean 'guidance_scale'"),
        ({"methods": []}, "methods: name at least one"),
        ({"methods": ["radail"]}, "did you mean 'radial'"),
        ({"methods": ["radial", "radial"]}, "twice"),
        ({"methods": [{"method": "radial", "set": {"deca": 1}}]}, "did you mean 'decay'"),
        ({"methods": [{"method": "radial", "set": {"decay": "much"}}]}, "decay='much'"),
        ({"methods": [{"method": "radial", "set": {"decay": True}}]}, "must be of type float"),
        ({"methods": [{"method": "radial", "set": {"decay": -1}}]}, "decay=-1 must be positive"),
        ({"methods": [{"method": "radial", "vary": {"decay": []}}]}, "decay: the list is empty"),
        ({"methods": [{"method": "radial", "sets": {}}]}, "did you mean 'set'"),
        (
            {"methods": ["window", {"method": "radial", "sets": {}}]},
            "methods: radial: unknown key 'sets'",
        ),
        ({"prompts": ["a", {"prompt": "b", "imag": "c"}]}, "prompts: unknown key 'imag'"),
        ({"methods": [{"method": "window", "backend": "cuda"}]}, "window: backend"),
        ({"methods": ["radial+window"]}, "does not combine"),
        ({"schedules": {"dense_steps": 1.5}}, "dense_steps=1.5 must be a count"),
        ({"schedules": {"dense_steps": 3}}, "dense_steps=3 is more than the 2 steps"),
        ({"kept": [50]}, "kept: 50 must be between 0 and 1"),
        ({"noise_floor": ["sed"]}, "did you mean 'seed'"),
        ({"bar": {"lpips": 1}}, "bar: unknown key 'lpips'"),
        ({"networks": {"lpip": "x"}}, "did you mean 'lpips'"),
        ({"dense_every": "x"}, "dense_every: 'x' must be a whole number"),
        ({"model": "no/such/model/"}, "no model"),
        # What only the loaded model can tell:
        ({"schedules": {"dense_layers": 9}}, "dense_layers=9"),
        ({"kept": [0.2], "schedules": {"dense_steps": 1}}, "kept: 0.2 cannot be met"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_runs(
    sweep: dict[str, Any], changes: dict[Any, Any], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "runs"
    words = ["sweep", write({**sweep, **changes}, tmp_path), "-o", str(out), "--quiet"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1, shown.err
    assert message in shown.err
    assert not list(out.glob("runs/*"))


def test_what_is_no_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    for text, message in [
        ("prompts: [a]\nprompts: [b]\n", "'prompts' stands twice"),
        ("prompts: [a\n", "is not YAML"),
        ("- a\n", "must be a mapping"),
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("!!python/object/apply:os.getcwd []\n", "is not YAML"),
    ]:
        broken.write_text(text)
        assert main(["sweep", str(broken)]) == 2
        assert message in capsys.readouterr().err
    assert main(["sweep", str(tmp_path)]) == 2
    assert "is a folder, not a YAML file: repeat the command" in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert main(["sweep", "--report-only", str(tmp_path)]) == 2
    assert "not the folder of a sweep" in capsys.readouterr().err
    with pytest.raises(BadSweep, match="dense"):
        check_spec({"prompts": ["a"], "methods": ["dense"]}, tmp_path)


def test_fingerprints_are_those_of_results_that_are_stored() -> None:
    """Or a sweep that was begun with an earlier release would be rendered again."""
    scene = Scene("demo", "fp32", Prompt("a cat"), 3, 7, {"height": 64, "width": 64}, 8)
    radial = Way("method", MethodSpec("radial", {"decay": 0.5}), {"dense_steps": 1}, 0.25, True)
    assert Rendering(scene, Way("dense")).key == "0415b90afa65"
    assert Rendering(scene, radial, errors=True).key == "e8bfcc213c83"
    foreign = replace(scene, prompt=Prompt("une fée, 猫"))
    assert Rendering(foreign, Way("dense")).name == "dense-une-f-e-s7-cb63f6ff2cc9"


def test_locks_of_processes_are_beyond_those_of_runs() -> None:
    """The byte that claims a run is its fingerprint, of twelve hexadecimal digits."""
    assert int("f" * 12, 16) < FIRST_SLOT < 2**62 and SLOTS >= 64


def test_the_same_sweep_goes_on_from_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_file({"title": "one"}, tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    near = Path(tmp_path.name)
    assert keep_file({"title": "one"}, near).read_text("utf-8").splitlines()[1:] == ["title: one"]
    with pytest.raises(BadSweep, match="describes another sweep"):
        keep_file({"title": "two"}, near)


def test_files_of_settings_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are told apart by their names: two files under one would be averaged."""
    monkeypatch.setattr(specs, "choose_for", lambda *_: None)
    monkeypatch.setattr(Settings, "load", lambda path: None)

    def labels(*entries: dict[str, Any]) -> list[str]:
        methods = [{"target": "30 dB", **entry} for entry in entries]
        spec = check_spec({"prompts": ["a"], "methods": methods}, tmp_path)
        return [method.label for method in spec.methods]

    one = {"settings": "a/demo.json"}
    assert labels(one, {"settings": "b.json"}) == ["30 dB (demo.json)", "30 dB (b.json)"]
    assert labels(one, {**one, "backend": "torch"})[1] == "30 dB (demo.json) backend=torch"
    with pytest.raises(BadSweep, match=r"30 dB \(demo.json\) are two files of one name"):
        labels(one, {"settings": "b/demo.json"})


def test_without_time_no_model_is_loaded(tmp_path: Path) -> None:
    spec = check_spec({"prompts": ["a"], "methods": ["radial"]}, tmp_path)
    store, said = Store(tmp_path / "out"), list[str]()
    failed = run_sweep(spec, plan_sweep(spec), store, Process(), said.append, minutes=0)
    store.close()
    assert failed == [] and said == ["4 runs do not fit into 0 minutes; the same command goes on"]


def test_killed_at_its_end_a_run_is_not_both_done_and_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = check_spec({"prompts": ["a"], "methods": ["radial"]}, tmp_path)
    [[run, *_]] = plan_sweep(spec).values()
    store, real = Store(tmp_path / "out"), os.replace
    store.fail(run, ValueError("before"), {})

    def killed(source: Path, target: Path) -> None:
        real(source, target)
        if target.is_dir():
            raise KeyboardInterrupt

    with store.stage(run) as stage, monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.finish(run, {"name": run.name}, stage)
    assert store.is_done(run) and store.failure(run) is None
    store.close()
