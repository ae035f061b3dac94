"""The tiny pipelines that tests build on: deterministic, finite, listening to the prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests import tiny


@pytest.mark.parametrize("build", [tiny.wan, tiny.wan22, tiny.wan_i2v, tiny.flux])
def test_tiny_pipelines_are_deterministic(build: Callable[[], tiny.Tiny]) -> None:
    model = build()
    first, again, other = model.run(), model.run(), model.run(prompt="two dogs")
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
