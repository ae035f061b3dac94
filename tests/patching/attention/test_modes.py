"""What the caller has switched on stays the caller's: dtypes, autocast, inference mode, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import DiffpatchError, TokenGrid
from tests.patching.test_custom_model import GRID, Model, OlderProcessor, Processor, inputs
from tests.tiny import Tiny, images, videos, wan_transformer
from tests.tiny.parts import noise

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("radial", {}),
    ("radial", {"rule": "published"}),
    ("neighborhood", {"window": 0.5}),
    ("sliding_tile", {"window": 0.5, "tile": (2, 2, 3)}),
    ("window", {"window": 0.5}),
    ("disc", {}),
    ("longer", {"trained": 3, "riflex": False}),
    ("larger", {"trained": (3, 4)}),
    ("linear", {}),
    ("neighborhood+temporal", {"mode": "tail", "window": 0.5}),
    ("neighborhood+temporal", {"mode": "skip", "window": 0.5}),
    ("dense+temporal", {"mode": "mask", "kept": 0.5}),
    ("dynamic", {}),
]
IDS = ["-".join((name, *map(str, params.values()))) for name, params in SETTINGS]
COMMON = TokenGrid(6, 8, 10, text_before=3, text_after=5)


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k and v."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for _ in range(3)
    ]


def attended(name: str, params: dict[str, Any], steps: int = 3) -> list[torch.Tensor]:
    """Some steps of attention over a grid that no other test has."""
    q, k, v = some(1, COMMON.num_tokens, 2, 16)
    state: dict[str, Any] = {}
    diffpatch.functional.PATTERNS.clear()
    return [
        diffpatch.attention(q + i / 10, k, v, COMMON, name, step=i, state=state, **params)
        for i in range(steps)
    ]


@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(
    name: str, params: dict[str, Any], dtype: torch.dtype
) -> None:
    expected = attended(name, params)
    torch.set_default_dtype(dtype)
    found = attended(name, params)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.get_default_dtype() == dtype


@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=IDS)
def test_the_default_device_changes_nothing(name: str, params: dict[str, Any]) -> None:
    expected = attended(name, params)
    torch.set_default_device("meta")
    found = attended(name, params)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pictures_and_plans_under_a_default_dtype() -> None:
    def made() -> list[Any]:
        pattern = diffpatch.make_method("radial").pattern(TokenGrid(9, 16, 24))
        plan = diffpatch.plan("wan-1.3b", "radial", height=480, width=832, num_frames=33)
        drawn = [plan.draw(kind).tobytes() for kind in ("tiles", "query", "distance")]
        return [pattern.draw().tobytes(), *drawn, plan.to_dict()]

    expected = made()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        assert made() == expected


# Not those that carry something from step to step, which no training does.
TRAINED = [s for s in SETTINGS if "temporal" not in s[0] and s[0] != "dynamic"]


@pytest.mark.parametrize(("name", "params"), TRAINED, ids=IDS[: len(TRAINED)])
def test_a_sample_in_inference_mode_then_a_training_step(name: str, params: dict[str, Any]) -> None:
    model = Model(Processor)
    video = {key: x.requires_grad_() for key, x in inputs().items()}
    diffpatch.patch(model, name, grid=GRID, modules=r"blocks\.\d+", **params)
    with torch.inference_mode():
        model(**inputs())
    model(**video).square().sum().backward()
    assert all(x.grad is not None for x in video.values())
    with torch.no_grad():
        model(**inputs())


BUILDS = [
    images.qwen, images.sd3, images.z_image, images.hidream, images.chroma,
    videos.hunyuan, videos.hunyuan15, videos.cosmos, videos.wan,
]  # fmt: skip


@pytest.mark.parametrize("build", BUILDS, ids=lambda f: f.__name__)
def test_autocast_runs_every_kind_of_model(build: Callable[[], Tiny]) -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.run()
        diffpatch.patch(model.pipe, "neighborhood", window=-1, dense_steps=0)  # leaves nothing out
        assert torch.equal(model.run(), plain)
        diffpatch.patch(model.pipe, "neighborhood", window=0.6, stride=1, dense_steps=0)
        assert torch.isfinite(model.run()).all()
        assert diffpatch.report(model.pipe).kept < 1
        diffpatch.unpatch(model.pipe)
        assert torch.equal(model.run(), plain)


@pytest.mark.parametrize("processor", [Processor, OlderProcessor], ids=lambda c: c.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["sampling", "training"])
def test_autocast_casts_as_torchs_attention_does(processor: Any, grad: bool) -> None:
    model = Model(processor)
    diffpatch.patch(model, "neighborhood", window=0.5, grid=GRID, modules=r"blocks\.\d+")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs())
    full = model(**inputs())
    assert 0 < (out.float() - full).norm() < 0.02 * full.norm()


def test_attention_under_autocast_takes_what_torchs_takes() -> None:
    q, k, v = some(1, COMMON.num_tokens, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v.bfloat16())
        out = diffpatch.attention(q, k, v.bfloat16(), COMMON, "neighborhood", window=0.5)
        assert out.dtype == expected.dtype == torch.bfloat16
        exact = diffpatch.attention(q.double(), k.double(), v.double(), COMMON, "neighborhood")
        assert exact.dtype == torch.float64
    # What is summed inside is summed as it is without autocast.
    q, k, v = (x.bfloat16() for x in (q, k, v))
    cast = diffpatch.attention(q, k, v, COMMON, "neighborhood", window=0.5)
    assert torch.equal(out, cast)


def test_accelerate_trains_in_mixed_precision() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(Model(Processor))
    diffpatch.patch(model, "neighborhood", window=0.5, grid=GRID, modules=r"blocks\.\d+")
    loss = model(**inputs()).square().mean()
    accelerator.backward(loss)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert diffpatch.report(model).kept < 1


def test_transforms_of_torch_func_run_dense_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = wan_transformer().eval()
    x, time, text = noise(2, 16, 3, 4, 8), torch.tensor([500.0, 300.0]), noise(2, 7, 32)

    def one(x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(x[None], time[None], text[None])[0][0]
        return out

    def loss(x: torch.Tensor) -> torch.Tensor:
        return one(x, time[0], text[0]).square().mean()

    found: list[list[torch.Tensor]] = []
    for patched in (False, True):
        if patched:
            diffpatch.patch(model, "window", window=(-1, 1, 2))
        with torch.no_grad():
            each = torch.func.vmap(one)(x, time, text)
        found.append([each, torch.func.grad(loss)(x[0]), torch.func.vmap(torch.func.grad(loss))(x)])
    for dense, out in zip(*found, strict=True):
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-6)
    assert "nothing ran sparsely" in caplog.text and "torch.func" in caplog.text
    q, k, v = some(2, COMMON.num_tokens, 2, 16)
    with pytest.raises(DiffpatchError, match="inside a transform of torch"):
        torch.func.vmap(lambda q: diffpatch.attention(q[None], k[:1], v[:1], COMMON))(q)


def test_tracing_is_refused() -> None:
    model = wan_transformer().eval()
    diffpatch.patch(model, "window", window=(-1, 1, 2))
    arguments = noise(1, 16, 3, 4, 8), torch.tensor([500.0]), noise(1, 7, 32)
    with pytest.raises(DiffpatchError, match=r"torch\.jit\.trace records Wan"):
        torch.jit.trace(lambda *given: model(*given)[0], arguments)
