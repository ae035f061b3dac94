"""What temporal attention keeps: how much, for which layer and branch, and for how long."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Temporal
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.patching.api import owners
from tests.tiny import Tiny, wan, wan22
from tests.tiny import videos as videos

DECISIONS = [
    ("dense+temporal", {"mode": "skip", "threshold": 0.0, "tile": 16, "order": "forward"}),
    ("dense+temporal", {"mode": "mask", "kept": 0.5, "tile": 16}),
]
MODES = [("window+temporal", {"mode": "tail", "window": (-1, 1, 2)}), *DECISIONS]
GIB = 2**30


def aligned(tiny: Tiny) -> Tiny:
    """The same with queries that agree on which keys matter, as in trained models."""
    for name in ("transformer", "transformer_2"):
        for block in getattr(tiny.pipe.components.get(name), "blocks", ()):
            bias = block.attn1.to_q.bias.detach()
            bias.view(block.attn1.heads, -1)[:, 2] = 50.0  # a channel that hardly rotates
    return tiny


@pytest.mark.parametrize("mode", ["skip", "mask"])
@pytest.mark.parametrize("method", ["radial+temporal", "dense+temporal"])
def test_decisions_about_75600_tokens_fit_into_64_mib(method: str, mode: str) -> None:
    size: dict[str, Any] = {"height": 720, "width": 1280, "num_frames": 81}
    plan = diffpatch.plan("wan-14b", method, mode=mode, **size)
    assert plan.tokens == 75_600 and plan.layers == 40
    assert 16 * 2**20 < plan.state_bytes <= 64 * 2**20  # both guidance branches
    assert diffpatch.plan("wan-14b", "radial+temporal", **size).state_bytes > 50 * GIB  # results


def states(pipe: Any) -> dict[Any, dict[str, Any]]:
    """What the latest run holds now."""
    return owners(pipe)[0].patch.runs.last.state


def held(pipe: Any) -> int:
    """Bytes behind all tensors of the state, each storage once, views in full."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for state in states(pipe).values()
        for x in state.values()
        if isinstance(x, torch.Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize(("method", "params"), MODES)
def test_the_memory_reported_is_the_memory_held_and_planned(
    method: str, params: dict[str, Any]
) -> None:
    tiny = wan()
    size: dict[str, Any] = {"height": 96, "width": 96, "num_frames": 9}
    with diffpatch.patched(tiny.pipe, method, dense_steps=1, dense_layers=[0], **params):
        seen: list[int] = []

        def look(pipe: Any, *_: Any) -> dict[str, Any]:
            seen.append(held(pipe))
            return {}

        tiny.run(num_inference_steps=4, callback_on_step_end=look, **size)
        reported = diffpatch.report(tiny.pipe).state_bytes
        assert reported == max(seen) > 0
        assert seen[-1] == 0  # freed with the last step
    plan = diffpatch.plan(
        tiny.pipe, method, dense_steps=1, dense_layers=1, num_inference_steps=4, **size, **params
    )
    wide = 2 if params["mode"] == "tail" else 1  # plans are about 16-bit models, this one has 32
    lse = 2 * 108 * 2 * 4 if params["mode"] == "tail" else 0  # branches × tokens × heads, 32-bit
    assert reported - lse == wide * (plan.state_bytes - lse)


@pytest.mark.parametrize(("method", "params"), MODES)
def test_a_small_budget_is_refused_politely(method: str, params: dict[str, Any]) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, method, dense_steps=0, budget_gib=1e-9, **params)
    advice = "use mode='skip' or mode='mask'" if params["mode"] == "tail" else "layers dense"
    with pytest.raises(BadParameter, match=f"limit is 0.00 GiB; raise budget_gib, or .*{advice}"):
        tiny.run()
    assert owners(tiny.pipe)[0].patch.state_bytes() == 0  # and nothing stays behind
    diffpatch.patch(tiny.pipe, method, dense_steps=0, budget_gib=1e-3, **params)
    tiny.run()


def denoise(
    pipe: Any, branches: list[torch.Tensor], inputs: list[torch.Tensor], held: Any = None
) -> list[list[torch.Tensor]]:
    """What the transformer answers in a loop with a forward for each branch: [step][branch]."""
    pipe.scheduler.set_timesteps(len(inputs))
    answers = []
    with torch.no_grad():
        for t, x in zip(pipe.scheduler.timesteps, inputs, strict=True):
            time = t.expand(x.shape[0])
            answers.append([
                pipe.transformer(x.repeat(len(b) // len(x), 1, 1, 1, 1),
                                 time.repeat(len(b) // len(x)), b).sample
                for b in branches
            ])  # fmt: skip
            if held is not None:
                held.append(len(states(pipe)))
            pipe.scheduler.step(answers[-1][0][: len(x)], t, x)
    return answers


@pytest.mark.parametrize(("method", "params"), MODES)
def test_branches_have_states_of_their_own(method: str, params: dict[str, Any]) -> None:
    tiny, random = aligned(wan()), torch.Generator().manual_seed(0)
    diffpatch.patch(tiny.pipe, method, dense_steps=0, refresh=3, **params)
    inputs = [torch.randn(1, 16, 3, 8, 8, generator=random) for _ in range(5)]
    texts = [3 * torch.randn(1, 8, 32, generator=random) for _ in range(3)]
    held: list[int] = []
    together = denoise(tiny.pipe, texts, inputs, held)
    assert held[-1] == 2 * 3  # layers × branches
    assert diffpatch.report(tiny.pipe).kept < 1
    for i, text in enumerate(texts):
        alone = denoise(tiny.pipe, [text], inputs)
        assert all(torch.equal(a[i], b[0]) for a, b in zip(together, alone, strict=True))
    batched = denoise(tiny.pipe, [torch.cat(texts)], inputs)  # guidance in one batch
    for a, b in zip(together, batched, strict=True):
        torch.testing.assert_close(torch.cat(a), b[0], rtol=1e-4, atol=1e-5)


class Spy:
    """Follows every state through the calls that get it."""

    def __init__(self) -> None:
        self.steps: dict[int, list[int]] = {}
        self.states: list[Any] = []  # held, so that no id is used twice
        self.was_empty: list[bool] = []

    def __enter__(self) -> Spy:
        attend = Temporal.attend

        def watched(method: Temporal, q: Any, k: Any, v: Any, call: AttentionCall) -> Attended:
            if id(call.state) not in self.steps:
                self.states.append(call.state)
                self.was_empty.append(not call.state)
            self.steps.setdefault(id(call.state), []).append(call.step)
            return attend(method, q, k, v, call)

        self._patch = mock.patch.object(Temporal, "attend", watched)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()


@pytest.mark.parametrize(
    ("tiny", "steps", "expected"),
    [
        (aligned(wan()), 4, [[1, 2, 3]] * 4),  # a few-step run: 2 layers × 2 branches
        (aligned(wan22()), 6, [[1]] * 4 + [[2, 3, 4, 5]] * 4),  # the second expert takes over
    ],
)
def test_states_live_as_long_as_their_run(tiny: Tiny, steps: int, expected: list[Any]) -> None:
    params: dict[str, Any] = {
        "dense_steps": 1,
        "mode": "skip",
        "threshold": (-0.1, -0.05, 0.0),
        "tile": 16,
    }
    diffpatch.patch(tiny.pipe, "dense+temporal", **params)
    runs = []
    for _ in range(2):
        with Spy() as spy:
            runs.append(tiny.run(num_inference_steps=steps))
        assert all(spy.was_empty) and sorted(spy.steps.values()) == expected
    assert torch.equal(*runs)
    assert diffpatch.report(tiny.pipe).kept < 1


def forcing(pipe: Any, windows: list[tuple[int, int]], lag: int = 2) -> list[bool]:
    """Diffusion forcing over six frames, each `lag` steps behind the one before, of which a forward
    sees a window: whether each step began with an empty state."""
    random, empty = torch.Generator().manual_seed(0), []
    pipe.scheduler.set_timesteps(20)
    for step, (first, last) in enumerate(windows):
        times = 1000 - 50 * (step - lag * torch.arange(6)).clamp(0, 20)
        with torch.no_grad(), Spy() as spy:
            for _ in range(2):  # guidance branches
                pipe.transformer(
                    torch.randn(1, 16, last - first, 8, 12, generator=random),
                    times[None, first:last],
                    torch.randn(1, 8, 32, generator=random),
                    enable_diffusion_forcing=True,
                    fps=torch.tensor([0]),
                )
        assert len(spy.states) == 4
        empty.append(all(spy.was_empty))
        assert all(spy.was_empty) or not any(spy.was_empty)
        pipe.scheduler.step(torch.zeros(1), pipe.scheduler.timesteps[step], torch.zeros(1))
    return empty


@pytest.mark.parametrize("lag", [1, 2, 0])
def test_a_window_that_moves_on_forgets(lag: int) -> None:
    tiny = videos.skyreels()
    diffpatch.patch(tiny.pipe, "dense+temporal", mode="skip", tile=16, dense_steps=0)
    still, on = [(0, 4)] * 3, [(1, 5)] * 2
    assert forcing(tiny.pipe, still + still, lag) == [True] + [False] * 5
    moved = lag > 0  # frames in step all look alike, so pipelines do not move them
    assert forcing(tiny.pipe, still + on, lag) == [True, False, False, moved, False]
    assert forcing(tiny.pipe, [*still, (0, 5), (0, 5)], lag) == [True, False, False, True, False]


def test_long_videos_by_diffusion_forcing_begin_each_part_anew() -> None:
    tiny = videos.skyreels_forcing()
    diffpatch.patch(tiny.pipe, "dense+temporal", mode="skip", tile=16, dense_steps=0)
    with Spy() as spy:
        tiny.run(num_inference_steps=3)
    assert all(spy.was_empty)
    used = list(spy.steps.values())
    assert used[:4] == [[0, 1, 2]] * 4 and len(used) >= 8  # the first part, and what comes after
    assert all(steps == list(range(len(steps))) for steps in used)
