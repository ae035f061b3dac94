"""What is found in the folder of an earlier training: gone on with if it fits, else said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffpatch.errors import DiffpatchError
from diffpatch.tuning.lora import RECORD, STATE, WEIGHTS, LoraTraining
from tests import tiny

pytest.importorskip("peft")
TARGETS = ["attn1.to_q"]


def begun(folder: Path, targets: list[str] = TARGETS, rank: int = 2) -> LoraTraining:
    return LoraTraining(tiny.wan_transformer(), folder, targets, rank=rank, rate=1e-3)


def loss(model: Any, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    latents, text = (
        torch.randn(shape, generator=generator) for shape in ((1, 16, 1, 4, 4), (1, 3, 32))
    )
    out = model(latents, torch.tensor([1.0]), text, return_dict=False)[0]
    return torch.as_tensor(out.square().mean())


def quiet(_: str) -> None:
    pass


def renamed(folder: Path) -> None:
    zeros = torch.zeros(2, 24)
    save_file({"transformer.blocks.9.attn1.to_q.lora_A.weight": zeros}, folder / WEIGHTS)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda f: (f / WEIGHTS).write_bytes(b"x"), "is missing or damaged"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing or damaged"),
    "no state": (lambda f: (f / STATE).unlink(), f"{STATE} is missing or damaged"),
    "empty state": (lambda f: save_file({"x": torch.zeros(1)}, f / STATE), "no whole training"),
    "a list": (lambda f: (f / RECORD).write_text("[]"), "no whole training"),
    "no JSON": (lambda f: (f / RECORD).write_text("{"), "is not JSON"),
    "another model": (renamed, "of another model than WanTransformer3DModel"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_cannot_be_gone_on_with_says_so(how: str, tmp_path: Path) -> None:
    breaks, words = BROKEN[how]
    begun(tmp_path).run(1, loss, quiet)
    breaks(tmp_path)
    with pytest.raises(DiffpatchError, match=words):
        begun(tmp_path)


def test_other_arguments_than_it_was_begun_with_are_refused(tmp_path: Path) -> None:
    begun(tmp_path).run(1, loss, quiet)
    for changes in ({"rank": 4}, {"targets": ["attn1.to_k"]}):
        with pytest.raises(DiffpatchError, match="of other layers, of another rank"):
            begun(tmp_path, **changes)
    again = begun(tmp_path)
    again.run(2, loss, quiet)
    assert len(again.record["losses"]) == 2


@pytest.mark.parametrize(("rank", "rate"), [(0, 1e-3), (2, 0.0), (2, math.nan), (2, math.inf)])
def test_numbers_that_cannot_be(rank: int, rate: float, tmp_path: Path) -> None:
    with pytest.raises(DiffpatchError, match=r"LoraTraining: ra\w+=\S+ must be"):
        LoraTraining(tiny.wan_transformer(), tmp_path, TARGETS, rank=rank, rate=rate)
