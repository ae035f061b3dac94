"""Four threads, fifty requests each, of mixed sizes, over one transformer."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Temporal, Window
from tests.tiny import flux, wan

THREADS, REQUESTS = 4, 50
METHOD = Temporal(over=Window(window=(-1, 1, 2), shift="none"), refresh=2)


def calls(kind: str) -> list[dict[str, Any]]:
    """Small requests that encode no text and decode nothing."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    sizes = [(8, 16), (16, 8), (16, 16), (8, 24), (24, 8)]  # one more than a patch remembers
    if kind == "wan":
        text = {"prompt_embeds": noise(1, 8, 32), "num_frames": 5, "guidance_scale": 1.0}
        sizes = [(4 * h, 4 * w) for h, w in sizes]
    else:
        text = {"prompt_embeds": noise(1, 8, 32), "pooled_prompt_embeds": noise(1, 32)}
    return [
        text | {"height": h, "width": w, "num_inference_steps": 2 + i % 3, "output_type": "latent"}
        for i, (h, w) in enumerate(sizes)
    ]


def tensors() -> int:
    """How many there are."""
    gc.collect()
    # isinstance would ask weak proxies of others for what may be gone
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("kind", ["wan", "flux"])
def test_every_picture_is_that_of_the_request_alone_and_memory_is_flat(kind: str) -> None:
    tiny = {"wan": wan, "flux": flux}[kind](layers=1)
    diffpatch.patch(tiny.pipe, METHOD, dense_steps=1)

    def answer(call: dict[str, Any]) -> torch.Tensor:
        pipe = copy.copy(tiny.pipe)
        pipe.scheduler = copy.deepcopy(tiny.pipe.scheduler)
        random = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**call, generator=random)[0])

    asked = calls(kind)
    expected = [answer(call) for call in asked]
    wrong: list[Any] = []

    def serve(first: int, count: int) -> None:
        for i in range(first, first + count):
            try:
                same = torch.equal(answer(asked[i % len(asked)]), expected[i % len(asked)])
            except Exception as error:
                wrong.append(error)
            else:
                wrong.extend([] if same else [i])

    def work(count: int) -> None:
        threads = [threading.Thread(target=serve, args=(i, count)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    work(REQUESTS // 5)
    before = tensors()
    work(REQUESTS - REQUESTS // 5)
    assert not wrong
    patch = tiny.pipe.transformer._diffpatch.patch
    assert len(patch.runs.all()) == 1 and patch.state_bytes() == 0
    assert tensors() <= before + 100  # of the few grids that a patch remembers
