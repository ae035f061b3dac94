"""`patched` blocks that overlap: one in another, one after the other, and never side by side."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch

import diffpatch
from diffpatch import DiffpatchError
from tests.tiny import wan


def test_blocks_of_two_threads_do_not_overlap() -> None:
    tiny = wan()
    plain = tiny.run()
    inside, go_on = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def first() -> None:
        with diffpatch.patched(tiny.pipe, "window", window=2, dense_steps=0, dense_layers=0):
            inside.set()
            go_on.wait(30)
            found.append(tiny.run())

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(30)
    with (
        pytest.raises(DiffpatchError, match="another thread or task is inside `patched`"),
        diffpatch.patched(tiny.pipe, "linear"),
    ):
        pass
    go_on.set()
    thread.join()
    assert not diffpatch.is_patched(tiny.pipe)
    assert torch.equal(tiny.run(), plain), "bit for bit what it was"
    with diffpatch.patched(tiny.pipe, "window", window=2, dense_steps=0, dense_layers=0):
        assert torch.equal(tiny.run(), found[0]), "the other block changed nothing"


def test_blocks_of_many_threads_leave_nothing_behind() -> None:
    tiny = wan()
    plain = tiny.run()
    refused = []

    def often(method: str) -> None:
        for _ in range(20):
            try:
                with diffpatch.patched(tiny.pipe, method):
                    pass
            except DiffpatchError:
                refused.append(method)

    threads = [threading.Thread(target=often, args=(m,)) for m in ("window", "radial", "linear")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) < 60 and not diffpatch.is_patched(tiny.pipe)
    assert torch.equal(tiny.run(), plain)


def test_blocks_of_two_tasks_do_not_overlap_and_one_in_another_is_fine() -> None:
    tiny = wan()

    async def first(begun: asyncio.Event, end: asyncio.Event) -> None:
        with diffpatch.patched(tiny.pipe, "window"):
            begun.set()
            await end.wait()
            with diffpatch.patched(tiny.pipe, "radial"):
                assert "Radial" in diffpatch.report(tiny.pipe).method
            assert "Window" in diffpatch.report(tiny.pipe).method

    async def both() -> None:
        begun, end = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(begun, end))
        await begun.wait()
        with (
            pytest.raises(DiffpatchError, match="another thread or task"),
            diffpatch.patched(tiny.pipe, "linear"),
        ):
            pass
        end.set()
        await task

    asyncio.run(both())
    assert not diffpatch.is_patched(tiny.pipe)


def test_a_block_left_by_an_exception_is_over_for_all() -> None:
    tiny = wan()
    with pytest.raises(KeyError), diffpatch.patched(tiny.pipe, "window"):
        raise KeyError
    contextvars.Context().run(diffpatch.patch, tiny.pipe, "radial")
    with diffpatch.patched(tiny.pipe, "window"):
        pass
    assert "Radial" in diffpatch.report(tiny.pipe).method, "a patch without a block comes back"


def test_a_patch_that_changes_another_pipeline_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "window")
    diffpatch.patch(tiny.pipe, "radial")
    assert not caplog.text, "one's own may change"
    other = type(tiny.pipe)(**tiny.pipe.components)
    diffpatch.patch(other, "linear")
    assert "shares the transformer and was patched with Radial" in caplog.text
    assert "both run Linear" in caplog.text
    assert "Linear" in diffpatch.report(tiny.pipe).method
