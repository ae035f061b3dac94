"""What a guidance branch carries is about its text, its condition and its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch.patching.run.path import Given
from diffpatch.patching.run.run import OTHERS
from tests.patching.run.test_temporal_state import MODES, aligned
from tests.tiny import wan

DYNAMIC = ("dynamic", {"kept": 0.5, "tile": 16, "refresh": 4})
METHODS = pytest.mark.parametrize(
    ("method", "params"), [*MODES, DYNAMIC], ids=["tail", "skip", "mask", "dynamic"]
)
Texts = Callable[[int], tuple[torch.Tensor, ...]]
UNCOND, COND, OTHER = torch.randn(3, 1, 8, 32, generator=torch.Generator().manual_seed(1))
CHANGED = 3  # the step from which on texts are others
LOOPS: dict[str, Texts] = {
    "guidance stops": lambda step: (UNCOND, COND) if step < CHANGED else (COND,),
    "another text": lambda step: (COND if step < CHANGED else OTHER,),
    "more samples": lambda step: (COND,) if step < CHANGED else (torch.cat([COND, OTHER]),),
}


def loop(pipe: Any, texts: Texts, first: int = 0, x: torch.Tensor | None = None) -> Any:
    """A loop of somebody's own that names no branches; gives what goes into the last forward of
    every step, and what comes out."""
    x = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(0)) if x is None else x
    pipe.scheduler.set_timesteps(6)
    for step, t in enumerate(pipe.scheduler.timesteps):
        if step < first:
            continue
        for text in texts(step):
            with torch.no_grad():
                out = pipe.transformer(x.expand(len(text), -1, -1, -1, -1), t[None], text)[0]
        yield x, out
        x = pipe.scheduler.step(out[:1], t, x, return_dict=False)[0]


@METHODS
@pytest.mark.parametrize("change", LOOPS)
def test_a_branch_begins_anew_with_another_text(
    method: str, params: dict[str, Any], change: str
) -> None:
    """As a run does that begins there."""
    tiny = aligned(wan())
    options: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0, **params}
    with diffpatch.patched(tiny.pipe, method, **options):
        steps = list(loop(tiny.pipe, LOOPS[change]))
        assert OTHERS in diffpatch.report(tiny.pipe).notes
    x, out = steps[CHANGED]
    with diffpatch.patched(tiny.pipe, method, **options):
        _, expected = next(loop(tiny.pipe, LOOPS[change], CHANGED, x))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@METHODS
def test_the_same_texts_carry_on(method: str, params: dict[str, Any]) -> None:
    """Also where they are other tensors in each step, and where guidance begins late."""
    tiny = aligned(wan())
    with diffpatch.patched(tiny.pipe, method, dense_steps=0, dense_layers=0, **params):
        *_, (_, usual) = loop(tiny.pipe, lambda step: (UNCOND, COND))
        *_, (_, copied) = loop(tiny.pipe, lambda step: (UNCOND.clone(), COND.clone()))
        assert torch.equal(usual, copied)
        list(loop(tiny.pipe, lambda step: (COND,) if step < CHANGED else (COND, UNCOND)))
        tiny.run(num_inference_steps=5)
        assert OTHERS not in diffpatch.report(tiny.pipe).notes


def test_what_moves_is_not_held() -> None:
    text = torch.randn(1, 8, 32)

    def forward(x: torch.Tensor, before: Given | None) -> Given:
        return Given({"hidden_states": x, "encoder_hidden_states": text}, before)

    first = forward(torch.randn(1, 16, 2, 2), None)
    second = forward(torch.randn(1, 16, 2, 2), first)
    second.let_go()
    assert [leaf.is_meta for leaf, _ in second._leaves] == [True, False]
    third = forward(torch.randn(1, 16, 2, 2), second)
    assert second.carries_on(third)
    text.mul_(2)  # written in place
    assert not second.carries_on(forward(torch.randn(1, 16, 2, 2), second))
    assert not second.carries_on(forward(torch.randn(2, 16, 2, 2), second))
