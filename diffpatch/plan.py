"""What a method will gain, before anything runs: grid, kept pairs, share of attention, bounds."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from diffpatch.errors import BadParameter, UnknownFamily
from diffpatch.grid import TokenGrid
from diffpatch.methods.base import MethodLike
from diffpatch.pattern import BlockPattern
from diffpatch.pipelines.families import attention_modules, families, family_of
from diffpatch.pipelines.presets import two_experts
from diffpatch.pipelines.shapes import ModelShape, shape_of, shape_of_pipeline
from diffpatch.schedule import Amount
from diffpatch.settings import settle


@dataclass(frozen=True)
class Plan:
    """The cost of a run with a method, next to the same run dense.

    Speedups are bounds: they assume that kept pairs cost what dense pairs cost and that everything
    counts by its floating-point operations. Real ones are lower; `diffpatch bench` measures them.

    Attributes:
        model: the model planned for.
        method: the method with its parameters.
        grid: the token grid.
        tokens: length of the self-attention sequence.
        kept: query-key pairs computed over the whole run, dense steps and layers included.
        kept_sparse: the same over the sparse calls alone.
        dense_steps: denoising steps that stay dense.
        dense_layers: layers that stay dense.
        steps: denoising steps.
        layers: self-attention layers.
        attention_share: share of dense self-attention in the operations of a step.
        attention_speedup: bound on the speedup of all self-attention of the run.
        step_speedup: bound on the speedup of the run's transformer (Amdahl).
        partial_share: visited tiles that need an element mask, as a fraction.
        state_bytes: memory held across steps, over all layers and guidance branches.
        at_most: whether the run may keep less than this says, because the data decide.
    """

    model: str
    method: str
    grid: TokenGrid
    tokens: int
    kept: float
    kept_sparse: float
    dense_steps: int
    dense_layers: int
    steps: int
    layers: int
    attention_share: float
    attention_speedup: float
    step_speedup: float
    partial_share: float
    state_bytes: int
    patterns: tuple[BlockPattern, ...] = ()
    at_most: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Everything but the patterns, ready for JSON."""
        fields = {k: v for k, v in vars(self).items() if k not in ("patterns", "grid")}
        return fields | {"grid": asdict(self.grid)}

    def draw(self, size: int = 512) -> Any:
        """The tile map of the first pattern, as a PIL image."""
        return self.patterns[0].draw(size)

    def __str__(self) -> str:
        state = f"\n  state      {self.state_bytes / 2**20:.0f} MiB" if self.state_bytes else ""
        most = "at most " if self.at_most else ""
        if self.at_most:
            bound = (
                "  speedup    the data decide; by operations"
                f" {self.attention_speedup:.2f}× for attention and {self.step_speedup:.2f}× for the"
                " transformer if no more is left out"
            )
        else:
            bound = (
                f"  at most    {self.attention_speedup:.2f}× for attention,"
                f" {self.step_speedup:.2f}× for the transformer (by operations, uncalibrated)"
            )
        return (
            f"{self.method} on {self.model}\n"
            f"  grid       {self.grid} = {self.tokens:,} tokens\n"
            f"  kept       {most}{self.kept_sparse:.1%} of the pairs in a sparse call,"
            f" {self.kept:.1%} in the run\n"
            f"  dense      {self.dense_steps} of {self.steps} steps, {self.dense_layers} of"
            f" {self.layers} layers\n"
            f"  attention  {self.attention_share:.0%} of a dense step's operations\n"
            f"{bound}{state}"
        )


def plan(
    target: Any,
    method: MethodLike = "radial",
    *,
    height: int,
    width: int,
    num_frames: int = 1,
    num_inference_steps: int = 50,
    dense_steps: Amount | None = None,
    dense_layers: Amount | None = None,
    dense_last_steps: Amount = 0,
    quality: str | None = None,
    text_tokens: int | None = None,
    branches: int = 2,
    **params: Any,
) -> Plan:
    """What a run would cost with a method; needs no weights and runs no model.

    Args:
        target: a pipeline, or the name of a built-in model shape such as "wan-14b".
        method: as in `patch`, with the same published defaults.
        height: pixels.
        width: pixels.
        num_frames: frames of the clip; 1 for images.
        num_inference_steps: denoising steps.
        dense_steps: as in `patch`.
        dense_layers: as in `patch`.
        dense_last_steps: as in `patch`.
        quality: as in `patch`.
        text_tokens: text tokens in the self-attention sequence; None takes the model's usual.
        branches: guidance branches, for the memory of state.
        **params: parameters of the method.

    Raises:
        BadParameter: the sizes do not fit the model, or a parameter cannot work.
        UnknownFamily: the target is no known model.
    """
    shape = _shape(target)
    family = next((f for f in families() if f.transformer == shape.family), None)
    chosen, schedule = settle(
        method,
        params,
        family,
        shape.kind,
        dense_steps=dense_steps,
        dense_last_steps=dense_last_steps,
        dense_layers=dense_layers,
        quality=quality,
        experts=shape.experts,
    )
    bound = schedule.bind(num_inference_steps, shape.layers)
    try:
        frames, rows, columns = shape.grid(num_frames, height, width)
    except ValueError as error:
        raise BadParameter(str(error)) from None
    text = shape.text_tokens if text_tokens is None else text_tokens
    sides = (text, 0) if shape.text_before else (0, text)
    grid = TokenGrid(frames, rows, columns, *sides)

    made: dict[Any, BlockPattern] = {}
    kept: list[float] = []  # of every (step, layer)
    sparse: list[float] = []  # of those that are not dense
    holds: dict[int, BlockPattern] = {}  # by layer, what state is about
    for step, layer in itertools.product(range(num_inference_steps), range(shape.layers)):
        if bound.reason(step, layer):
            kept.append(1.0)
            continue
        variant = chosen.variant(layer, step)
        if variant not in made:
            made[variant] = chosen.pattern(grid, variant)
        holds.setdefault(layer, made[variant])
        kept.append(chosen.kept(made[variant], step - bound.first))
        sparse.append(kept[-1])
    mean = sum(kept) / len(kept)
    attention = shape.attention_flops(grid.num_tokens)
    share = attention / (attention + shape.linear_flops(grid.num_tokens))
    visits = torch.cat([p.blocks.mask_ids for p in made.values()]) if made else torch.zeros(0)
    return Plan(
        model=shape.name,
        method=str(chosen),
        grid=grid,
        tokens=grid.num_tokens,
        kept=mean,
        kept_sparse=sum(sparse) / len(sparse) if sparse else 1.0,
        dense_steps=sum(bool(bound.reason(s, -1)) for s in range(num_inference_steps)),
        dense_layers=len(bound.layers),
        steps=num_inference_steps,
        layers=shape.layers,
        attention_share=share,
        attention_speedup=1 / mean,
        step_speedup=1 / (1 - share + share * mean),
        partial_share=float((visits >= 0).float().mean()) if len(visits) else 0.0,
        state_bytes=sum(chosen.state_size(p, shape.heads, shape.head_dim) for p in holds.values())
        * branches,
        patterns=tuple(made.values()),
        at_most=any(chosen.at_most(pattern) for pattern in made.values()),
    )


def _shape(target: Any) -> ModelShape:
    if isinstance(target, ModelShape):
        return target
    if isinstance(target, str):
        try:
            return shape_of(target)
        except KeyError as error:
            raise UnknownFamily(str(error.args[0])) from None
    for component in getattr(target, "components", {}).values():
        model = getattr(component, "_orig_mod", component)
        family = family_of(model) if isinstance(model, torch.nn.Module) else None
        if family is not None and not family.refused:
            paths = [path for path, _ in attention_modules(model, family)]
            shape = shape_of_pipeline(target, model, paths, family)
            return replace(shape, experts=two_experts(target))
    raise UnknownFamily(
        f"{type(target).__name__} holds no transformer that diffpatch can plan for;"
        " name a built-in model shape such as 'wan-14b'"
    )
