"""Sweeps: what is refused, what a run writes down, and that nothing is done twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffpatch
from diffpatch.cli import main
from diffpatch.eval.media import load_frames, save_frames
from diffpatch.eval.quality.metrics import psnr
from diffpatch.eval.sweep import quick as quick_module
from diffpatch.eval.sweep.plan import plan_sweep
from diffpatch.eval.sweep.spec import check_spec
from diffpatch.eval.sweep.store import Store
from tests import tiny
from tests.eval.sweep.tiny_sweep import HOSTILE, results, stamps, write


def test_every_run_is_there_with_what_reproduces_it(swept: Path) -> None:
    found = results(swept)
    kinds = [result["kind"] for result in found.values()]
    # 2 prompts: dense, dense from another seed (for the floor, not in the plan), floors, methods.
    assert sorted(kinds) == ["dense"] * 4 + ["kernel"] * 2 + ["method"] * 4 + ["seed"] * 2
    assert len(json.loads((swept / "sweep.json").read_text())["runs"]) == 10
    for result in found.values():
        assert result["settings"]["num_inference_steps"] == 2
        assert result["environment"]["versions"]["torch"] == torch.__version__
        assert result["call"]["height"] == 32 and result["seed"] in (0, 1)
    near = [result for result in found.values() if result["method"] == "neighborhood"]
    assert {result["prompt"] for result in near} == {"a cat", HOSTILE}
    for result in near:
        assert result["wanted"] == 0.75 and result["kept"] == pytest.approx(0.75, abs=0.12)
        assert result["report"]["kept_per_layer"]["transformer.0"] == 1.0
        assert result["options"] == {"dense_steps": 0, "dense_layers": 1}
        assert result["parameters"] == {"stride": 1} and "Neighborhood(" in result["fitted"]
        base = result["dense"]["seconds"]["total"] / result["seconds"]["total"]
        assert result["speedup"]["total"] == pytest.approx(base)
        assert not result["shared"]
    errors = [result for result in found.values() if "attention_error" in result]
    assert {result["prompt"] for result in errors} == {"a cat"} and len(errors) == 2
    for error in (result["attention_error"] for result in errors):
        assert 0 < error["mean"] < 1 and len(error["per_branch"]) == 2
        assert error["mean"] == pytest.approx(sum(error["per_branch"].values()) / 2)
        assert 0 < error["difference"] < 2
    for result in errors:
        assert 0 < result["attention_error"]["mean"] < 1
        assert all(0 < x < 1.001 for x in result["attention"]["mass_kept"]["transformer.1"])
        assert (swept / "runs" / result["name"] / "attention.png").is_file()


def test_frames_are_kept_so_that_scores_can_be_computed_again(swept: Path) -> None:
    for result in results(swept).values():
        if result["kind"] != "method":
            continue
        frames = load_frames(swept / "runs" / result["name"] / "frames.npz")
        dense = load_frames(swept / "runs" / result["dense"]["name"] / "frames.npz")
        assert frames.shape == (17, 3, 32, 64)
        features = np.load(swept / "runs" / result["name"] / "features.npy")
        assert features.shape[0] == 1 and np.isfinite(features).all()
        assert result["quality"]["psnr"] == pytest.approx(psnr(frames, dense).mean)
    before = results(swept)
    assert main(["sweep", "--report-only", "--rescore", str(swept), "--quiet"]) == 0
    assert results(swept) == before


def test_the_floors_bracket_what_is_possible(swept: Path) -> None:
    rows = json.loads((swept / "summary.json").read_text())["rows"]
    quality = {row["kind"]: row["quality"]["psnr"] for row in rows if row["kind"] != "dense"}
    assert quality["kernel"] > 60  # the same clip but for rounding
    assert quality["seed"] < 40  # another clip


def test_frames_survive_storage(tmp_path: Path) -> None:
    frames = torch.arange(256).float().div(255).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    save_frames(frames, tmp_path / "frames.npz")
    assert torch.equal(load_frames(tmp_path / "frames.npz"), frames)
    with np.load(tmp_path / "frames.npz", allow_pickle=False) as data:
        assert data["frames"].dtype == np.uint8
    between = (frames + 0.4 / 255).clamp(0, 1)  # nearer to the level below than to that above
    save_frames(between, tmp_path / "between.npz")
    assert torch.equal(load_frames(tmp_path / "between.npz"), frames)
    above = (frames - 0.4 / 255).clamp(0, 1)
    save_frames(above, tmp_path / "above.npz")
    assert torch.equal(load_frames(tmp_path / "above.npz"), frames)


def test_a_folder_without_its_result_is_done_again(
    sweep: dict[str, Any], swept: Path, tmp_path: Path
) -> None:
    """As a disk that was full in the wrong moment leaves it."""
    folder = Path(shutil.copytree(swept, tmp_path / "copy"))
    [run, *_] = [r for r in plan_sweep(check_spec(sweep, tmp_path))[sweep["model"]]
                 if r.way.kind == "method"]  # fmt: skip
    (folder / "runs" / run.name / "run.json").unlink()
    store = Store(folder)
    assert store.is_pending(run) and not store.is_done(run)
    store.close()
    assert main(["sweep", write(sweep, tmp_path), "-o", str(folder), "--quiet"]) == 0
    assert results(folder)[run.name]["kept"] < 1 and len(results(folder)) == len(results(swept))


def test_a_second_start_does_nothing_and_a_longer_list_only_the_rest(
    sweep: dict[str, Any], swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(swept)
    longer = {**sweep, "methods": [*sweep["methods"], "window"]}
    assert main(["sweep", write(sweep, tmp_path), "-o", str(swept)]) == 0
    assert capsys.readouterr().err == "" and stamps(swept) == before
    assert main(["sweep", write(longer, tmp_path), "-o", str(swept), "--json"]) == 0
    shown = capsys.readouterr()
    after = stamps(swept)
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 2
    assert all("window" in path for path in set(after) - set(before))
    assert "window" in [row["label"] for row in json.loads(shown.out)["rows"]]


def test_reports_follow_the_file_where_nothing_is_left_to_do(
    sweep: dict[str, Any], swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(swept, tmp_path / "copy"))
    before = stamps(folder)
    fewer = {"title": "other", "bar": {"psnr": 99}, "methods": sweep["methods"][-1:]}
    for data in ({**sweep, **fewer}, sweep):
        assert main(["sweep", write(data, tmp_path), "-o", str(folder), "--json"]) == 0
        found = json.loads((folder / "sweep.json").read_text())
        assert found["title"] == data["title"] and found["bar"] == data["bar"]
        labels = {row["label"].split()[0] for row in json.loads(capsys.readouterr().out)["rows"]}
        assert ("radial" in labels) == (data["title"] == sweep["title"])
    assert stamps(folder) == before


def test_other_networks_do_not_join_a_table(
    sweep: dict[str, Any], swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(swept, tmp_path / "copy"))
    words = ["sweep", write({**sweep, "networks": {}}, tmp_path), "-o", str(folder), "--quiet"]
    assert main(words) == 2
    assert "add --rescore" in capsys.readouterr().err
    assert main([*words, "--rescore"]) == 0
    assert main(words) == 0
    capsys.readouterr()
    last = json.loads((folder / "sweep.json").read_text())["runs"][-1]
    one = folder / "runs" / last / "run.json"  # as if the rescore had been cut off before it
    known = json.loads(one.read_text())
    one.write_text(json.dumps(known | {"judged_by": known["judged_by"] | {"clip": "another"}}))
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "clip: runs in" in told and "another" in told and "add --rescore" in told
    assert main(["sweep", "--report-only", "--rescore", str(folder), "--quiet"]) == 0


def test_what_fails_is_kept_apart_and_tried_again_on_request(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    short = {**sweep, "prompts": ["a cat"], "noise_floor": [], "methods": ["radial", "window"]}
    words = ["sweep", write(short, tmp_path), "-o", str(tmp_path / "runs")]
    real = torch.nn.Module.__call__

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        patch = getattr(self, "_diffpatch", None)
        if patch is not None and "Window" in str(patch.patch.method):
            raise torch.OutOfMemoryError("no memory <left>")
        return real(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "__call__", broken)
        assert main(words) == 1
    shown = capsys.readouterr()
    assert "FAILED, OutOfMemoryError: no memory <left>" in shown.err
    assert "--retry-failed" in shown.err and "radial" in shown.out
    [failure] = (tmp_path / "runs" / "failed").iterdir()
    record = json.loads(failure.read_text())
    assert record["method"] == "window" and "Traceback" in record["traceback"]
    assert "no memory &lt;left&gt;" in (tmp_path / "runs" / "report.html").read_text()
    assert main([*words, "--quiet"]) == 1  # not tried again unasked
    assert main([*words, "--quiet", "--retry-failed"]) == 0
    assert not list((tmp_path / "runs" / "failed").iterdir())
    assert len(results(tmp_path / "runs")) == 3


def test_dense_is_timed_again_where_its_clock_is_old(sweep: dict[str, Any], tmp_path: Path) -> None:
    windows = {"method": "window", "vary": {"shift": ["layer", "step", "none"]}}
    short = {
        **sweep, "prompts": ["a cat"], "noise_floor": [], "methods": [windows],
        "attention_error": 0, "dense_every": 2,
    }  # fmt: skip
    out = tmp_path / "runs"
    assert main(["sweep", write(short, tmp_path), "-o", str(out), "--quiet"]) == 0
    names = json.loads((out / "sweep.json").read_text())["runs"]
    found = [results(out)[name] for name in names]
    clocks = [result["dense"]["seconds"] for result in found[1:]]
    assert [result["dense"]["runs_since"] for result in found[1:]] == [0, 1, 0]
    assert clocks[0] == clocks[1] == found[0]["seconds"] != clocks[2]


def test_a_clock_that_is_never_renewed_is_the_stored_one(
    sweep: dict[str, Any], tmp_path: Path
) -> None:
    """After an interruption, say: the method is gone, dense is there."""
    short = {
        **sweep, "prompts": ["a cat"], "noise_floor": [], "methods": ["window"],
        "attention_error": 0, "dense_every": 0,
    }  # fmt: skip
    out = tmp_path / "runs"
    words = ["sweep", write(short, tmp_path), "-o", str(out), "--quiet"]
    assert main(words) == 0
    dense, method = json.loads((out / "sweep.json").read_text())["runs"]
    assert results(out)[method]["dense"]["runs_since"] == 0
    shutil.rmtree(out / "runs" / method)
    assert main(words) == 0
    found = results(out)[method]["dense"]
    assert found == {"name": dense, "seconds": results(out)[dense]["seconds"], "runs_since": None}


def command(sweep: dict[str, Any], folder: Path) -> list[str]:
    return ["diffpatch", "sweep", write(sweep, folder), "-o", str(folder / "runs")]


def start(words: list[str], rank: int) -> subprocess.Popen[bytes]:
    """One of two processes, as `accelerate launch` and torchrun start them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}},
    )


@pytest.mark.timeout(900)  # other work may want the cores
def test_processes_share_the_work_and_nothing_is_lost_to_kill_9(
    sweep: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two processes work, a third, this one, holds on to a run; then the two are killed."""
    runs, words = tmp_path / "runs", command(sweep, tmp_path)
    [first, *_] = plan_sweep(check_spec(sweep, tmp_path))[sweep["model"]]
    store = Store(runs)
    with store.claim(first) as mine:
        workers = [start(words, rank) for rank in (0, 1)]
        try:
            # The other scene can be done without the dense run that is held here.
            limit = time.monotonic() + 600
            while len(results(runs)) < 6 and time.monotonic() < limit:
                assert [worker.poll() for worker in workers] == [None, None]
                time.sleep(0.02)
            held, others = store.is_pending(first), store.others()
        finally:
            for worker in workers:
                worker.kill()  # SIGKILL: nothing of theirs runs any more
                worker.wait()
    store.close()
    assert mine and held and others == 2
    before = results(runs)
    unchanged = stamps(runs)
    assert {result["process"]["world"] for result in before.values()} == {2}
    assert all(result["shared"] for result in before.values() if "shared" in result)
    (runs / f".partial-{first.name}").mkdir(exist_ok=True)  # as if killed in the middle of it
    (runs / f".partial-{first.name}" / "frames.npz").write_bytes(b"half")
    assert main(words[1:]) == 0
    shown = capfd.readouterr()
    after = stamps(runs)
    assert len(after) == 12 and {path: after[path] for path in unchanged} == unchanged
    assert not list(runs.glob(".partial-*"))
    assert "rough" in shown.out
    finished = [line for line in shown.err.splitlines() if line.startswith("[")]
    titles = [line.partition("] ")[2].rpartition(": ")[0] for line in finished]
    assert len(titles) == len(set(titles)) >= 6, "a run was done twice"


def quick(sweep: dict[str, Any], out: Path, *more: str) -> list[str]:
    size = ["--height", "32", "--width", "64", "--num-frames", "17", "--steps", "2"]
    return ["sweep", "-m", sweep["model"], "-p", "a cat", *size, "-o", str(out), *more]


def test_a_model_and_a_prompt_are_enough(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(quick_module, "CANDIDATES", ("radial", "no-such-method", "window"))
    out = tmp_path / "runs"
    assert main(quick(sweep, out, "--kept", "0.6", "--minutes", "0")) == 0
    shown = capsys.readouterr()
    assert "3 runs do not fit into 0 minutes; the same command goes on" in shown.err
    assert main(quick(sweep, out, "--kept", "0.6")) == 0  # which it does
    shown = capsys.readouterr()
    found = {result["label"]: result for result in results(out).values()}
    assert set(found) == {"dense", "radial at 60%", "window at 60%"}
    files = {path.name for path in out.iterdir()}
    assert {"sweep.yaml", "report.html"} <= files
    summary = json.loads((out / "summary.json").read_text())
    [verdict] = summary["verdicts"]
    assert verdict["text"] in shown.out
    # The line does what the run did, whoever was faster on a busy machine.
    for label in ("radial at 60%", "window at 60%"):
        model = tiny.wan()
        arguments = dict(found[label]["patch"])
        assert arguments["dense_steps"] == 0 and arguments["dense_layers"] == 0
        patched = diffpatch.patch(model.pipe, found[label]["method"], **arguments)
        model.pipe(prompt="a cat", **{**found[label]["call"], "output_type": "latent"})
        assert diffpatch.report(patched).kept == pytest.approx(found[label]["kept"])
    words = ["sweep", str(out / "sweep.yaml"), "-o", str(out), "--dry-run"]
    assert main(words) == 0  # the file for later describes the same
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 runs, 1 of them dense")
    assert main(quick(sweep, out)) == 2
    assert "describes another sweep: choose another -o" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to sweep: give SWEEP.yaml, or --model MODEL --prompt TEXT"),
        (["-m", "demo"], "nothing to sweep"),
        (["FILE", "-p", "a cat"], "--prompt is for a sweep without a file; write it into"),
        (["FILE", "--steps", "3"], "--num-inference-steps is for a sweep without a file"),
    ],
)
def test_a_sweep_is_a_file_or_a_model_with_prompts(
    sweep: dict[str, Any], words: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [write(sweep, tmp_path) if word == "FILE" else word for word in words]
    assert main(["sweep", *words, "-o", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_ends_a_sweep_and_names_the_path(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(path: Path, **arrays: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "runs"
    monkeypatch.setattr(np, "savez_compressed", full)
    assert main(["sweep", write(sweep, tmp_path), "-o", str(out), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert "no space is left on the disk for" in err and "frames.npz" in err
    assert not list(out.glob("failed/*")) and not list(out.glob(".partial*"))
    assert not list(out.glob("runs/*"))
