"""The command line of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffpatch.cli import main
from tests.cli.test_cli import SIZE


def test_bench_attention_checks_then_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    shape = ["--grid", "5x6x7", "--text", "9", "--heads", "2", "--head-dim", "16"]
    chosen = ["--method", "radial", "--method", "window", "--set", "window=0.5"]
    chosen += ["--method", "linear"]
    words = ["bench", "attention", *shape, *chosen, "--repeats", "2", "--quiet"]
    assert main([*words, "--json", str(file)]) == 0
    assert "speedup" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["case"]["tokens"] == 219
    assert [entry["name"] for entry in result["methods"]] == ["radial", "window", "linear"]
    for entry in result["methods"]:
        assert entry["error"] < 1e-4 and entry["speedup"]["median"] > 0


def test_bench_attention_refuses_to_time_wrong_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffpatch.attention", lambda q, *_, **__: q)
    assert main(["bench", "attention", "--grid", "5x6x7", "--quiet"]) == 1
    shown = capsys.readouterr()
    assert "radial is wrong" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention", "--grid", "5x6"], "such as 33x16x16"),
        (["attention", "--grid", "0x6x7"], "must be at least 1"),
        (["attention", "--method", "windw"], "did you mean 'window'"),
        (["attention", "--set", "wide=1"], "no such parameter"),
        (["attention", "--method", "radial+temporal", "--grid", "5x6x7"], "bench render"),
        (["memory"], "memory"),
    ],
)
def test_bench_refuses_bad_requests(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_bench_render(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "render", "-m", str(models / "wan"), *SIZE, "--repeats", "2", "--json"]
    assert main([*words, "--method", "radial", "--dense-layers", "0", "--quiet"]) == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert list(variants) == ["dense", "radial"]
    assert variants["dense"]["psnr"] == 100 and variants["dense"]["kept"] == 1
    assert variants["radial"]["kept"] < 1 and variants["radial"]["speedup"]["total"]["median"] > 0
