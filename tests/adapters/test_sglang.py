"""The backend in SGLang-diffusion's own plug-in loader, hooks, platform and attention classes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import DiffpatchError, Neighborhood, TokenGrid
from diffpatch.adapters import sglang as adapter
from tests.adapters import stand_ins
from tests.pipelines.test_families import error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None,
    reason="SGLang is not installed: pip install --no-deps sglang==0.5.23 (it wants a GPU's stack,"
    " so no extra installs it)",
)

GRID = TokenGrid(3, 2, 4)
METHOD = Neighborhood(window=(1, 1, 3), stride=1)
SETTINGS = {"method": "neighborhood", "window": [1, 1, 3], "stride": 1}
Q, K, V = torch.randn(3, 2, 27, 4, 16, generator=torch.Generator().manual_seed(0))
RUNTIME = "sglang.multimodal_gen.runtime"


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    """SGLang with our plug-in found by its loader, and its hooks applied."""
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    group = "sglang.multimodal_gen.plugins"
    [(name, value)] = pyproject["project"]["entry-points"][group].items()
    plugin = importlib.metadata.EntryPoint(name, value, group)
    with stand_ins.sglang(), pytest.MonkeyPatch.context() as patch:
        plugins: Any = importlib.import_module(f"{RUNTIME}.platforms.plugins")
        patch.setattr(
            plugins, "entry_points", lambda group: [plugin] if group.endswith("plugins") else []
        )
        patch.setattr(plugins, "get_selected_platform_dist", lambda: None)
        plugins.load_plugins()
        plugins.apply_plugin_hooks()
        state = types.ModuleType(f"{RUNTIME}.distributed.parallel_state")
        vars(state).update(
            model_parallel_is_initialized=lambda: True, get_ulysses_parallel_world_size=lambda: 1
        )
        distributed = types.ModuleType(f"{RUNTIME}.distributed")
        vars(distributed)["parallel_state"] = state
        arguments = types.ModuleType(f"{RUNTIME}.server_args")
        made = types.SimpleNamespace(attention_backend_config=SETTINGS)
        vars(arguments)["get_global_server_args"] = lambda: made
        for module in (state, distributed, arguments):
            sys.modules[module.__name__] = module
        cuda = importlib.import_module(f"{RUNTIME}.platforms.cuda")
        platforms: Any = importlib.import_module(f"{RUNTIME}.platforms")
        yield types.SimpleNamespace(
            platform=cuda.CudaPlatformBase, names=platforms.AttentionBackendEnum, arguments=made,
            state=state,
            abstract=importlib.import_module(
                f"{RUNTIME}.layers.attention.backends.attention_backend"
            ),
        )  # fmt: skip


@pytest.fixture
def engine(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loaded.arguments, "attention_backend_config", dict(SETTINGS))
    return loaded


def backend(engine: Any) -> Any:
    """What SGLang's CUDA platform gives for the name that the user chose."""
    path = engine.platform.get_attn_backend_cls_str(engine.names[adapter.MEMBER], 16, torch.float32)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def layer(engine: Any, prefix: str = "blocks.3.attn1", **options: Any) -> Any:
    kind = backend(engine).get_impl_cls()
    return kind(num_heads=4, head_size=16, softmax_scale=0.3, prefix=prefix, **options)


def metadata(engine: Any, step: int = 5, shape: tuple[int, ...] = (1, 16, 3, 4, 8)) -> Any:
    """As SGLang's denoising stage asks the builder of this backend."""
    return backend(engine).get_builder_cls()().build(
        current_timestep=step, skip_first_steps=10, sparsity=0.2, raw_latent_shape=shape,
        patch_size=(1, 2, 2),
    )  # fmt: skip


def call(made: Any, meta: Any, tokens: int = 24, keys: int | None = None) -> torch.Tensor:
    out: torch.Tensor = made.forward(Q[:, :tokens], *(x[:, : keys or tokens] for x in (K, V)), meta)
    return out


def sparse(grid: TokenGrid = GRID) -> torch.Tensor:
    q, k, v = (x[:, : grid.num_tokens] for x in (Q, K, V))
    return diffpatch.attention(q, k, v, grid, METHOD, scale=0.3)


def dense(tokens: int = 24, keys: int | None = None, **how: Any) -> torch.Tensor:
    q, k, v = (
        x[:, :n].transpose(1, 2) for x, n in ((Q, tokens), (K, keys or tokens), (V, keys or tokens))
    )
    return F.scaled_dot_product_attention(q, k, v, scale=0.3, **how).transpose(1, 2)


def test_the_platform_gives_our_backend_for_its_member(engine: Any) -> None:
    ours = backend(engine)
    assert issubclass(ours, engine.abstract.AttentionBackend)
    assert ours.get_enum() is engine.names[adapter.MEMBER]
    assert ours.get_enum().is_sparse and not ours.supports_ring_rotation()
    assert issubclass(ours.get_metadata_cls(), engine.abstract.AttentionMetadata)
    other = engine.platform.get_attn_backend_cls_str(engine.names.TORCH_SDPA, 16, torch.float32)
    assert other.endswith("SDPABackend")


def test_a_video_is_sparse_and_the_rest_dense(engine: Any) -> None:
    made = layer(engine)
    assert error(call(made, metadata(engine)), sparse()) < 1e-6
    assert error(call(made, metadata(engine), keys=5), dense(keys=5)) < 1e-6
    assert error(call(made, None), dense()) < 1e-6
    assert error(call(made, metadata(engine, shape=(1, 24, 64))), dense()) < 1e-6
    assert error(call(made, metadata(engine), tokens=27), dense(27)) < 1e-6
    causal = call(layer(engine, causal=True), metadata(engine))
    assert error(causal, dense(is_causal=True)) < 1e-6
    said = " ".join(made.engine.reasons)
    for words in ("24 queries and 5 keys", "does not tell the size", "configure", "causal layer"):
        assert words in said


@pytest.mark.parametrize(("text", "before"), [("before", 3), ("after", 0)])
def test_text_stands_where_the_configuration_says(engine: Any, text: str, before: int) -> None:
    engine.arguments.attention_backend_config["text"] = text
    found = call(layer(engine), metadata(engine), tokens=27)
    assert error(found, sparse(TokenGrid(3, 2, 4, before, 3 - before))) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "step", "prefix", "is_dense"),
    [
        ({"dense_steps": 3}, 2, "blocks.3.attn1", True),
        ({"dense_steps": 3}, 3, "blocks.3.attn1", False),
        ({"dense_layers": 4}, 5, "blocks.3.attn1", True),
        ({"dense_layers": 3}, 5, "blocks.3.attn1", False),
        ({"dense_layers": 3}, 5, "attn", True),
    ],
)
def test_steps_and_layers_are_sglangs(
    engine: Any, schedule: dict[str, int], step: int, prefix: str, is_dense: bool
) -> None:
    engine.arguments.attention_backend_config |= schedule
    found = call(layer(engine, prefix), metadata(engine, step))
    assert error(found, dense() if is_dense else sparse()) < 1e-6


def test_heads_on_several_devices(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.state, "get_ulysses_parallel_world_size", lambda: 2)
    assert error(call(layer(engine), metadata(engine)), sparse()) < 1e-6
    config = {"method": "neighborhood", "stride": 1, "heads": [[1, 1, 3], [1, 2, 1]]}
    monkeypatch.setattr(engine.arguments, "attention_backend_config", config)
    assert error(call(layer(engine), metadata(engine)), dense()) < 1e-6


def test_packed_sequences_are_dense(engine: Any) -> None:
    made, ends = layer(engine), torch.tensor([0, 10, 24], dtype=torch.int32)
    q, k, v = (x[0, :24] for x in (Q, K, V))
    found = made.forward_varlen(q, k, v, cu_seqlens=ends, max_seqlen=14)
    assert error(found[:10], dense(10)[0]) < 1e-6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "radail"}, "unknown method 'radail'"),
        ({"dense_steps": 0.2}, "how many steps there are"),
        ({"method": "neighborhood+temporal"}, "runs and their branches"),
        ({"text": "left"}, "text='left' in the configuration"),
    ],
)
def test_configurations_that_cannot_work_say_so(
    engine: Any, config: dict[str, Any], words: str
) -> None:
    engine.arguments.attention_backend_config |= config
    with pytest.raises(DiffpatchError, match=words):
        layer(engine)


def test_another_version_is_named(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend(engine)
    fields = engine.abstract.AttentionMetadata.__dataclass_fields__
    monkeypatch.delitem(fields, "current_timestep")
    with pytest.raises(DiffpatchError, match=r"SGLang 0\.5\.23 has no AttentionMetadata\."):
        made.get_impl_cls()(4, 16, 0.3)


def test_requests_in_turn_are_as_alone(engine: Any) -> None:
    """Of two sizes, and at two steps, over the same layer."""
    engine.arguments.attention_backend_config["dense_steps"] = 3
    made, other = layer(engine), (1, 16, 1, 8, 12)
    requests = [metadata(engine, step) for step in (2, 3)]
    requests += [metadata(engine, step, other) for step in (3, 2)]
    alone = [call(layer(engine), one) for one in requests]
    for _ in range(2):
        found = [call(made, one) for one in requests]
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert error(alone[1], sparse()) < 1e-6
    assert error(alone[0], alone[1]) > 1e-2 and error(alone[1], alone[2]) > 1e-2
