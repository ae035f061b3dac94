"""Every family: the right modules, the right grid, the right numbers, and back again bit for bit.

The reference is the family's own, unpatched attention under a dense mask: torch's operator is
replaced while the modules named in `tests.tiny.families` run.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import BlockPattern, Method, Neighborhood, TokenGrid
from diffpatch.methods.packed import pattern_on
from tests.tiny import Tiny
from tests.tiny.families import CASES
from tests.tiny.family_case import Case
from tests.tiny.parts import Bare, one

LOCAL = Neighborhood(window=(1, 3, 3), stride=1)


@dataclass(frozen=True)
class KeepAll(Method):
    """Keeps everything but does not say so, so that the sparse path has to compute it."""

    name = "keep-all"

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        return replace(Neighborhood(window=-1, stride=1).pattern(grid), kept=0.5)


@dataclass(frozen=True)
class Subject:
    """A built case: its pipeline, and what it answers unpatched.

    Attributes:
        case: what it must look like.
        model: the pipeline, or transformer alone, and a call of it.
        transformer: its transformer.
        dense: the result of the call.
        arguments: of the first forward in it, by name.
        samples: how many the forwards of the call had, each.
    """

    case: Case
    model: Tiny
    transformer: Any
    dense: torch.Tensor
    arguments: dict[str, Any]
    samples: tuple[int, ...] = ()

    def forward(self, arguments: dict[str, Any] | None = None) -> torch.Tensor:
        """The transformer alone, on the first forward's arguments or others."""
        with torch.no_grad():
            out = self.transformer(**{**(arguments or self.arguments), "return_dict": False})[0]
        return one(out)


@pytest.fixture(scope="module", params=list(CASES))
def subject(request: pytest.FixtureRequest) -> Subject:
    """All cases, one after the other, each built once."""
    case = CASES[request.param]
    if reason := case.missing():
        pytest.skip(reason)
    try:
        model = case.build()
    except RuntimeError as error:
        if "No module named 'torchvision'" not in str(error):
            raise
        pytest.skip(f"diffusers {diffusers.__version__} needs torchvision for it")
    transformer = model.pipe if isinstance(model, Bare) else model.pipe.transformer
    seen: list[dict[str, Any]] = []
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({**dict(zip(names, args, strict=False)), **kwargs})

    hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
    dense = model.run()
    hook.remove()
    name = next(n for n in ("x", "hidden_states", "vision_tokens") if n in seen[0])
    samples = tuple(len(arguments[name]) for arguments in seen)
    return Subject(case, model, transformer, dense, seen[0], samples)


@contextlib.contextmanager
def masked(subject: Subject, method: Method) -> Iterator[list[tuple[int, float]]]:
    """The unpatched model under the method's dense mask; yields (pairs, kept) of every call."""
    original, inside = F.scaled_dot_product_attention, [0]
    calls: list[tuple[int, float]] = []

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *args: Any,
        **kw: Any,
    ) -> torch.Tensor:
        case, length = subject.case, key.shape[2]
        if not inside[0] or not case.is_own(query.shape[2], length):
            return original(query, key, value, attn_mask, *args, **kw)
        mask = pattern_on(method, case.tokens(length), None).dense()[:, case.asking(length)]
        calls.append((query[..., 0].numel() * length, float(mask.float().mean())))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            mask = mask & attn_mask
        elif attn_mask is not None:
            mask = attn_mask.masked_fill(~mask, -torch.inf)
        return original(query, key, value, mask, *args, **kw)

    def enter(*_: Any) -> None:
        inside[0] += 1

    def leave(*_: Any) -> None:
        inside[0] -= 1

    modules = [subject.transformer.get_submodule(path) for path in subject.case.layers]
    hooks = [m.register_forward_pre_hook(enter) for m in modules]
    hooks += [m.register_forward_hook(leave) for m in modules]
    F.scaled_dot_product_attention = attend
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original
        for hook in hooks:
            hook.remove()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert torch.isfinite(a).all()
    return float((a - b).abs().max() / b.abs().max())


def test_exactly_the_self_attention_is_patched(subject: Subject) -> None:
    with diffpatch.patched(subject.model.pipe, LOCAL, dense_steps=0):
        patched = {
            path
            for path, module in subject.transformer.named_modules()
            if type(getattr(module, "processor", None)).__name__.startswith("DiffPatch")
        }
    assert patched == set(subject.case.layers)


def test_guidance_is_what_the_table_says(subject: Subject) -> None:
    """By the forwards of a pipeline's steps: one of two samples, two of one, or one of one."""
    if isinstance(subject.model, Bare):
        return  # no pipeline; tests/test_family_coverage.py reads diffusers' own
    steps = subject.model.call["num_inference_steps"]
    forwards = len(subject.samples) / steps
    seen = {(1, 2): "batch", (2, 1): "calls", (1, 1): "distilled"}[forwards, subject.samples[0]]
    rows = {row.transformer: row for row in diffpatch.list_families()}
    assert seen == rows[subject.case.transformer].guidance and set(subject.samples) == {
        subject.samples[0]
    }


def test_keeping_everything_changes_nothing(subject: Subject) -> None:
    with diffpatch.patched(subject.model.pipe, KeepAll()):
        out = subject.model.run()
        assert diffpatch.report(subject.model.pipe).dense_calls == 0
    assert error(out, subject.dense) <= 1e-6


def test_local_attention_equals_the_familys_own_under_a_mask(subject: Subject) -> None:
    dense = subject.forward()
    with masked(subject, LOCAL):
        expected = subject.forward()
    with diffpatch.patched(subject.transformer, LOCAL):
        out = subject.forward()
    assert error(expected, dense) > 5e-5  # else the comparison would say nothing
    assert error(out, expected) <= 1e-5  # some models amplify the last bit, on some processors


def test_whole_runs_follow_and_are_reported(subject: Subject) -> None:
    with masked(subject, LOCAL) as calls:
        expected = subject.model.run()
    with diffpatch.patched(subject.model.pipe, LOCAL, dense_steps=0):
        out, report = subject.model.run(), diffpatch.report(subject.model.pipe)
    assert error(out, expected) <= 5e-5  # some schedulers amplify
    assert report.calls == len(calls) and not report.reasons
    kept = sum(pairs * kept for pairs, kept in calls) / sum(pairs for pairs, _ in calls)
    assert report.kept == pytest.approx(kept)


def test_unpatching_is_bit_equal(subject: Subject) -> None:
    processors = [subject.transformer.get_submodule(p).processor for p in subject.case.layers]
    diffpatch.patch(subject.model.pipe, LOCAL, dense_steps=0)
    subject.model.run()
    diffpatch.unpatch(subject.model.pipe)
    assert torch.equal(subject.model.run(), subject.dense)
    after = [subject.transformer.get_submodule(p).processor for p in subject.case.layers]
    assert all(a is b for a, b in zip(after, processors, strict=True))


def test_a_changed_patch_reaches_exactly_its_neighbours(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One patch of the latents is one query, where the grid says, and its window sees it."""
    diffpatch.patch(subject.transformer, LOCAL)
    owner, first = subject.transformer._diffpatch, []
    attend = owner.attend

    def spy(q: torch.Tensor, *args: Any) -> torch.Tensor:
        out = attend(q, *args)
        first.append((q[0], out[0]))
        return out

    def forward(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        first.clear()
        subject.forward(arguments)
        return first[0]

    monkeypatch.setattr(owner, "attend", spy)
    q, out = forward(subject.arguments)
    case, length = subject.case, q.shape[0] + abs(subject.case.silent)
    asking = case.asking(length)
    dense = pattern_on(LOCAL, case.tokens(length), None).dense()[0, asking]
    frames, height, width = case.grid
    for f, h, w in itertools.product({0, frames - 1}, {1, height - 1}, {0, 2, width - 1}):
        token = case.origin(length) + (f * height + h) * width + w
        other_q, other_out = forward(subject.case.touch(subject.arguments, f, h, w))
        assert _changed(q, other_q) == {token - asking.start}, (f, h, w)
        assert _changed(out, other_out) == set(dense[:, token].nonzero().flatten().tolist())
    diffpatch.unpatch(subject.transformer)


def _changed(a: torch.Tensor, b: torch.Tensor) -> set[int]:
    return set((a != b).flatten(1).any(1).nonzero().flatten().tolist())
