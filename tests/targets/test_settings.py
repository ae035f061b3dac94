"""The file of tuned settings: what it accepts, and one sentence for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from diffpatch import BadParameter
from diffpatch.targets.settings import Settings, fingerprint

MODEL = "0123456789abcdef"
TRANSFORMERS = {"transformer": ("WanTransformer3DModel", 2, 3)}


RUN: dict[str, Any] = {
    "prompt": "a cat", "sparse": 0.5, "dense_steps": 0.1, "cache": 0.1, "kept": 0.5, "calls": 0.5,
    "psnr": 30.0, "seconds": 1.0, "dense_seconds": 2.0,
}  # fmt: skip


def made(**changes: Any) -> dict[str, Any]:
    units = {f"transformer.{layer}.{head}": {"drop": [(0.1, 0.5), (0.3, 0.2)],
             "virtual": [(0.1, 0.4)]} for layer in range(2) for head in range(3)}  # fmt: skip
    measured = {
        "model": MODEL, "transformers": TRANSFORMERS, "grid": (5, 8, 8, 7), "kind": "video",
        "tile": 64, "pool": 32, "steps": 8, "dense_steps": 0.15, "dtype": "float32",
        "prompts": ["a red circle"], "seeds": [0], "versions": {"torch": "2"}, "time": "now",
    }  # fmt: skip
    data = {
        "format": "diffpatch settings", "version": 1, "measured_on": measured, "curves": units
    }  # fmt: skip
    return {**data, **changes}


def test_a_file_survives_storage(tmp_path: Path) -> None:
    settings = Settings.model_validate(made(floor=60.0, front=[RUN]))
    settings.save(tmp_path / "wan.json")
    assert Settings.load(tmp_path / "wan.json") == settings
    assert [p.name for p in tmp_path.iterdir()] == ["wan.json"]
    points = settings.points()["transformer.0.0"]
    assert {(p.kept, p.error, p.rule) for p in points} == {
        (0.1, 0.5, "drop"), (0.3, 0.2, "drop"), (0.1, 0.4, "virtual"), (1.0, 0.0, "dense")
    }  # fmt: skip


def text(**changes: Any) -> str:
    return json.dumps(made(**changes))


def broken(path: str, value: Any) -> str:
    """A file in which one value, at a path of keys, is another."""
    data = json.loads(text())
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        (text()[:-40], "not JSON; was it cut off"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a file that `diffpatch tune` wrote"),
        ('{"a": 1}', "not a file that `diffpatch tune` wrote"),
        (text(version=2), "version 2, and this diffpatch reads 1: update"),
        (text(version="1"), "version '1'"),
        (text(curves={}), "curves: "),
        (text(surprise=1), "surprise: extra inputs"),
        (broken("measured_on/tile", 0), "measured_on.tile: "),
        (broken("measured_on/tile", "x"), "measured_on.tile: "),
        (broken("measured_on/model", "<script>"), "measured_on.model: "),
        (broken("measured_on/dense_steps", 1.5), "measured_on.dense_steps: "),
        (broken("measured_on/prompts", []), "measured_on.prompts: "),
        (text(front=[{**RUN, "sparse": 0.0}]), "front.0.sparse: "),
        (text(front=[{**RUN, "cache": -1.0}]), "front.0.cache: "),
        (text(front=[{**RUN, "seconds": 0}]), "front.0.seconds: "),
        (text(front=[{**RUN, "surprise": 1}]), "front.0.surprise: extra inputs"),
        (text(checked=[{"prompt": "x" * 20_001}]), "checked.0.prompt: "),
        (text(checked=3), "checked: "),
        (text(front=[{**RUN, "seconds": 1e-300}]), "front.0.seconds: "),
        (text(floor=1e300), "floor: "),
        (text().replace("transformer.1.2", "transformer"), "curves.transformer"),
        (text().replace("transformer.1.1", "transformer.1.9"), "lacks curves of some heads"),
        (broken("curves/transformer.0.0", {"drop": [[2.0, 0.1]]}), "curves.transformer.0.0.drop"),
        (broken("curves/transformer.0.0", {"drop": [[0.2, -0.1]]}), "curves.transformer.0.0.drop"),
        (text().replace("0.5", "NaN", 1), "finite number"),
        (text().replace("0.5", "Infinity", 1), "finite number"),
    ],
)
def test_damaged_foreign_future_and_hostile_files_get_one_sentence(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BadParameter, match=message) as raised:
        Settings.load(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        BadParameter, match=r"none\.json: there is no such file; `diffpatch tune -o .* writes one"
    ):
        Settings.load(tmp_path / "none.json")
    with pytest.raises(BadParameter, match="cannot be read"):
        Settings.load(tmp_path)
    binary = tmp_path / "b.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadParameter, match="cannot be read"):
        Settings.load(binary)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BadParameter, match="larger than 64 MB"):
        Settings.load(huge)


class WanTransformer3DModel(torch.nn.Linear):
    """A model of that name."""


def test_another_model_is_refused() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(3, 5)
    data = made()
    data["measured_on"]["model"] = fingerprint({"transformer": model})
    settings = Settings.model_validate(data)
    settings.check_model({"transformer": model})
    with pytest.raises(BadParameter, match=r"of transformer: Wan.* has transformer: Linear"):
        settings.check_model({"transformer": torch.nn.Linear(3, 5)})
    with pytest.raises(BadParameter, match="has transformer: WanTransformer3DModel, transformer_2"):
        settings.check_model({"transformer": model, "transformer_2": model})
    with pytest.raises(BadParameter, match="other weights"):
        settings.check_model({"transformer": WanTransformer3DModel(3, 5)})


def test_other_grids_are_carried_over_or_refused() -> None:
    settings = Settings.model_validate(made())
    assert settings.check_grid((5, 8, 8, 7)) is None
    remark = settings.check_grid((5, 8, 12, 7))
    assert remark is not None and "5×8×8 + 7" in remark and "5×8×12 + 7" in remark
    plain = settings.check_grid((5, 8, 16, 0))
    assert plain == "curves of 5×8×8 + 7 tokens, carried to 5×8×16"
    for other in ((5, 8, 17, 7), (2, 8, 8, 7), (1, 16, 20, 7)):
        with pytest.raises(BadParameter, match="tune at this size"):
            settings.check_grid(other)


def test_a_fingerprint_names_weights_and_not_where_they_are() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7)
    name = fingerprint({"transformer": layer})
    assert name == fingerprint({"transformer": layer.to(torch.bfloat16)})
    assert name != fingerprint({"transformer_2": layer})
    assert name == fingerprint({"transformer": layer.float()})
    with torch.no_grad():
        layer.weight.mul_(1e-6)  # bfloat16 and float32 hold what float16 rounds away
    small = fingerprint({"transformer": layer})
    assert small == fingerprint({"transformer": layer.to(torch.bfloat16).float()})
    assert small != fingerprint({"transformer": layer.half()})
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert name != fingerprint({"transformer": layer})
    assert len(name) == 16


def test_offload_does_not_change_a_fingerprint() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Sequential(torch.nn.Linear(7, 2)))
    name = fingerprint({"transformer": model})
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert fingerprint({"transformer": model}) == name
