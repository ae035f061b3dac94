"""What a report says of settings that were chosen holds for what the caller asks for beside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from diffpatch.patching.options.from_settings import promised
from diffpatch.targets.choice import Chosen

CHOSEN = Chosen(
    rest="drop", budgets={"transformer": {0: (0.5,)}}, dense_steps=0.15, kept=0.575, error=0.1,
    psnr=30.0, spread=2.0, speedup=1.5, next_kept=0.0,
)  # fmt: skip
SAID = "chosen for '30 dB': kept 57%, 30.0 ± 2.0 dB, 1.50× predicted"


@pytest.mark.parametrize(
    ("dense", "more"),
    [
        ({}, ""),
        ({"dense_steps": None, "dense_layers": None, "dense_last_steps": 0}, ""),
        ({"dense_steps": 0.15, "dense_layers": 0}, ""),
        ({"dense_layers": ()}, ""),
        ({"dense_steps": 0}, "; that is not about dense_steps=0"),
        ({"dense_steps": 0.5}, "; that is not about dense_steps=0.5"),
        (
            {"dense_layers": [0], "dense_last_steps": 1},
            "; that is not about dense_layers=[0], dense_last_steps=1",
        ),
    ],
)
def test_other_dense_steps_and_layers_are_not_what_was_measured(
    dense: dict[str, Any], more: str
) -> None:
    assert promised(CHOSEN, "30 dB", dense) == SAID + more
    plain = replace(CHOSEN, budgets={})  # all attention is dense, whatever the caller says
    assert "not about" not in promised(plain, "30 dB", dense)
