"""Checkpoints that were trained sparse, in plain diffusers: gates, projections, mixtures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import diffpatch
from diffpatch import BadParameter, TokenGrid
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.dynamic import Dynamic, trained
from diffpatch.methods.learned import checkpoint
from diffpatch.methods.learned.files import Layer
from tests.methods.dynamic.trained_definitions import sla, sla2, vsa
from tests.pipelines.test_families import error
from tests.tiny import Tiny, wan, wan22

GRIDS = (TokenGrid(5, 6, 7), TokenGrid(3, 9, 4), TokenGrid(1, 5, 5))
KEPT = 0.4


def tensors(tokens: int, heads: int = 3, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        2 * torch.randn(2, tokens, heads, size, generator=generator, dtype=torch.float64)
        for _ in range(4)
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.2])
def test_vsa_is_its_definition(grid: TokenGrid, scale: float | None) -> None:
    q, k, v, gate = tensors(grid.num_tokens)
    learned = {"to_gate_compress.weight": gate, "gate": gate}
    call = AttentionCall(trained.pattern(checkpoint.VSA, grid), scale, learned=learned)
    found = trained.attend(checkpoint.VSA, q, k, v, call, KEPT)
    expected = vsa(q, k, v, grid, gate, KEPT, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(found.out, expected, rtol=0, atol=1e-12)
    least, most = trained.bounds(checkpoint.VSA, call.pattern, KEPT)
    assert least - 1e-9 <= float(found.kept) <= most + 1e-9


def test_a_gate_of_zero_is_plain_top_k() -> None:
    grid = GRIDS[0]
    q, k, v, gate = tensors(grid.num_tokens)
    learned = {"to_gate_compress.weight": gate, "gate": torch.zeros_like(gate)}
    call = AttentionCall(trained.pattern(checkpoint.VSA, grid), learned=learned)
    found = trained.attend(checkpoint.VSA, q, k, v, call, 1.0).out
    a, b, c = (x.transpose(1, 2) for x in (q, k, v))
    dense = F.scaled_dot_product_attention(a, b, c)
    torch.testing.assert_close(found, dense.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [TokenGrid(5, 8, 9), TokenGrid(2, 10, 10)], ids=str)
def test_sla_is_its_definition(grid: TokenGrid) -> None:
    q, k, v, _ = tensors(grid.num_tokens)
    weight, bias = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    learned = {"proj_l.weight": weight, "proj_l.bias": bias}
    call = AttentionCall(trained.pattern(checkpoint.SLA, grid), learned=learned)
    found = trained.attend(checkpoint.SLA, q, k, v, call, KEPT)
    expected = sla(q, k, v, weight, bias, KEPT, 8**-0.5)
    torch.testing.assert_close(found.out, expected, rtol=0, atol=1e-12)
    least, most = trained.bounds(checkpoint.SLA, call.pattern, KEPT)
    assert least - 1e-9 <= float(found.kept) <= most + 1e-9


@pytest.mark.parametrize("grid", [TokenGrid(5, 8, 9), TokenGrid(2, 10, 10)], ids=str)
@pytest.mark.parametrize("per_tile", [False, True])
def test_sla2_is_its_definition(grid: TokenGrid, per_tile: bool) -> None:
    q, k, v, _ = tensors(grid.num_tokens)
    rows, routers = -(-grid.num_tokens // 128), list(torch.randn(2, 8, 8, dtype=torch.float64))
    alpha = torch.rand((3, rows) if per_tile else (3,), dtype=torch.float64)
    learned = {"proj_q.weight": routers[0], "proj_k.weight": routers[1], "alpha": alpha}
    call = AttentionCall(trained.pattern(checkpoint.SLA2, grid), learned=learned)
    found = trained.attend(checkpoint.SLA2, q, k, v, call, KEPT)
    expected = sla2(q, k, v, routers, alpha, KEPT, 8**-0.5)
    torch.testing.assert_close(found.out, expected, rtol=0, atol=1e-12)
    least, most = trained.bounds(checkpoint.SLA2, call.pattern, KEPT)
    assert least - 1e-9 <= float(found.kept) <= most + 1e-9
    other = AttentionCall(call.pattern, learned=learned | {"alpha": torch.rand(3, rows + 1)})
    with pytest.raises(BadParameter, match="use the size that the weights were trained at"):
        trained.attend(checkpoint.SLA2, q, k, v, other, KEPT)


def test_fewer_heads_of_keys_and_half_precision() -> None:
    grid = GRIDS[0]
    q, k, v, gate = tensors(grid.num_tokens, heads=4)
    learned = {"to_gate_compress.weight": gate, "gate": gate}
    call = AttentionCall(trained.pattern(checkpoint.VSA, grid), learned=learned)
    wide_k, wide_v = (x[:, :, :2].repeat_interleave(2, 2) for x in (k, v))
    expected = vsa(q, wide_k, wide_v, grid, gate, 1.0, 0.3)
    call = AttentionCall(call.pattern, 0.3, learned=learned)
    found = trained.attend(checkpoint.VSA, q, k[:, :, :2], v[:, :, :2], call, 1.0).out
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    call = AttentionCall(call.pattern, 0.3, learned={k: x.bfloat16() for k, x in learned.items()})
    q, k, v = (x.bfloat16() for x in (q, k[:, :, :2], v[:, :, :2]))
    found = trained.attend(checkpoint.VSA, q, k, v, call, 1.0).out
    assert found.dtype == torch.bfloat16
    assert error(found.double(), expected) < 0.05


def learned_by(model: Any, kind: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random weights as they are released, for every self-attention of a Wan."""
    torch.manual_seed(1)
    found: dict[str, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        inner, channels = block.attn1.to_q.weight.shape
        size = inner // block.attn1.heads
        if kind == checkpoint.SLA2:
            place = f"{prefix}blocks.{i}.attn1.attn_op.local_attn."
            found |= {f"{place}proj_{x}.weight": torch.randn(size, size) for x in "qk"}
            found[f"{place}alpha"] = torch.rand(block.attn1.heads)
            continue
        shape = (inner, channels) if kind == checkpoint.VSA else (size, size)
        name = f"{prefix}blocks.{i}.attn1." + (
            "" if kind == checkpoint.VSA else "attn_op.local_attn."
        )
        found[f"{name}{kind}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        found[f"{name}{kind}.bias"] = torch.randn(shape[0])
    return found


def released(folder: Path, tiny: Tiny, kind: str) -> Path:
    """A folder of diffusers in which every transformer has learned weights as well."""
    tiny.pipe.save_pretrained(folder)
    for name in ("transformer", "transformer_2"):
        if getattr(tiny.pipe, name, None) is not None:
            file = folder / name / "diffusion_pytorch_model.safetensors"
            model = getattr(tiny.pipe, name)
            state = {n: x.contiguous() for n, x in model.state_dict().items()}
            save_file(state | learned_by(model, kind), file)
    return folder


SIZE = {"height": 160, "width": 192, "num_frames": 9}  # 3×10×12 tokens: several tiles and runs


@pytest.mark.parametrize("kind", [checkpoint.VSA, checkpoint.SLA, checkpoint.SLA2])
def test_a_released_folder_runs_as_it_was_trained(kind: str, tmp_path: Path) -> None:
    """diffusers itself loads the folder; every self-attention is then held to the definition."""
    folder = released(tmp_path, wan(), kind)
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    tiny = Tiny(pipe, wan().call | SIZE)
    plain, hooks = tiny.run(), [len(m._forward_pre_hooks) for m in pipe.transformer.modules()]
    extra, grid = learned_by(pipe.transformer, kind), TokenGrid(3, 10, 12)
    inputs: dict[int, torch.Tensor] = {}
    layers = [block.attn1 for block in pipe.transformer.blocks]
    now: list[int] = []

    def note(layer: int) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            inputs[layer] = args[0] if args else kwargs["hidden_states"]
            now.append(layer)

        return before

    original = F.scaled_dot_product_attention

    def defined(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] != key.shape[2] or query.shape[2] != grid.num_tokens:
            return original(query, key, value, *args, **kwargs)
        layer = now[-1]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = q.shape[-1] ** -0.5
        count = len(extra) // len(layers)
        weight, bias, *rest = list(extra.values())[count * layer : count * (layer + 1)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", original)
            if kind == checkpoint.SLA:
                return sla(q, k, v, weight, bias, trained.KEPT, scale).transpose(1, 2)
            if kind == checkpoint.SLA2:
                return sla2(q, k, v, [weight, bias], rest[0], trained.KEPT, scale).transpose(1, 2)
            gate = F.linear(inputs[layer], weight, bias).unflatten(-1, (q.shape[2], -1))
            return vsa(q, k, v, grid, gate, trained.KEPT, scale).transpose(1, 2)

    handles = [m.register_forward_pre_hook(note(i), with_kwargs=True) for i, m in enumerate(layers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", defined)
        expected = tiny.run()
    for handle in handles:
        handle.remove()
    with diffpatch.patched(pipe, "dynamic", weights=pipe.name_or_path):
        assert error(tiny.run(), expected) < 1e-5
        report = diffpatch.report(pipe)
        assert report.kept < 0.6 and not report.reasons
    assert error(expected, plain) > 1e-2
    assert torch.equal(tiny.run(), plain)
    assert [len(m._forward_pre_hooks) for m in pipe.transformer.modules()] == hooks


def test_each_expert_has_its_own(tmp_path: Path) -> None:
    tiny = wan22()
    folder = released(tmp_path, tiny, checkpoint.VSA)
    method = Dynamic(weights=str(folder))
    layers = [Layer(f"blocks.{i}.attn1") for i in range(2)]
    first, second = (method.read_learned(f"transformer{n}", "", layers) for n in ("", "_2"))
    assert all(one.keys() == two.keys() for one, two in zip(first, second, strict=True))
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    model = tiny.pipe.transformer_2
    save_file({n: x + 1 for n, x in learned_by(model, checkpoint.VSA).items()}, file)
    changed = method.read_learned("transformer_2", "", layers)
    name = "to_gate_compress.bias"
    torch.testing.assert_close(changed[1][name], second[1][name] + 1)
    diffpatch.patch(tiny.pipe, method, dense_steps=0)
    tiny.run()


def test_dense_steps_and_compiled_layers_need_no_gate(tmp_path: Path) -> None:
    tiny = wan()
    folder = released(tmp_path, tiny, checkpoint.VSA)
    plain = tiny.run()
    with diffpatch.patched(tiny.pipe, "dynamic", weights=str(folder), dense_steps=1.0):
        assert torch.equal(tiny.run(), plain)
    diffpatch.patch(tiny.pipe, "dynamic", weights=str(folder), dense_steps=0)
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager")
    assert error(tiny.run(), plain) < 1e-6
    assert any("compiled layers" in reason for reason in diffpatch.report(tiny.pipe).reasons)


@pytest.mark.parametrize("place", ["folder", "model", "file", "hub"])
def test_where_weights_may_be(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By huggingface_hub's own code where they are named by a model on the hub, from its cache."""
    tiny = wan()
    snapshot = tmp_path / "models--somebody--wan-vsa" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder = released(snapshot, tiny, checkpoint.VSA)
    (tmp_path / "models--somebody--wan-vsa" / "refs").mkdir()
    (tmp_path / "models--somebody--wan-vsa" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = folder / "transformer"
    weights = {
        "folder": str(folder), "model": str(model), "hub": "somebody/wan-vsa",
        "file": str(model / "diffusion_pytorch_model.safetensors"),
    }[place]  # fmt: skip
    assert checkpoint.kind_of(weights) == checkpoint.VSA
    diffpatch.patch(tiny.pipe, "dynamic", weights=weights, dense_steps=0)
    tiny.run()
    assert not diffpatch.report(tiny.pipe).reasons
    with pytest.raises(BadParameter, match=r"cannot be fetched from the hub"):
        checkpoint.kind_of("somebody/else")


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
def test_prefixes_of_other_tools(prefix: str, tmp_path: Path) -> None:
    tiny, file = wan(), tmp_path / "gates.safetensors"
    save_file(learned_by(tiny.pipe.transformer, checkpoint.VSA, prefix), file)
    diffpatch.patch(tiny.pipe, "dynamic", weights=str(file), dense_steps=0)


def broken(how: str, tmp_path: Path) -> str:
    """A file or folder that something is wrong with."""
    gates = learned_by(wan().pipe.transformer, checkpoint.VSA)
    file = tmp_path / "gates.safetensors"
    first = "blocks.0.attn1.to_gate_compress.weight"
    if how == "damaged":
        file.write_bytes(b"no tensors")
        return str(file)
    if how == "empty":
        return str(tmp_path)
    if how == "nowhere":
        return "/nowhere/at/all"
    mixed = learned_by(wan().pipe.transformer, checkpoint.SLA2)
    alpha = "blocks.0.attn1.attn_op.local_attn.alpha"
    changes: dict[str, dict[str, torch.Tensor]] = {
        "no router": {n: x for n, x in mixed.items() if "proj_k" not in n},
        "no share": mixed | {alpha: torch.tensor([0.5, 1.5])},
        "other heads": mixed | {alpha: torch.rand(3)},
        "neither": {}, "both": gates | {"blocks.0.attn1.proj_l.weight": torch.eye(12)},
        "larger": gates | {first: torch.zeros(24, 48)},
        "wrong bias": gates | {first.replace("weight", "bias"): torch.zeros(23)},
        "NaN": gates | {first: torch.full((24, 24), math.nan)},
        "fewer": {n: x for n, x in gates.items() if "blocks.1" in n},
        "more": gates | {n.replace("blocks.1", "blocks.7"): x.clone() for n, x in gates.items()},
        "no weight": {n: x for n, x in gates.items() if n != first},
        "other head size": learned_by(wan(head_dim=16).pipe.transformer, checkpoint.SLA),
    }  # fmt: skip
    save_file(changes[how] or {"x": torch.zeros(1)}, file)
    return str(file)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("damaged", "is not a safetensors file"),
        ("empty", "a folder without safetensors"),
        ("nowhere", "is not a file, a folder or a model on the hub"),
        ("neither", "neither to_gate_compress"),
        ("both", "hold several kinds"),
        ("no router", r"blocks\.0\.attn1 has no proj_k\.weight"),
        ("no share", r"blocks\.0\.attn1\.alpha must be from 0 to 1"),
        ("other heads", r"alpha is \(3,\) and the model needs \(2,\)"),
        ("larger", r"is \(24, 48\) and the model needs \(24, 24\)"),
        ("wrong bias", r"is \(23,\) and the model needs \(24,\)"),
        ("NaN", "holds NaN"),
        ("fewer", r"nothing for blocks\.0\.attn1, of 2 layers of transformer"),
        ("more", r"something for blocks\.7\.attn1"),
        ("no weight", "has a bias and no weight"),
        ("other head size", r"proj_l\.bias is \(16,\) and the model needs \(12,\)"),
    ],
)
def test_weights_that_do_not_fit_say_so(how: str, words: str, tmp_path: Path) -> None:
    tiny = wan()
    processors = [block.attn1.processor for block in tiny.pipe.transformer.blocks]
    with pytest.raises(BadParameter, match=words):
        diffpatch.patch(tiny.pipe, "dynamic", weights=broken(how, tmp_path))
    assert [block.attn1.processor for block in tiny.pipe.transformer.blocks] == processors


def test_what_was_not_trained_for_is_refused(tmp_path: Path) -> None:
    folder = str(released(tmp_path, wan(), checkpoint.VSA))
    with pytest.raises(BadParameter, match="rule='error' with weights, which say all but kept"):
        diffpatch.make_method("dynamic", weights=folder, rule="error")
    method = diffpatch.make_method("dynamic", weights=folder)
    assert isinstance(method, Dynamic) and method.kept == trained.KEPT and not method.needs_steps
    with pytest.raises(BadParameter, match="sequences without text"):
        method.pattern(TokenGrid(3, 4, 4, text_after=2))
    q = torch.zeros(1, 48, 2, 8)
    with pytest.raises(BadParameter, match=r"use diffpatch\.patch"):
        diffpatch.attention(q, q, q, TokenGrid(3, 4, 4), method)
    masked = AttentionCall(method.pattern(TokenGrid(3, 4, 4)), key_mask=torch.ones(1, 48).bool())
    with pytest.raises(BadParameter, match="trained without masks"):
        method.attend(q, q, q, masked)
