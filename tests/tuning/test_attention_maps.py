"""Attention maps: dense weights and exact keys against brute force, for every kind of method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import TokenGrid, Window
from diffpatch.patching.api import owners
from diffpatch.patching.patch import SparseCall
from diffpatch.patching.run.run import Run
from diffpatch.tuning.attention_maps import exact_keys, probabilities
from diffpatch.tuning.attention_picture import edges
from diffpatch.tuning.chosen import chosen_tiles
from tests.tiny import wan, wan22

LOCAL = Window(window=(-1, 1, 2), shift="none")


def call_of(method: diffpatch.Method, grid: TokenGrid, heads: int = 2) -> SparseCall:
    """A call of a method on random tensors, as observers see it."""
    from diffpatch.methods.base import AttentionCall

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, grid.num_tokens, heads, 16).unbind()
    pattern = method.pattern(grid, method.variant(0, 0)).for_heads(heads)
    state: dict[str, Any] = {}
    out = method.attend(q, k, v, AttentionCall(pattern, state=state)).out
    return SparseCall(
        Run(),
        ("transformer", 0, 0, 0),
        out,
        lambda: out,
        q,
        k,
        0.25,
        None,
        method,
        pattern,
        None,
        state,
    )


def test_dense_weights_are_those_of_softmax() -> None:
    grid = TokenGrid(3, 4, 4, text_before=2)
    call = call_of(LOCAL, grid)
    keys = torch.arange(grid.num_tokens)[None] != 7
    masked = SparseCall(**{**vars(call), "keys": keys})
    for one, hidden in ((call, []), (masked, [7])):
        scores = torch.einsum("shd,thd->hst", call.q[0].double(), call.k[0].double()) / 4
        scores[..., hidden] = float("-inf")
        found = probabilities(one, [3, 20]).double()
        assert torch.allclose(found, scores.softmax(-1)[:, [3, 20]], atol=1e-6)


def test_tokens_in_another_order_are_put_into_that_of_the_grid() -> None:
    grid = TokenGrid(2, 4, 4)
    call = call_of(LOCAL, grid)
    order = torch.randperm(grid.num_tokens)
    mixed = {**vars(call), "order": order, "q": call.q.clone(), "k": call.k.clone()}
    mixed["q"][:, order], mixed["k"][:, order] = call.q, call.k
    assert torch.equal(probabilities(SparseCall(**mixed), [5]), probabilities(call, [5]))


def test_exact_keys_of_a_pattern_are_its_rows() -> None:
    grid = TokenGrid(3, 4, 6, text_after=3)
    call = call_of(diffpatch.Neighborhood(window=(1, 3, 3)), grid)
    dense = call.pattern.dense()
    for token in (0, 30, grid.num_tokens - 1):
        assert torch.equal(exact_keys(call, token), dense[:, token])


@pytest.mark.parametrize("rest", ["drop", "virtual"])
def test_exact_keys_of_dynamic_are_those_it_chose(rest: str) -> None:
    """Only what is not exact may change the output less when it is moved far away."""
    grid = TokenGrid(4, 8, 8)
    method = diffpatch.Dynamic(kept=0.4, rest=rest)
    call = call_of(method, grid)
    exact = exact_keys(call, 100)
    assert exact.shape == (2, grid.num_tokens) and 0 < exact.float().mean() < 0.6
    if rest == "drop":  # the output is the softmax over exactly these keys
        v = torch.randn(grid.num_tokens, 2, 16)
        from diffpatch.methods.base import AttentionCall

        state: dict[str, Any] = {}
        out = method.attend(call.q, call.k, v[None], AttentionCall(call.pattern, state=state)).out
        seen = exact_keys(SparseCall(**{**vars(call), "state": state}), 100)
        weights = probabilities(call, [100])[:, 0] * seen
        weights = weights / weights.sum(1, keepdim=True)
        assert torch.allclose(out[0, 100], torch.einsum("hs,shd->hd", weights, v), atol=1e-4)


def test_a_run_fills_the_maps() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1, dense_layers=0)
    before = tiny.run()
    with diffpatch.attention_maps(tiny.pipe, layer=1, step=1, query=(2, 1, 3)) as maps:
        assert repr(maps).endswith("nothing seen yet)")
        assert torch.equal(tiny.run(), before)
    assert maps.query == (2, 1, 3) and maps.grid == TokenGrid(3, 2, 4)
    assert maps.mass.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert maps.mass_per_frame.sum(1).tolist() == pytest.approx([1.0, 1.0])
    row = LOCAL.pattern(maps.grid).dense()[0, (2 * 2 + 1) * 4 + 3]
    assert torch.equal(maps.exact[0], row) and torch.equal(maps.exact[0], maps.exact[1])
    assert list(maps.mass_kept) == ["transformer.0", "transformer.1"]
    assert all(0 < x < 1 for heads in maps.mass_kept.values() for x in heads)
    mass, exact = maps.frames(head=0)
    kept = float((maps.mass[0] * row).sum())
    assert f"head 0: {kept:.0%} of dense mass kept" in maps._title(0)
    assert torch.equal(exact.flatten(), row) and torch.allclose(mass.flatten(), maps.mass[0])
    assert maps.draw(head=1).size[0] > 100 and maps.to_dict()["layer"] == 1


def test_what_dynamic_chose_for_all_branches_is_known_in_each() -> None:
    tiny = wan()
    with (
        diffpatch.patched(tiny.pipe, "dynamic", kept=0.4, dense_steps=0, dense_layers=0),
        diffpatch.attention_maps(tiny.pipe, step=1) as maps,
    ):
        tiny.run(height=64, width=64, num_inference_steps=2)
    assert 0 < maps.exact.float().mean() < 1 and maps.note == ""


def test_what_cannot_be_seen_is_said() -> None:
    tiny = wan22()
    with pytest.raises(diffpatch.NotPatched), diffpatch.attention_maps(tiny.pipe, 0, step=0):
        pass
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1, dense_layers=0)
    with (
        pytest.raises(diffpatch.BadParameter, match=r"layer=9: \d layers are patched, the last is"),
        diffpatch.attention_maps(tiny.pipe, layer=9, step=1),
    ):
        pass
    with diffpatch.attention_maps(tiny.pipe, layer=1, step=0) as maps:
        tiny.run()
    with pytest.raises(diffpatch.DiffpatchError, match="no sparse call of layer 1 was seen"):
        maps.draw()
    assert tiny.pipe.transformer._diffpatch.patch.observers == []
    with (
        pytest.raises(diffpatch.BadParameter, match=r"query=\(9, 0, 0\) must be"),
        diffpatch.attention_maps(tiny.pipe, layer=0, step=1, query=(9, 0, 0)),
    ):
        tiny.run()


def test_edges_are_between_inside_and_outside() -> None:
    inside = torch.zeros(3, 3, dtype=torch.bool)
    assert edges(inside) == []
    inside[1, 1] = True
    assert sorted(edges(inside)) == [(1, 1, 1, 2), (1, 1, 2, 1), (1, 2, 2, 2), (2, 1, 2, 2)]


def test_what_was_chosen_is_seen_by_pictures() -> None:
    """Of the middle layer, in the last step; a method that does not choose shows nothing."""
    tiny = wan()
    call = {"height": 64, "width": 64, "num_inference_steps": 2}
    dynamic = diffpatch.Dynamic(kept=0.3, rest="drop", tile=16, strip=16)  # for all branches
    alone = dataclasses.replace(dynamic, refresh=1)
    for method, chooses in ((dynamic, True), (alone, True), (LOCAL, False)):
        with diffpatch.patched(tiny.pipe, method, dense_steps=0, dense_layers=0):
            with chosen_tiles(tiny.pipe) as seen:
                tiny.run(**call)
            assert not any(owner.patch.observers for owner in owners(tiny.pipe))
        assert (seen.map is not None) == chooses
        if seen.map is not None:
            assert 0.2 < seen.map.mean() < 0.4 and seen.map.min() == 0 and seen.map.max() == 1
    with chosen_tiles(tiny.pipe) as seen:
        tiny.run(**call)
    assert seen.map is None
