"""What a method is, and what it sees of one attention call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

import torch

from diffpatch import checking, showing
from diffpatch.errors import BadParameter
from diffpatch.kernels.block_sparse import api as block_sparse
from diffpatch.kernels.block_sparse.api import work_of
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.methods.learned.files import Layer, Learned, load
from diffpatch.methods.slowing import Slowing, sharpened
from diffpatch.patterns.grid import TokenGrid, as_grid
from diffpatch.patterns.pattern import BlockPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TOKENS = 2**21  # of a grid: patterns are tables of pairs of tiles, and tiles have 128 tokens


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call, as a method sees it.

    Attributes:
        pattern: the method's pattern for the grid, layer and step of the call.
        scale: the factor on q·k; None means 1 / sqrt(D).
        key_mask: bool (B, S), True where a key may be attended to; None allows all.
        backend: what the user asked for, "auto" where nothing.
        step: denoising step of the run, counted in model evaluations.
        total: model evaluations in the run; None where nothing tells.
        state: what the method keeps for this layer and guidance branch; it dies with the run.
        learned: what the layer learned, from the method's file of weights; empty without one.
        layer: number of the layer among those that are patched, from 0.
        branch: number of the transformer's forward in its step, from 0: the guidance branch.
        shared: the same for all branches of this layer; None where nothing says which they are.
        common: gives what the method keeps for all layers of this branch.
    """

    pattern: BlockPattern
    scale: float | None = None
    key_mask: torch.Tensor | None = None
    backend: str = "auto"
    step: int = 0
    total: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    learned: Mapping[str, torch.Tensor] = field(default_factory=dict)
    layer: int = 0
    branch: int = 0
    shared: dict[str, Any] | None = None
    common: Callable[[], dict[str, Any]] = dict

    def sparse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: BlockPattern | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Attention over a pattern, the call's own by default.

        Returns:
            The output (B, S, H, D), its log-sum-exp fp32 (B, S, H), and the backend used.
        """
        blocks = (pattern or self.pattern).on(q.device)
        out, lse, used = block_sparse.attend(
            q, k, v, blocks, scale=self.scale, key_mask=self.key_mask, return_lse=True,
            backend=self.backend,
        )  # fmt: skip
        assert lse is not None
        return out, lse, used


@dataclass(frozen=True, eq=False)
class Attended:
    """The result of a call.

    Attributes:
        out: (B, S, H, D).
        kept: query-key pairs computed, as a fraction of all; where the data decide, a number on
            their device, so that nothing waits for it.
        backend: what computed it.
    """

    out: torch.Tensor
    kept: float | torch.Tensor
    backend: str


@dataclass(frozen=True)
class Method:
    """A way to attend to less. Subclasses are frozen dataclasses; their fields are the parameters.

    A static method overrides `pattern`; one whose pattern changes with the layer or the denoising
    step also overrides `variant`, which says what of the two the pattern really depends on, so that
    patterns can be cached. A method that does more than skip overrides `attend`, and says
    ``only_skips = False`` beside it.

    What a method says of itself are class attributes, such as ``kinds = ("video",)``, or properties
    where it depends on a parameter.

    Every parameter is checked against its annotation, whatever door it comes through; lists become
    tuples. What the annotation does not say, `validate` checks.
    """

    name: ClassVar[str] = "method"  # what patch() and the command line call it
    summary: ClassVar[str]
    source: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "pattern" in vars(cls):
            cls.pattern = _checking_grid(cls.pattern)  # type: ignore[method-assign]
        if "__post_init__" in vars(cls):
            raise TypeError(f"{cls.__name__} defines __post_init__: call it validate")
        if "attend" in vars(cls) and "only_skips" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} defines attend: write beside it only_skips = False, or True if it"
                " computes the softmax over the pattern and nothing else"
            )

    def __new__(cls, *values: Any, **params: Any) -> Self:
        checking.check_names(cls.name, params, parameter_names(cls))
        return super().__new__(cls)

    @final
    def __post_init__(self) -> None:
        checking.check_fields(self, self.name)
        self.validate()

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls)  # its own values were checked as it was made

    def _repr_html_(self) -> str:
        rows = [
            (f.name, getattr(self, f.name), f.default, f.metadata.get("help", ""))
            for f in dataclasses.fields(self)
        ]
        known = {"summary", "source"} <= set(dir(type(self)))
        title = f"{self.name}: {self.summary} ({self.source})" if known else self.name
        return showing.table_html(title, rows, ("parameter", "value", "default", "meaning"))

    def plot(
        self, ax: Axes | None = None, *, grid: TokenGrid | tuple[int, int, int] = (8, 12, 20)
    ) -> tuple[Figure, Axes]:
        """Its pattern on a grid, as a map of pairs of tiles.

        Args:
            ax: where to; None makes a figure.
            grid: the tokens, three numbers (num_frames, height, width) for short.

        Raises:
            DiffpatchError: matplotlib is not installed, or the method does not fit the grid.
        """
        tokens = as_grid(grid)
        if not isinstance(tokens, TokenGrid):
            raise BadParameter(f"grid={tokens} holds several grids: plot one of them")
        figure, ax = self.pattern(tokens, self.variant(0, 0)).plot(ax)
        ax.set_title(f"{self.name} on {tokens}")
        return figure, ax

    def validate(self) -> None:
        """Refuse values that cannot work though their types are right; `check` helps to say so."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it makes sense for: "video", "image", or both."""
        return ("video", "image")

    @property
    def only_skips(self) -> bool:
        """Whether a call is the softmax over its pattern and nothing else."""
        return True

    @property
    def needs_steps(self) -> bool:
        """Whether it carries something from step to step."""
        return False

    @property
    def dynamic(self) -> bool:
        """Whether calls leave out more than their pattern does."""
        return False

    @property
    def state_advice(self) -> str:
        """How to hold less than `state_limit`."""
        return "keep more layers dense, or use another method"

    @property
    def default_dense_steps(self) -> int | float:
        """What `patch` uses where the caller and the family say nothing: the source's policy."""
        return 0

    @property
    def default_dense_layers(self) -> int | float:
        """The same for layers."""
        return 0

    @property
    def kept_parameters(self) -> tuple[str, ...]:
        """Parameters that set how much is kept; if one of them is given, `quality` is ignored."""
        return ("kept",)

    @property
    def slowing(self) -> Slowing | None:
        """Which frequencies of the model's rotary embedding are slowed down; None for none."""
        return None

    @property
    def why_one_process(self) -> str | None:
        """Why several processes cannot share a sequence, and what to do; None if they can."""
        return None

    def guide_every(self, grid: TokenGrid | None = None) -> int:
        """Steps that the cross-attention of one dense forward serves, on a grid or any; 0: none."""
        return 0

    def changes_whole(self, grid: TokenGrid) -> bool:
        """Whether it does more than dense attention where its pattern keeps everything."""
        return self.dynamic

    def why_whole(self, grid: TokenGrid) -> str:
        """Why a pattern on a grid keeps everything."""
        return "pattern keeps everything"

    def variant(self, layer: int, step: int) -> Hashable:
        """What the pattern depends on besides the grid; equal variants share one pattern."""
        return None

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        """The pattern on a grid, for one of the values that `variant` returns.

        Raises:
            BadParameter: the grid is not a `TokenGrid`, or the method cannot work on it.
        """
        raise TypeError(f"{type(self).__name__} does not define a pattern")

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        """Attention over (B, S, H, D) tensors; here, over the pattern and nothing else."""
        blocks = call.pattern.on(q.device)
        scale = sharpened(call.scale, self.softmax_factor(), q.shape[-1])
        out, _, used = block_sparse.attend(
            q, k, v, blocks, scale=scale, key_mask=call.key_mask, backend=call.backend
        )
        return Attended(out, call.pattern.kept, used)

    def selection_of(
        self, pattern: BlockPattern, state: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int] | None:
        """What a call computed exactly where the data decided; None: all of its pattern.

        Args:
            pattern: of the call.
            state: what the method has kept after it.

        Returns:
            bool (B, H, N, n) [query tile, strip of keys], and the most keys of a strip (see
            `kernels.active_tiles.table`).
        """
        return None

    def for_model(
        self, num_frames: int | None, size: tuple[int, int] | None, cross_attention: bool
    ) -> Method:
        """This method with what it takes from the model filled in.

        Args:
            num_frames: frames of tokens that the model was trained at; None if unknown.
            size: rows and columns of tokens that it was trained at; None if unknown.
            cross_attention: whether text reaches the model through cross-attention.
        """
        return self

    def softmax_factor(self) -> float:
        """What the scale of the softmax is multiplied by: above 1 sharpens it."""
        return 1.0

    def kept_at(self, pattern: BlockPattern, age: int) -> float:
        """Fraction of the pairs that a call computes in the sparse step number `age` of a run."""
        return pattern.kept

    def work(self, pattern: BlockPattern, age: int, backend: str) -> Work | None:
        """What a call does in the sparse step number `age` of a run, for a prediction of its time.

        A method that does more than attend to its pattern adds that here, or returns None if no
        model tells what it costs.
        """
        return work_of(pattern.blocks, backend) if self.only_skips else None

    def at_most(self, pattern: BlockPattern) -> bool:
        """Whether `kept` is a bound, because the data decide how much less it is."""
        return False

    def state_size(self, pattern: BlockPattern, heads: int, head_dim: int) -> int:
        """Bytes kept across steps for one layer, and one branch unless `shares_state`, of a 16-bit
        model, batch 1."""
        return 0

    def scratch_size(self, pattern: BlockPattern, heads: int) -> int:
        """Bytes that a call holds for a moment while it decides, batch 1."""
        return 0

    @property
    def shares_state(self) -> bool:
        """Whether all guidance branches of a layer share what is kept."""
        return False

    def state_limit(self) -> float:
        """Bytes that the method may keep across the steps of a run, over all layers."""
        return float("inf")

    def learned_from(self) -> str | None:
        """The file of what the layers of a model learned, or None (see `methods.learned.files`)."""
        return None

    def read_learned(self, component: str, family: str, layers: Sequence[Layer]) -> list[Learned]:
        """What every layer of a transformer learned; empty ones without weights.

        Args:
            component: the name of the transformer in its pipeline.
            family: its class.
            layers: its attention modules.

        Raises:
            BadParameter: the weights are missing, damaged or of another model.
        """
        path = self.learned_from()
        return [{} for _ in layers] if path is None else load(path, component, family, layers)[1]

    @classmethod
    def complete(cls, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters given by name, and those that they imply."""
        return params

    def with_kept(self, kept: float, kind: str = "video") -> Method:
        """This method set to keep about `kept` of the visual pairs of a sparse call.

        The only parameters it changes are those in `kept_parameters`. Most methods then choose
        their size for each grid; `fit_kept` counts the pairs of text as well. Methods whose knob is
        not called ``kept`` override this.

        Args:
            kept: fraction of the pairs, in (0, 1].
            kind: "video" or "image"; images have nothing to save along time.

        Raises:
            BadParameter: the method has nothing that sets how much it keeps.
        """
        if "kept" not in parameter_names(type(self)):
            raise BadParameter(f"{self.name} has no parameter that sets how much it keeps")
        changes: dict[str, Any] = {"kept": kept}
        return dataclasses.replace(self, **changes)

    def check(self, condition: bool, parameter: str, expected: str) -> None:
        """Raise BadParameter naming the parameter, its value and what was expected."""
        if not condition:
            value = getattr(self, parameter)
            raise BadParameter(f"{self.name}: {parameter}={value!r} must be {expected}")


def _checking_grid(pattern: Callable[..., BlockPattern]) -> Callable[..., BlockPattern]:
    """The pattern of a method, which begins with a look at what it is given for a grid."""

    @functools.wraps(pattern)
    def checked(self: Method, grid: TokenGrid, *variant: Any, **named: Any) -> BlockPattern:
        if not isinstance(grid, TokenGrid):
            raise BadParameter(
                f"{self.name}: grid={checking.shown(grid)} must be a TokenGrid, such as"
                " TokenGrid(num_frames, height, width)"
            )
        if grid.visual_tokens > MOST_TOKENS:
            raise BadParameter(
                f"{self.name}: {grid} are {grid.visual_tokens:,} tokens and patterns hold at most"
                f" {MOST_TOKENS:,}: choose a smaller height, width or number of frames"
            )
        return pattern(self, grid, *variant, **named)

    return checked


def param(default: Any, help: str) -> Any:
    """A dataclass field of a method: its default and one line of help for the command line."""
    return field(default=default, metadata={"help": help})


def parameter_names(cls: type[Method]) -> list[str]:
    """The parameters of a method."""
    return [f.name for f in dataclasses.fields(cls)]
