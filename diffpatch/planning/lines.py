"""A plan as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpatch.kernels.block_sparse.backends import ROWS
from diffpatch.patterns.grid import PackedGrid
from diffpatch.planning.words import operations, runs

if TYPE_CHECKING:
    from diffpatch.planning.plan import Plan

SHOWN = 0.005  # of what is computed: less padding is not worth a line


def of(plan: Plan) -> list[str]:
    """All that a plan says."""
    most = "at most " if plan.at_most else ""
    lines = [
        f"{plan.method} on {plan.model}",
        f"  grid       {plan.grid} = {plan.tokens:,} tokens",
        *_spans(plan),
        *_training(plan),
        f"  kept       {most}{plan.kept_sparse:.1%} of the pairs in a sparse call,"
        f" {plan.kept:.1%} in the run",
        *_quality(plan),
        f"  by step    {runs(plan.kept_per_step)}",
        f"  by layer   {runs(plan.kept_per_layer)}",
        f"  dense      {plan.dense_steps} of {plan.steps} steps, {plan.dense_layers} of"
        f" {plan.layers} layers",
        *_waste(plan),
        f"  attention  {plan.attention_share:.0%} of a dense step's operations",
        f"  a step     {operations(plan.dense_step_flops)} dense,"
        f" {operations(plan.step_flops)} in the mean of the run",
        _bound(plan),
    ]
    if plan.predicted is not None:
        lines.append(f"  predicted  {plan.predicted}")
    if plan.state_bytes:
        refused = "" if plan.fits else ", more than the method may hold: the run is refused"
        lines.append(f"  state      {plan.state_bytes / 2**20:,.0f} MiB{refused}")
    if plan.scratch_bytes:
        lines.append(f"  scores     {plan.scratch_bytes / 2**20:,.0f} MiB while a call chooses")
    return lines


def _spans(plan: Plan) -> list[str]:
    """What is kept within each grid of a packed sequence, or nothing."""
    if not isinstance(plan.grid, PackedGrid):
        return []
    said = (
        f"{kept:.1%} kept within {'×'.join(map(str, span))}"
        for span, kept in zip(plan.grid.spans, plan.kept_per_span, strict=True)
        if isinstance(span, tuple)
    )
    return [f"  spans      {', '.join(said)}; all between them"]


def _quality(plan: Plan) -> list[str]:
    """That a level of quality is missed or has no effect, and why; or nothing."""
    if plan.unused_quality is not None:
        return [f"  quality    {plan.unused_quality}"]
    if plan.missed_quality is None:
        return []
    return [f"  quality    {plan.missed_quality} of the visual pairs; nothing is nearer here"]


def _training(plan: Plan) -> list[str]:
    """What the model was trained at, and what goes beyond it."""
    if plan.trained is None:
        return []
    frames, *size = plan.trained
    of = "" if None in size else f" of {size[0]}×{size[1]} tokens"
    lines = [f"  trained    at up to {frames} frame{'s' * (frames > 1)}{of}"]
    return lines + ([f"  beyond     {plan.warning}"] if plan.warning else [])


def _waste(plan: Plan) -> list[str]:
    """What is computed beyond the kept pairs, in a line or none."""
    parts = []
    if plan.visited is not None:
        parts.append(
            f"{plan.visited:.1%} of the pairs in the tiles visited ({plan.partial_share:.0%} of"
            " them in part)"
        )
    if plan.computed is not None:
        parts.append(f"{plan.computed:.1%} computed by the {plan.backend} backend")
    lines = [f"  tiles      {', '.join(parts)}"] if parts else []
    if plan.padding >= SHOWN:
        lines.append(
            f"  padding    {plan.padding:.0%} of what is computed fills up blocks, which leaves"
            f" at most {plan.computed_speedup:.2f}× for the transformer"
        )
    error = ROWS[plan.backend].error
    return lines + ([f"  8 bits     {error}"] if error else [])


def _bound(plan: Plan) -> str:
    if plan.at_most:
        return (
            "  speedup    the data decide; by operations"
            f" {plan.attention_speedup:.2f}× for attention and {plan.step_speedup:.2f}× for the"
            " transformer if no more is left out"
        )
    return (
        f"  at most    {plan.attention_speedup:.2f}× for attention,"
        f" {plan.step_speedup:.2f}× for the transformer (by operations)"
    )
