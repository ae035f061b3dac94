"""The backend in vLLM-Omni's own registry, selector, platform and attention layer, on a CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import BadParameter, DiffpatchError, Neighborhood, PackedGrid, TokenGrid
from diffpatch.adapters import vllm_omni as adapter
from tests.adapters import stand_ins
from tests.pipelines.test_families import error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm_omni") is None,
    reason="vLLM-Omni is not installed: pip install --no-deps vllm-omni==0.30.0 (it wants a GPU's"
    " stack, so no extra installs it)",
)

GRID = TokenGrid(3, 2, 4)
SETTINGS = '{"method": "neighborhood", "window": [1, 1, 3], "stride": 1%s}'
METHOD = Neighborhood(window=(1, 1, 3), stride=1)
Q, K, V = torch.randn(3, 2, 40, 4, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    """vLLM-Omni's modules by their last name, on its CUDA platform, with our plugin loaded."""
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    group = "vllm_omni.general_plugins"
    [(name, value)] = pyproject["project"]["entry-points"][group].items()
    plugin = importlib.metadata.EntryPoint(name, value, group)
    find = importlib.metadata.entry_points
    with stand_ins.vllm_omni(), pytest.MonkeyPatch.context() as patch:
        platforms: Any = importlib.import_module("vllm_omni.platforms")
        cuda = importlib.import_module("vllm_omni.platforms.cuda.platform").CudaOmniPlatform
        patch.setattr(cuda, "get_device_capability", lambda *_, **__: _Capability(8, 0))
        patch.setattr(platforms, "_current_omni_platform", cuda())
        patch.setattr(
            importlib.metadata, "entry_points",
            lambda **k: [plugin] if k.get("group") == group else find(**k),
        )  # fmt: skip
        importlib.import_module("vllm_omni.plugins").load_omni_general_plugins()
        names = (
            "attention.backends.registry", "attention.backends.abstract", "attention.selector",
            "attention.layer", "data", "forward_context", "config",
        )  # fmt: skip
        modules = {n: importlib.import_module(f"vllm_omni.diffusion.{n}") for n in names}
        yield types.SimpleNamespace(**{n.rpartition(".")[2]: m for n, m in modules.items()})


@pytest.fixture
def omni(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(adapter.SETTINGS, SETTINGS % "")
    return loaded


class _Capability(NamedTuple):
    major: int
    minor: int


def layer(omni: Any, prefix: str = "blocks.3.attn1", /, **config: Any) -> Any:
    """vLLM-Omni's attention layer, with our backend chosen for the role "self"."""
    chosen = omni.data.AttentionConfig(per_role={"self": {"backend": "DIFFPATCH"}})
    parallel = types.SimpleNamespace(
        **{"ring_degree": 1, "ulysses_degree": 1, "allgather_degree": 1, **config}
    )
    settings = types.SimpleNamespace(
        diffusion_attention_config=chosen, parallel_config=parallel, model_class_name=None,
        kv_cache_dtype=None, kv_cache_skip_steps=None, kv_cache_skip_layers=None,
    )  # fmt: skip
    with omni.config.set_current_diffusion_config(settings):
        made = omni.layer.Attention(
            num_heads=4, head_size=16, causal=False, softmax_scale=0.3, prefix=prefix
        )
    made.parallel_strategy = made._no_parallel_strategy
    return made


def metadata(omni: Any, **fields: Any) -> Any:
    """With a video of `GRID` behind `prefix` tokens, unless told otherwise."""
    prefix = fields.pop("prefix", 0)
    layout = {"prefix_len": prefix, "latent_grid": GRID.shape, "used_len": prefix + 24}
    layout |= fields.pop("layout", {})
    return omni.abstract.AttentionMetadata(
        video_layout=omni.abstract.VideoTokenLayout(**layout), **fields
    )


def call(
    omni: Any, made: Any, meta: Any, tokens: int, step: int | None = 5, of: int | None = 10
) -> torch.Tensor:
    q, k, v = (x[:, :tokens] for x in (Q, K, V))
    context = omni.forward_context.ForwardContext(denoise_step_idx=step, total_denoise_steps=of)
    context.sp_plan_hooks_applied = True
    with omni.forward_context.override_forward_context(context):
        out: torch.Tensor = made(q, k, v, meta)
        return out


def sparse(grid: Any, tokens: int) -> torch.Tensor:
    q, k, v = (x[:, :tokens] for x in (Q, K, V))
    return diffpatch.attention(q, k, v, grid, METHOD, scale=0.3)


def dense(tokens: int, keys: int | None = None) -> torch.Tensor:
    q, k, v = (x[:, :tokens].transpose(1, 2) for x in (Q, K, V))
    k, v = k[:, :, :keys], v[:, :, :keys]
    return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)


def test_the_plugin_is_a_member_that_its_own_code_resolves(omni: Any) -> None:
    member = omni.registry.DiffusionAttentionBackendEnum["DIFFPATCH"]
    assert member.get_class().get_name() == "DIFFPATCH"
    before = list(omni.registry.DiffusionAttentionBackendEnum)
    adapter.register()  # plugins are loaded in several processes, and more than once
    assert list(omni.registry.DiffusionAttentionBackendEnum) == before
    made = layer(omni)
    assert type(made.attention) is member.get_class().get_impl_cls()
    assert made.attn_backend is member.get_class()
    assert isinstance(made.attention, omni.abstract.AttentionImpl)
    assert made.attn_backend.supports_head_size(72)


@pytest.mark.parametrize("prefix", [0, 5])
def test_a_video_is_sparse_and_what_stands_before_it_exact(omni: Any, prefix: int) -> None:
    found = call(omni, layer(omni), metadata(omni, prefix=prefix), 24 + prefix)
    expected = sparse(TokenGrid(3, 2, 4, text_before=prefix), 24 + prefix)
    assert error(found, expected) < 1e-6
    assert error(found, dense(24 + prefix)) > 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_padding_is_seen_by_nobody(omni: Any, masked: bool) -> None:
    mask = (torch.arange(32) < 29).expand(2, -1) if masked else None
    found = call(omni, layer(omni), metadata(omni, prefix=5, attn_mask=mask), 32)
    expected = sparse(TokenGrid(3, 2, 4, text_before=5), 29)
    assert error(found[:, :29], expected) < 1e-6


def test_several_videos_are_sparse_each_in_its_own_grid(omni: Any) -> None:
    span = omni.abstract.VideoTokenSpan
    spans = (span(14, (1, 2, 4), "reference"), span(25, (3, 1, 4), "target"))
    layout = {"prefix_len": None, "latent_grid": None, "used_len": 38, "video_spans": spans}
    found = call(omni, layer(omni), metadata(omni, layout=layout), 40)
    expected = sparse(PackedGrid((14, (1, 2, 4), 3, (3, 1, 4), 1)), 38)
    assert error(found[:, :38], expected) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "step", "of", "number", "is_dense"),
    [
        ({"dense_steps": 3}, 2, None, 3, True),
        ({"dense_steps": 3}, 3, None, 3, False),
        ({"dense_steps": 0.5}, 4, 10, 3, True),
        ({"dense_steps": 0.5}, 5, 10, 3, False),
        ({"dense_steps": 0.5}, 5, None, 3, True),
        ({"dense_steps": 1}, None, None, 3, True),
        ({"dense_last_steps": 2}, 8, 10, 3, True),
        ({"dense_layers": 4}, 5, 10, 3, True),
        ({"dense_layers": 3}, 5, 10, 3, False),
        ({"dense_layers": 3}, 5, 10, None, True),
    ],
)
def test_steps_and_layers_are_vllm_omnis(
    omni: Any, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any], step: int | None,
    of: int | None, number: int | None, is_dense: bool,
) -> None:  # fmt: skip
    [(name, value)] = schedule.items()
    monkeypatch.setenv(adapter.SETTINGS, SETTINGS % f', "{name}": {value}')
    made = layer(omni, "attn" if number is None else f"blocks.{number}.attn1")
    found = call(omni, made, metadata(omni), 24, step, of)
    assert error(found, dense(24) if is_dense else sparse(GRID, 24)) < 1e-6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (None, "publishes no video_layout"),
        ({"layout": {"latent_grid": (3, 2, 5)}}, "a layout of 30 tokens with 1 videos"),
        ({"layout": {"used_len": 20}, "extra": {"max_seqlen_q": 24}}, "in a document of 24"),
        ({"extra": {"cu_seqlens_q": torch.tensor([0, 8, 16, 24])}}, "several documents"),
        ({"attn_mask": torch.zeros(2, 1, 1, 24)}, "own mask"),
        ({"joint_query": Q}, "joined tensors"),
    ],
)
def test_what_cannot_be_told_is_dense_and_said(
    omni: Any, fields: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = layer(omni)
    made.attention.engine.begin()
    meta = None if fields is None else metadata(omni, **fields)
    assert error(call(omni, made, meta, 24), dense(24)) < 1e-6
    assert words in caplog.text and caplog.records[-1].levelno == logging.WARNING


def test_heads_on_several_devices(omni: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(omni, ulysses_degree=2)
    assert error(call(omni, made, metadata(omni), 24), sparse(GRID, 24)) < 1e-6
    heads = '{"method": "neighborhood", "stride": 1, "heads": [[1, 1, 3], [1, 2, 1]]}'
    monkeypatch.setenv(adapter.SETTINGS, heads)
    found = call(omni, layer(omni, ulysses_degree=2), metadata(omni), 24)
    assert error(found, dense(24)) < 1e-6
    assert error(call(omni, layer(omni), metadata(omni), 24), dense(24)) > 1e-2


@pytest.mark.parametrize("what", ["ring_degree", "allgather_degree"])
def test_a_sequence_in_pieces_is_refused(omni: Any, what: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(omni.layer, "get_sp_group", lambda: types.SimpleNamespace(ring_group=None))
    with pytest.raises(DiffpatchError, match=f"{what}=2: such a call never sees"):
        layer(omni, **{what: 2})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("radial", "must be JSON"),
        ("[]", "must be like"),
        ('{"method": "radail"}', "unknown method 'radail'"),
        ('{"method": "radial+temporal"}', "runs and their branches are not told"),
    ],
)
def test_settings_that_cannot_work_are_said_before_a_model_is_made(
    omni: Any, monkeypatch: pytest.MonkeyPatch, settings: str, words: str
) -> None:
    monkeypatch.setenv(adapter.SETTINGS, settings)
    backend = omni.registry.DiffusionAttentionBackendEnum["DIFFPATCH"].get_class()
    with pytest.raises(DiffpatchError, match=words):
        backend.validate_available()


def test_options_of_other_backends_are_refused(omni: Any) -> None:
    kind = omni.registry.DiffusionAttentionBackendEnum["DIFFPATCH"].get_class().get_impl_cls()
    with pytest.raises(BadParameter, match="topk are options of other backends"):
        kind(4, 16, 0.3, backend_kwargs={"topk": 3})


@pytest.mark.parametrize(
    ("kind", "field"), [("VideoTokenLayout", "used_len"), ("ForwardContext", "denoise_step_idx")]
)
def test_another_version_is_named(
    omni: Any, kind: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = omni.abstract if hasattr(omni.abstract, kind) else omni.forward_context
    monkeypatch.delitem(getattr(place, kind).__dataclass_fields__, field)
    with pytest.raises(DiffpatchError, match=rf"vLLM-Omni 0\.30.* has no {kind}\.{field}"):
        layer(omni)


def test_without_aenum_the_backend_is_not_offered(
    omni: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "aenum", None)
    adapter.register()
    assert "not offered to vLLM-Omni" in caplog.text


def test_requests_in_turn_are_as_alone(omni: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sizes, and at two steps, over the same layer."""
    monkeypatch.setenv(adapter.SETTINGS, SETTINGS % ', "dense_steps": 3')
    made, other = layer(omni), {"latent_grid": (1, 4, 6)}
    requests = [(metadata(omni), step) for step in (2, 3)]
    requests += [(metadata(omni, layout=other), step) for step in (3, 2)]
    alone = [call(omni, layer(omni), meta, 24, step) for meta, step in requests]
    for _ in range(2):
        found = [call(omni, made, meta, 24, step) for meta, step in requests]
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert error(alone[0], dense(24)) < 1e-6 and error(alone[1], alone[2]) > 1e-2
