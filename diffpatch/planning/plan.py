"""What a method will gain, before anything runs: grid, kept pairs, costs, bounds, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpatch import showing
from diffpatch.checking import Count, Natural, checked
from diffpatch.errors import BadParameter
from diffpatch.kernels.block_sparse.backends import check_backend
from diffpatch.kernels.memo import neutral
from diffpatch.methods.registry import MethodLike
from diffpatch.patching.options.beyond import beyond
from diffpatch.patching.options.schedule import Amount
from diffpatch.patching.options.settle import QUALITIES, no_effect, settle
from diffpatch.patterns.grid import Grid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.pipelines.families.info import Trained
from diffpatch.pipelines.families.table import list_families
from diffpatch.pipelines.shapes.find import find_shape
from diffpatch.pipelines.shapes.table import ModelShape
from diffpatch.planning import lines
from diffpatch.planning.prediction import Prediction, predict
from diffpatch.planning.profiles import DeviceProfile, load_profile
from diffpatch.planning.run import PlannedRun, Size, grid_of, silent_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAR = 0.1  # relative; what misses a level of quality by more is told
BACKEND = "triton"  # assumed where no device profile names a backend


@dataclass(frozen=True)
class Plan:
    """The cost of a run with a method, next to the same run dense.

    The speedups are upper bounds: they count floating-point operations only, and assume that a
    kept pair costs as much as a dense one. `predicted` holds the times on a device.

    Attributes:
        model: the model planned for.
        method: the method with its parameters.
        grid: the token grid, or the spans of a packed sequence.
        tokens: length of the self-attention sequence.
        kept: fraction of the query-key pairs computed in the run, dense steps and layers included.
        kept_sparse: the same fraction over the sparse calls alone.
        kept_per_step: the same fraction for every step.
        kept_per_layer: the same fraction for every layer.
        dense_steps: denoising steps that stay dense.
        dense_layers: layers that stay dense.
        steps: denoising steps.
        layers: self-attention layers.
        attention_share: share of dense self-attention in the operations of a step.
        attention_speedup: bound on the speedup of all self-attention of the run.
        step_speedup: bound on the speedup of the run's transformer (Amdahl).
        dense_step_flops: floating-point operations of a dense step, all guidance branches.
        step_flops: the same for a step with the method, the mean over the run.
        visited: fraction of all pairs that lie in the tiles a sparse call visits; above
            `kept_sparse` where tiles are kept in part. None if a method does more.
        computed: fraction of all pairs that the backend computes in a sparse call, its padding to
            whole blocks included; None if that is not known for the method.
        backend: the backend that `computed` is about.
        partial_share: fraction of the visited tiles that need an element mask.
        state_bytes: memory held across steps, over all layers and guidance branches.
        predicted: seconds and speedups on the profile's device; None if nothing can tell them.
        patterns: the patterns of the sparse calls.
        at_most: whether the kept fractions are upper bounds, because the data decide.
        fits: whether the method may hold `state_bytes`; if not, the run is refused.
        trained: the most frames, rows and columns of tokens that the model was trained at; rows and
            columns are None if unknown, and all of it is None if nothing is known.
        scratch_bytes: memory that a call needs while it decides, freed afterwards; batch 1.
        warning: what exceeds `trained`, and which method is made for it; None if nothing does.
        quality: the level asked for, or None.
        unused_quality: why that level has no effect; None if it has one or there is no level.
        kept_per_span: of a packed sequence, what a sparse call keeps of the pairs within each span.
        kept_visual: what levels are about, `kept_sparse` of visual tokens alone, without refreshes.
    """

    model: str
    method: str
    grid: Grid
    tokens: int
    kept: float
    kept_sparse: float
    kept_per_step: tuple[float, ...]
    kept_per_layer: tuple[float, ...]
    dense_steps: int
    dense_layers: int
    steps: int
    layers: int
    attention_share: float
    attention_speedup: float
    step_speedup: float
    dense_step_flops: float
    step_flops: float
    visited: float | None
    computed: float | None
    backend: str
    partial_share: float
    state_bytes: int
    predicted: Prediction | None = None
    patterns: tuple[BlockPattern, ...] = ()
    at_most: bool = False
    fits: bool = True
    trained: tuple[int, int | None, int | None] | None = None
    warning: str | None = None
    scratch_bytes: int = 0
    quality: str | None = None
    unused_quality: str | None = None
    kept_per_span: tuple[float, ...] = ()
    kept_visual: float = 1.0

    @property
    def missed_quality(self) -> str | None:
        """How far a sparse call is from what the level of quality asks for; None if it is near."""
        wanted = None if self.quality is None else QUALITIES[self.quality]
        if wanted is None or self.unused_quality or abs(self.kept_visual / wanted - 1) <= NEAR:
            return None
        return f"{self.kept_visual:.1%} instead of {wanted:.1%}"

    @property
    def computed_speedup(self) -> float:
        """Bound on the speedup of the run's transformer, with all that the backend computes."""
        kept, sparse = self.kept, self.kept_sparse
        if self.computed is not None and sparse < 1:
            kept += (self.computed - sparse) * (1 - kept) / (1 - sparse)
        return 1 / (1 - self.attention_share + self.attention_share * kept)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the patterns, ready for JSON."""
        fields = {k: v for k, v in vars(self).items() if k not in ("patterns", "grid", "predicted")}
        predicted = None if self.predicted is None else asdict(self.predicted)
        return fields | {"grid": asdict(self.grid), "predicted": predicted}

    @checked()
    def draw(self, kind: str = "tiles", query: Sequence[Natural] | None = None) -> Any:
        """A picture of the first pattern, as a PIL image.

        Args:
            kind: "tiles" (kept fraction of every pair of tiles), "query" (what one query sees) or
                "distance" (kept fraction by the distance between frames).
            query: (frame, row, column) for kind "query"; None takes the middle of the grid.

        Raises:
            BadParameter: no such kind or query, or the run is dense.
        """
        from diffpatch.patterns.drawing import draw

        if not self.patterns:
            raise BadParameter(
                f"{self.method} on {self.model} runs dense: there is no pattern to draw"
            )
        title = f"{self.method} on {self.model}"
        return draw(self.patterns[0], kind, title=title, query=query)

    def __repr__(self) -> str:
        return (
            f"Plan({self.method} on {self.model}, {self.grid}: {self.kept:.1%} kept, at most"
            f" {self.step_speedup:.2f}×)"
        )

    def _repr_html_(self) -> str:
        shown = showing.facts_html(str(self))
        if self.patterns and not self.at_most:
            caption = "rows are query tiles, columns key tiles; blue is kept"
            shown += showing.figure_html(self.draw(), caption)
        return shown

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """What is kept in each step, and in the run.

        Args:
            ax: where to; None makes a figure.

        Raises:
            DiffpatchError: matplotlib is not installed.
        """
        figure, ax = showing.axes(ax)
        ax.stairs(self.kept_per_step, range(self.steps + 1), baseline=0, fill=True, alpha=0.5)
        ax.axhline(self.kept, color="black", linestyle="--", label=f"the run: {self.kept:.1%}")
        ax.set(title=f"{self.method} on {self.model}", xlabel="step", ylabel="kept", ylim=(0, 1.05))
        ax.legend()
        return figure, ax

    @property
    def padding(self) -> float:
        """Part of the computed pairs that lies in no visited tile: what fills up blocks."""
        if self.visited is None or not self.computed:
            return 0.0
        return max(0.0, 1 - self.visited / self.computed)

    def __str__(self) -> str:
        return "\n".join(lines.of(self))


@checked("method", "dense_steps", "dense_layers", "dense_last_steps")
def plan(
    target: Any,
    method: MethodLike = "radial",
    *,
    height: Count,
    width: Count,
    num_frames: Count = 1,
    num_inference_steps: Count = 50,
    dense_steps: Amount | None = None,
    dense_layers: Amount | None = None,
    dense_last_steps: Amount = 0,
    quality: str | None = None,
    text_tokens: Natural | None = None,
    references: Sequence[Size] = (),
    branches: Count = 2,
    profile: str | Path | DeviceProfile | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    **params: Any,
) -> Plan:
    """What a run would cost with a method; needs no weights and runs no model.

    Args:
        target: a pipeline or transformer, the name of a built-in model shape such as "wan-14b", a
            folder that save_pretrained wrote, a transformer's config.json, or a hub id.
        method: as in `patch`, with the same published defaults.
        height: pixels.
        width: pixels.
        num_frames: frames of the clip; 1 for images.
        num_inference_steps: denoising steps.
        dense_steps: as in `patch`.
        dense_layers: as in `patch`.
        dense_last_steps: as in `patch`.
        quality: as in `patch`.
        text_tokens: text tokens in the self-attention sequence; None: the model's default.
        references: (num_frames, height, width) in pixels of the videos and images that stand in
            the sequence before the one to make, where the model packs them so (MiniMax-H3).
        branches: guidance branches, which is the number of forwards in a step.
        profile: a device to predict times for: a name such as "h100", or a file that
            `diffpatch bench profile --json FILE` wrote; None gives bounds only.
        dtype: "fp32", "bf16" or "fp16" for the prediction; None: the device's default.
        backend: whose padding `Plan.computed` counts, not "auto"; None: the profile's, or "triton".
        **params: parameters of the method.

    Raises:
        BadParameter: the sizes do not fit the model, or a parameter cannot work.
        UnknownFamily: the target is not a known model.
        ModelError: the target names a model that cannot be read.
    """
    if backend is not None:
        check_backend(backend)
    shape = find_shape(target)
    device = None if profile is None else load_profile(profile)
    family = next((f for f in list_families() if f.transformer == shape.transformer), None)
    trained = None if family is None else family.trained_at(shape.heads, shape.patch[0])
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
        trained=trained,
        cross_attention=shape.cross_tokens > 0,
    )
    bound = schedule.bind(num_inference_steps, shape.layers)
    grid = grid_of(shape, (num_frames, height, width), text_tokens, references)
    used = backend or (BACKEND if device is None else device.backend)
    calls = family is not None and family.guidance == "calls"
    with neutral():
        run = PlannedRun(
            chosen, grid, bound, num_inference_steps, shape.layers, used,
            guided=1 / branches if calls else 1.0, silent=silent_of(family, grid),
        )  # fmt: skip
        predicted = None
        if device is not None and run.modelled:
            predicted = predict(
                device, shape, grid.num_tokens, run.work,
                steps=num_inference_steps, branches=branches, dtype=dtype,
            )  # fmt: skip
        made = _plan_of(run, shape, branches, predicted, trained)
        return replace(made, quality=quality, unused_quality=no_effect(chosen, quality, params))


def _plan_of(
    run: PlannedRun,
    shape: ModelShape,
    branches: int,
    predicted: Prediction | None,
    trained: Trained | None,
) -> Plan:
    """What there is to say about a run of a model."""
    tokens, steps = run.grid.num_tokens, run.steps
    mean, kept = sum(run.kept) / len(run.kept), run.kept_table()
    attention, rest = shape.attention_flops(tokens) * run.asking, shape.linear_flops(tokens)
    share = attention / (attention + rest)
    state = run.state_size(shape) * (1 if run.method.shares_state else branches)
    return Plan(
        model=shape.name,
        method=str(run.method),
        grid=run.grid,
        tokens=tokens,
        kept=mean,
        kept_sparse=run.kept_sparse(),
        kept_per_step=tuple(kept.mean(1).tolist()),
        kept_per_layer=tuple(kept.mean(0).tolist()),
        dense_steps=sum(bool(run.bound.reason(s, -1)) for s in range(steps)),
        dense_layers=len(run.bound.layers),
        steps=steps,
        layers=shape.layers,
        attention_share=share,
        attention_speedup=1 / mean,
        step_speedup=1 / ((1 - share) * (1 + run.guides) + share * mean),
        dense_step_flops=branches * shape.layers * (attention + rest),
        step_flops=branches * shape.layers * (attention * mean + rest * (1 + run.guides)),
        visited=run.visited(),
        computed=run.computed(),
        backend=run.backend,
        partial_share=run.partial_share(),
        state_bytes=state,
        predicted=predicted,
        patterns=tuple(run.made.values()),
        at_most=run.at_most(),
        fits=state <= run.method.state_limit(),
        trained=None if trained is None else (trained.num_frames, trained.height, trained.width),
        warning=beyond(trained, run.grid, run.method.name),
        scratch_bytes=run.scratch_size(shape),
        kept_per_span=run.kept_per_span(),
        kept_visual=run.kept_visual(),
    )
