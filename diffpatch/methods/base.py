"""What a method is, and the registry of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

from diffpatch.errors import BadParameter, UnknownMethod, choices
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.block_sparse.backends import BLOCK_SPARSE, choose_backend
from diffpatch.kernels.block_sparse.work import Work, work_of
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern


@dataclass(frozen=True)
class Call:
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
    """

    pattern: BlockPattern
    scale: float | None = None
    key_mask: torch.Tensor | None = None
    backend: str = "auto"
    step: int = 0
    total: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    learned: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def sparse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: BlockPattern | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Attention over a pattern, the call's own by default.

        Returns:
            The output (B, S, H, D), its log-sum-exp fp32 (B, S, H), and the backend used.
        """
        blocks = (pattern or self.pattern).on(q.device)
        used = choose_backend(BLOCK_SPARSE, self.backend, blocks, q, k, v)
        out, lse = block_sparse_attention(
            q, k, v, blocks, scale=self.scale, key_mask=self.key_mask, return_lse=True, backend=used
        )
        return out, lse, used


@dataclass(frozen=True)
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
    patterns can be cached. A method that does more than skip overrides `attend`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("video", "image")  # what it makes sense for
    needs_steps: ClassVar[bool] = False  # whether it carries something from step to step
    dynamic: ClassVar[bool] = False  # whether calls leave out more than their pattern does
    # How to hold less than `state_limit`.
    state_advice: ClassVar[str] = "keep more layers dense, or use another method"
    # What patch() uses when the caller and the family say nothing: the policy of the source.
    default_dense_steps: ClassVar[int | float] = 0
    default_dense_layers: ClassVar[int | float] = 0
    # What says how much is kept; a quality level leaves a method alone where one of them is given.
    kept_parameters: ClassVar[tuple[str, ...]] = ("kept",)

    def variant(self, layer: int, step: int) -> Hashable:
        """What the pattern depends on besides the grid; equal variants share one pattern."""
        return None

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        """The pattern on a grid, for one of the values that `variant` returns."""
        raise TypeError(f"{type(self).__name__} does not define a pattern")

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Attended:
        """Attention over (B, S, H, D) tensors; here, over the pattern and nothing else."""
        blocks = call.pattern.on(q.device)
        used = choose_backend(BLOCK_SPARSE, call.backend, blocks, q, k, v)
        scale, factor = call.scale, self.softmax_factor()
        if factor != 1:
            scale = factor * (q.shape[-1] ** -0.5 if scale is None else scale)
        out = block_sparse_attention(
            q, k, v, blocks, scale=scale, key_mask=call.key_mask, backend=used
        )
        return Attended(out, call.pattern.kept, used)

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
        if type(self).attend is not Method.attend:
            return None
        return work_of(pattern.blocks, backend)

    def at_most(self, pattern: BlockPattern) -> bool:
        """Whether `kept` is a bound, because the data decide how much less it is."""
        return False

    def state_size(self, pattern: BlockPattern, heads: int, head_dim: int) -> int:
        """Bytes kept across steps for one layer and branch of a 16-bit model, batch 1."""
        return 0

    def state_limit(self) -> float:
        """Bytes that the method may keep across the steps of a run, over all layers."""
        return float("inf")

    def learned_from(self) -> str | None:
        """The file of what the layers of a model learned, or None (see `diffpatch.adapter`)."""
        return None

    @classmethod
    def complete(cls, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters given by name, and those that they imply."""
        return params

    def with_kept(self, kept: float, kind: str = "video") -> Method:
        """This method set to keep about `kept` of the visual pairs of a sparse call.

        The only parameters it changes are those in `kept_parameters`. Without a grid it can only be
        near: `fit_kept` meets a budget on a grid. Methods whose knob is not called ``kept``
        override this.

        Args:
            kept: fraction of the pairs, in (0, 1].
            kind: "video" or "image"; images have nothing to save along time.

        Raises:
            BadParameter: the method has nothing that sets how much it keeps.
        """
        if "kept" not in {f.name for f in dataclasses.fields(self)}:
            raise BadParameter(f"{self.name} has no parameter that sets how much it keeps")
        changes: dict[str, Any] = {"kept": kept}
        return dataclasses.replace(self, **changes)

    def check(self, condition: bool, parameter: str, expected: str) -> None:
        """Raise BadParameter naming the parameter, its value and what was expected."""
        if not condition:
            value = getattr(self, parameter)
            raise BadParameter(f"{self.name}: {parameter}={value!r} must be {expected}")


# A name, a combination of names such as "radial+temporal" or ["radial", "temporal"], or an object.
MethodLike = str | Method | Sequence[str]


def param(default: Any, help: str) -> Any:
    """A dataclass field of a method: its default and one line of help for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MethodInfo:
    """A registered method, as listed by `diffpatch.list_methods()`.

    Attributes:
        name: what patch() and the command line call it.
        summary: one line.
        source: the paper or code it follows.
        parameters: name -> (type as written, default, help).
        cls: the frozen dataclass.
    """

    name: str
    summary: str
    source: str
    parameters: dict[str, tuple[str, Any, str]]
    cls: type[Method]


_REGISTRY: dict[str, type[Method]] = {}  # filled at import by register(), constant afterwards

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its `name`."""
    _REGISTRY[cls.name] = cls
    return cls


def list_methods() -> dict[str, MethodInfo]:
    """All methods by name, with their parameters and sources."""
    out = {}
    for name, cls in _REGISTRY.items():
        parameters = {
            f.name: (str(f.type), f.default, f.metadata.get("help", ""))
            for f in dataclasses.fields(cls)
        }
        out[name] = MethodInfo(name, cls.summary, cls.source, parameters, cls)
    return out


def _combine(names: str, params: dict[str, Any]) -> Method:
    inner, _, outer = names.partition("+")
    wrapper = _REGISTRY.get(outer)
    if wrapper is None or "over" not in {f.name for f in dataclasses.fields(wrapper)}:
        able = [
            n for n, c in _REGISTRY.items() if "over" in {f.name for f in dataclasses.fields(c)}
        ]
        raise UnknownMethod(
            f"{names!r} does not combine: write a method, '+' and one of {', '.join(able)}"
        )
    own = {f.name for f in dataclasses.fields(wrapper)}
    over = make_method(inner, **{k: v for k, v in params.items() if k not in own})
    return wrapper(over=over, **{k: v for k, v in params.items() if k in own})  # type: ignore[call-arg]


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that methods can be compared and hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def one_method(method: MethodLike) -> str | Method:
    """A combination given as a list, by its name.

    >>> one_method(["radial", "temporal"])
    'radial+temporal'

    Raises:
        BadParameter: the list holds something else than names.
    """
    if isinstance(method, str | Method):
        return method
    names = [part for part in method if isinstance(part, str)]
    if len(names) != len(method) or not names:
        raise BadParameter(
            f"{method!r} must be a list of names, such as ['radial', 'temporal']; objects are"
            " combined as Temporal(over=Radial(decay=0.3))"
        )
    return "+".join(names)


def make_method(method: MethodLike, **params: Any) -> Method:
    """A method object from its name and parameters; an object passes through unless changed.

    ``"radial+temporal"`` or ``["radial", "temporal"]`` is the second method over the first; each
    parameter goes to the one of the two that has it.

    Raises:
        UnknownMethod: no method has that name.
        BadParameter: the method has no such parameter, or its value cannot work.
    """
    method = one_method(method)
    if isinstance(method, str) and "+" in method:
        return _combine(method, params)
    if isinstance(method, Method):
        cls: type[Method] = type(method)
    else:
        if method not in _REGISTRY:
            raise UnknownMethod(f"unknown method {method!r}: {choices(method, _REGISTRY)}")
        cls = _REGISTRY[method]
    known = [f.name for f in dataclasses.fields(cls)]
    params = {k: _frozen(v) for k, v in params.items()}
    for name in params:
        if name not in known:
            raise BadParameter(f"{cls.name} has no parameter {name!r}: {choices(name, known)}")
    if isinstance(method, Method):
        return dataclasses.replace(method, **params)
    return cls(**cls.complete(params))
