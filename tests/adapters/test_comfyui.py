"""The node for ComfyUI against ComfyUI's contract, and comfy-kitchen as an oracle of operators."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy_kitchen
import pytest
import torch

import diffpatch
from diffpatch import BadParameter, DiffpatchError, Neighborhood, TokenGrid
from diffpatch.adapters import comfyui
from diffpatch.adapters.comfyui import Node
from diffpatch.adapters.engine import EngineAttention, Told
from tests.adapters import comfy_stand_in as comfy
from tests.pipelines.test_families import error

LEVELS = [1.0, 0.7, 0.4, 0.2, 0.0]
LOCAL = {"method": "neighborhood", "options": '{"window": [1, 3, 3], "stride": 1}'}
METHOD = Neighborhood(window=(1, 3, 3), stride=1)
VIDEO = torch.randn(1, 4, 3, 7, 10, generator=torch.Generator().manual_seed(0))  # 3×4×5 tokens
GRID = TokenGrid(3, 4, 5)


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    with comfy.installed(), torch.no_grad():
        yield


@pytest.fixture
def wan() -> comfy.Patcher:
    torch.manual_seed(0)
    return comfy.Patcher(comfy.WanModel())


def texts(width: int = 32, tokens: int = 6) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)  # of its own: threads share torch's
    return [torch.randn(1, tokens, width, generator=random) for _ in range(2)]


def put(patcher: comfy.Patcher, **inputs: Any) -> comfy.Patcher:
    [patched] = Node().patch(patcher, **{"dense_steps": 0.0, **LOCAL, **inputs})
    return patched


def overridden(patcher: comfy.Patcher, attend: Callable[..., Any]) -> comfy.Patcher:
    """The same model with somebody's override."""
    other = patcher.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = attend
    return other


def expected_of(grid: TokenGrid, method: Any = METHOD, first: int = 0) -> Callable[..., Any]:
    """An override that asks `diffpatch.attention` about self-attention, from some step on."""
    states: dict[Any, dict[str, Any]] = {}

    def attend(func: Any, q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> Any:
        options, split = kwargs["transformer_options"], kwargs.get("skip_reshape", False)
        levels = options["sample_sigmas"].tolist()
        step = max(i for i, level in enumerate(levels) if level >= float(options["sigmas"]) - 1e-6)
        tokens = q.shape[2] if split else q.shape[1]
        if tokens != grid.num_tokens or k.shape != q.shape or step < first:
            return func(q, k, v, heads, **kwargs)
        q, k, v = (x.transpose(1, 2) if split else x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        window = getattr(options.get("context_window"), "index_list", None)
        state = states.setdefault((options["block_index"], str(options["uuids"]), str(window)), {})
        out = diffpatch.attention(q, k, v, grid, method, step=step, state=state)
        return out.flatten(2)

    return attend


def test_a_sampling_computes_what_it_says(wan: comfy.Patcher) -> None:
    plain = comfy.sample(wan, VIDEO, texts(), LEVELS)
    found = comfy.sample(put(wan), VIDEO, texts(), LEVELS)
    expected = comfy.sample(overridden(wan, expected_of(GRID)), VIDEO, texts(), LEVELS)
    assert error(found, expected) < 1e-6
    assert error(found, plain) > 1e-3
    assert torch.equal(comfy.sample(wan, VIDEO, texts(), LEVELS), plain)
    assert wan.model_options == {"transformer_options": {}}


@pytest.mark.parametrize("middle", [False, True])
def test_steps_are_those_of_the_schedule(wan: comfy.Patcher, middle: bool) -> None:
    """0.5 of four steps: two dense, with evaluations between two levels as with none."""
    found = comfy.sample(put(wan, dense_steps=0.5), VIDEO, texts(), LEVELS, middle)
    attend = expected_of(GRID, first=2)
    expected = comfy.sample(overridden(wan, attend), VIDEO, texts(), LEVELS, middle)
    assert error(found, expected) < 1e-6


def test_dense_layers_count_single_blocks_after_double_ones() -> None:
    torch.manual_seed(0)
    flux, x = comfy.Patcher(comfy.Flux()), torch.randn(1, 4, 8, 12)
    plain = comfy.sample(flux, x, texts(), LEVELS)
    changed = [
        error(comfy.sample(put(flux, dense_layers=n), x, texts(), LEVELS), plain) for n in range(3)
    ]
    assert changed[0] > 1e-3 < changed[1] != changed[0]
    assert changed[2] == 0


@pytest.mark.parametrize("later", [False, True])
def test_dense_calls_go_to_the_override_that_is_there(wan: comfy.Patcher, later: bool) -> None:
    asked: list[tuple[int, int]] = []

    def theirs(func: Any, q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> Any:
        asked.append((q.shape[1], k.shape[1]))
        return func(q, k, v, heads, **kwargs)

    patched = overridden(put(wan), theirs) if later else put(overridden(wan, theirs))
    found = comfy.sample(patched, VIDEO, texts(), LEVELS)
    assert torch.equal(found, comfy.sample(put(wan), VIDEO, texts(), LEVELS))
    assert set(asked) == {(60, 6)}  # cross-attention alone


def test_a_cache_that_skips_forwards(wan: comfy.Patcher) -> None:
    """In either order, as ComfyUI's own caches do it: by a wrapper that may not call on."""

    def cached(patcher: comfy.Patcher) -> comfy.Patcher:
        made, kept, calls = patcher.clone(), {}, []

        def around(executor: Any, x: Any, timestep: Any, context: Any, options: Any) -> Any:
            key = str(options["uuids"])
            calls.append(key)
            if calls.count(key) % 2:
                kept[key] = executor(x, timestep, context, options)
            return kept[key]

        made.add_wrapper_with_key("diffusion_model", "cache", around)
        return made

    expected = comfy.sample(cached(overridden(wan, expected_of(GRID))), VIDEO, texts(), LEVELS)
    for patched in (put(cached(wan)), cached(put(wan))):
        assert error(comfy.sample(patched, VIDEO, texts(), LEVELS), expected) < 1e-6


@pytest.mark.parametrize(
    ("model", "refs", "text", "after"),
    [(comfy.Flux, 0, "auto", 0), (comfy.Flux, 5, "auto", 5), (comfy.Unknown, 5, "before", 5)],
)
def test_text_and_references_are_seen_by_everybody(
    model: Any, refs: int, text: str, after: int
) -> None:
    torch.manual_seed(0)
    flux, x = comfy.Patcher(model(refs=refs)), torch.randn(1, 4, 8, 12)
    grid = TokenGrid(1, 4, 6, text_before=6, text_after=after)
    found = comfy.sample(put(flux, text=text), x, texts(), LEVELS)
    expected = comfy.sample(overridden(flux, expected_of(grid)), x, texts(), LEVELS)
    assert error(found, expected) < 1e-6


def test_text_whose_place_nobody_tells_is_dense_and_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = comfy.Patcher(comfy.Unknown()), torch.randn(1, 4, 8, 12)
    plain = comfy.sample(model, x, texts(), LEVELS)
    assert torch.equal(comfy.sample(put(model), x, texts(), LEVELS), plain)
    assert "where 6 tokens of text stand is not known: choose text" in caplog.text
    assert "neighborhood: 0 of 16 attention calls" in caplog.text


def test_a_sampling_says_what_it_did(wan: comfy.Patcher, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):  # each sampling counts for itself
        comfy.sample(put(wan, dense_steps=0.25), VIDEO, texts(), LEVELS)
        said = caplog.records[-1].getMessage()
        assert "neighborhood: 12 of 32 attention calls" in said  # 3 steps, 2 texts, 2 layers
        assert "60 queries and 6 keys are not the 3×4×5 tokens (16)" in said
        assert "dense first steps (4)" in said


@pytest.mark.parametrize("windows", [None, [[0, 1], [1, 2]]])
def test_state_belongs_to_a_run_a_branch_and_a_window(
    wan: comfy.Patcher, windows: list[list[int]] | None
) -> None:
    inputs = {"method": "neighborhood+temporal", "options": '{"window": [1, 3, 3], "stride": 1}'}
    method = diffpatch.make_method("neighborhood+temporal", window=(1, 3, 3), stride=1)
    grid = GRID if windows is None else TokenGrid(2, 4, 5)
    patched = put(wan, **inputs)
    [around] = comfy.all_wrappers("outer_sample", patched.model_options["transformer_options"])
    for _ in range(2):
        found = comfy.sample(patched, VIDEO, texts(), LEVELS, windows=windows)
        attend = expected_of(grid, method)
        expected = comfy.sample(overridden(wan, attend), VIDEO, texts(), LEVELS, windows=windows)
        assert error(found, expected) < 1e-6
        assert not around.__self__.engine._states

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    patched.add_wrapper_with_key("diffusion_model", "interrupt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comfy.sample(patched, VIDEO, texts(), LEVELS)
    assert not around.__self__.engine._states


def test_masks_over_keys_are_honoured_and_others_dense() -> None:
    grid, heads = TokenGrid(1, 4, 6, text_before=3), 2
    q, k, v = torch.randn(3, 2, heads, grid.num_tokens, 16)
    mask = torch.ones(2, 1, 1, grid.num_tokens, dtype=torch.bool)
    mask[1, ..., 1:3] = False
    sampling = comfyui.Sampling(EngineAttention(METHOD, Told(layers=True)), "auto")
    options = {"img_slice": [3, 27], "block_index": 0}
    model, x = types.SimpleNamespace(patch_size=2), torch.zeros(2, 4, 8, 12)
    attend = comfyui._Forward(sampling, model, {"x": x}, options).override(None)
    call: dict[str, Any] = {"skip_reshape": True, "transformer_options": options}
    found = attend(comfy.optimized_attention, q, k, v, heads, mask=mask, **call)
    for sample, keys in enumerate([27, 25]):
        seen = grid if keys == 27 else TokenGrid(1, 4, 6, text_before=1)
        rows = mask[sample, 0, 0]
        a, b, c = (x[sample : sample + 1, :, rows].transpose(1, 2) for x in (q, k, v))
        expected = diffpatch.attention(a, b, c, seen, METHOD).flatten(2)
        assert error(found[sample : sample + 1, rows], expected) < 1e-6
    biased = torch.zeros(2, 1, 1, grid.num_tokens)
    call["_inside_attn_wrapper"] = True
    found = attend(comfy.optimized_attention, q, k, v, heads, mask=biased, **call)
    assert error(found, comfy.optimized_attention(q, k, v, heads, skip_reshape=True)) < 1e-6
    assert any("the model's own mask" in reason for reason in sampling.engine.reasons)


def test_fewer_heads_of_keys_and_heads_kept_apart() -> None:
    q, k, v = torch.randn(1, 60, 64), torch.randn(1, 60, 32), torch.randn(1, 60, 32)
    sampling = comfyui.Sampling(EngineAttention(METHOD, Told(layers=True)), "auto")
    options: dict[str, Any] = {"block_index": 0, "grid_sizes": (3, 4, 5)}
    attend = comfyui._Forward(sampling, None, {"x": None}, options).override(None)
    found = attend(
        comfy.optimized_attention, q, k, v, 4, skip_output_reshape=True, scale=0.3,
        transformer_options=options,
    )  # fmt: skip
    q, k, v = (x.unflatten(-1, (-1, 16)) for x in (q, k, v))
    expected = diffpatch.attention(q, k, v, GRID, METHOD, scale=0.3)
    assert error(found.transpose(1, 2), expected) < 1e-6


def test_the_widgets_give_what_the_node_takes(wan: comfy.Patcher) -> None:
    inputs = comfyui.NODE_CLASS_MAPPINGS["DiffpatchAttention"].INPUT_TYPES()
    assert next(iter(inputs["required"])) == "model"
    widgets = {**inputs["required"], **inputs["optional"]}
    defaults = {name: config["default"] for name, (_, *rest) in widgets.items() for config in rest}
    [patched] = Node().patch(wan, **defaults)
    plain = comfy.sample(wan, VIDEO, texts(), LEVELS)
    assert comfy.sample(patched, VIDEO, texts(), LEVELS).shape == plain.shape
    assert "neighborhood+temporal" in widgets["method"][0]
    for method in widgets["method"][0]:
        Node().patch(wan, method)
    [half] = Node().patch(wan, "neighborhood", kept=0.5)
    assert error(comfy.sample(half, VIDEO, texts(), LEVELS), plain) > 1e-3
    image, x = comfy.Patcher(comfy.Flux()), torch.randn(1, 4, 8, 12)
    [half] = Node().patch(image, "neighborhood", kept=0.5)
    assert error(comfy.sample(half, x, texts(), LEVELS), comfy.sample(image, x, texts(), LEVELS))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"options": "decay=0.5"}, "must be JSON like"),
        ({"options": "[1]"}, "names and values"),
        ({"options": '{"windw": 3}'}, "no parameter 'windw'"),
        ({"kept": 1.5}, "kept"),
        ({"dense_steps": 2.0}, "dense_steps=2.0 must be"),
    ],
)
def test_inputs_that_cannot_work_say_so(
    wan: comfy.Patcher, inputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadParameter, match=words):
        put(wan, **inputs)


def test_another_comfyui_is_refused(wan: comfy.Patcher) -> None:
    with (
        comfy.installed(DIFFUSION_MODEL=None),
        pytest.raises(DiffpatchError, match=r"no WrappersMP.DIFFUSION_MODEL: update it"),
    ):
        put(wan)


def test_outside_of_comfyui_it_is_refused(
    wan: comfy.Patcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", None)
    with pytest.raises(DiffpatchError, match="run it inside ComfyUI"):
        put(wan)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(3, 3, 5), (1, 2, 3), (3, 7, 9)])
def test_comfy_kitchens_neighborhood_is_ours(window: tuple[int, int, int], causal: bool) -> None:
    grid = TokenGrid(3, 7, 9)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, grid.num_tokens, 2, 16)
    wanted = [causal, False, False]
    oracle = comfy_kitchen.na3d(
        *(x.unflatten(1, grid.shape) for x in (q, k, v)), list(window), wanted
    ).flatten(1, 3)
    method = Neighborhood(window=window, stride=1, causal=(causal, False, False))
    assert error(diffpatch.attention(q, k, v, grid, method), oracle) < 1e-6


def test_two_samplings_at_once_are_as_alone(wan: comfy.Patcher) -> None:
    """As many tokens and the same names of branches, each step in turn."""
    options = '{"window": [1, 3, 3], "stride": 1, "refresh": 9}'
    patched = put(wan, method="neighborhood+temporal", options=options)
    other = VIDEO.flip(2)
    expected = [comfy.sample(patched, x, texts(), LEVELS) for x in (VIDEO, other)]
    turn = threading.Barrier(2, timeout=240)

    def wait(executor: Any, *args: Any) -> Any:
        turn.wait()
        return executor(*args)

    patched.add_wrapper_with_key("diffusion_model", "wait", wait)

    def sample(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return comfy.sample(patched, x, texts(), LEVELS)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(sample, (VIDEO, other)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
