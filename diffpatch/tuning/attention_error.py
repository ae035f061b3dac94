"""How far every attention call of a patched run is from the dense answer."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffpatch import showing
from diffpatch.errors import DiffpatchError, NotPatched
from diffpatch.patching.api import named_owners

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffpatch.patching.patch import Observer, SparseCall


MOST_TOKENS = 1024  # of a layer, whose outputs are held until the other branches come


@dataclass(frozen=True, order=True)
class Where:
    """One attention layer in one forward of a run."""

    transformer: str
    layer: int
    step: int
    branch: int


class AttentionErrors:
    """Relative L1 errors, Σ|O − O_dense| / Σ|O_dense|, of every sparse attention call.

    Calls at the same place (several runs, or samples of a batch that a model attends one by one)
    count as one. Calls that ran dense are not in it. Sums stay on the device until they are read.
    """

    def __init__(self) -> None:
        self._sums: defaultdict[Where, list[torch.Tensor]] = defaultdict(list)
        self._first: dict[tuple[str, int], tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._apart: list[torch.Tensor] = []
        self._slopes: list[torch.Tensor] = []

    def add(self, where: Where, out: torch.Tensor, dense: torch.Tensor) -> None:
        """One call: its output and the dense one, of the same shape."""
        exact = dense.float()
        self._sums[where].append(
            torch.stack([(out.float() - exact).abs().sum(), exact.abs().sum()])
        )
        self._compare_branches(where, out, exact)
        found, wanted = (x - x.mean(1, keepdim=True) for x in (out.float(), exact))
        self._slopes.append(torch.stack([(found * wanted).sum(), wanted.square().sum()]))

    def _compare_branches(self, where: Where, out: torch.Tensor, exact: torch.Tensor) -> None:
        """Against the first branch of the step, whose outputs wait for the others; a sample of the
        tokens is enough and fits in memory for every layer."""
        some = slice(None, None, -(-out.shape[1] // MOST_TOKENS))
        wrong, exact = out[:, some].float() - exact[:, some], exact[:, some].abs().sum()
        place = where.transformer, where.layer
        if where.branch == 0:
            self._first[place] = where.step, wrong, exact
            return
        step, first, size = self._first.get(place, (-1, wrong, exact))
        if step == where.step and first.shape == wrong.shape:
            self._apart.append(2 * (wrong - first).abs().sum() / (exact + size))

    def _relative(self, key: Callable[[Where], Any]) -> dict[Any, float]:
        groups: defaultdict[Any, list[torch.Tensor]] = defaultdict(list)
        for where in sorted(self._sums):
            wrong, all_ = torch.stack(self._sums[where]).double().cpu().sum(0)
            groups[key(where)].append(wrong / all_ if all_ else wrong)
        return {name: float(torch.stack(group).mean()) for name, group in groups.items()}

    @property
    def mean(self) -> float:
        """Mean over all calls; 0.0 if none was sparse."""
        return self._relative(lambda where: None).get(None, 0.0)

    @property
    def per_call(self) -> dict[Where, float]:
        """One error for every (transformer, layer, step, branch)."""
        return self._relative(lambda where: where)

    @property
    def per_layer(self) -> dict[str, float]:
        """Mean error of every layer, named as in `Report.kept_per_layer`."""
        return self._relative(lambda where: f"{where.transformer}.{where.layer}")

    @property
    def per_step(self) -> dict[int, float]:
        """Mean error of every denoising step that had sparse calls."""
        return dict(sorted(self._relative(lambda where: where.step).items()))

    @property
    def per_branch(self) -> dict[int, float]:
        """Mean error of every guidance branch."""
        return dict(sorted(self._relative(lambda where: where.branch).items()))

    @property
    def difference(self) -> float | None:
        """How far the errors of two branches are apart, relative to the mean of their outputs.

        Guidance multiplies the difference of the branches by its scale, and with it what they do
        not get wrong alike: 0 if their errors are the same. None without a second branch.
        """
        return float(torch.stack(self._apart).double().mean()) if self._apart else None

    @property
    def slope(self) -> float:
        """How much of what differs from token to token is left: 1 where errors are only noise.

        The regression of the outputs, less their mean over the tokens, on the dense ones. Below 1
        an attention is smoother than dense, in every layer and step alike, so that it adds up where
        noise of the same size does not. Virtual tokens do that: they miss s·Cov(v, k)·q of a piece.
        """
        if not self._slopes:
            return 1.0
        both, own = torch.stack(self._slopes).double().unbind(1)
        return float((both[own > 0] / own[own > 0]).mean())

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "mean": self.mean,
            "per_layer": self.per_layer,
            "per_branch": {str(branch): error for branch, error in self.per_branch.items()},
            "difference": self.difference,
            "slope": self.slope,
            "per_step": {str(step): error for step, error in self.per_step.items()},
            "calls": [vars(where) | {"error": e} for where, e in self.per_call.items()],
        }

    @property
    def map(self) -> list[list[float | None]]:
        """Mean error by step and, in each, by layer; None where no call was sparse."""
        found = self._relative(lambda where: (where.step, where.transformer, where.layer))
        steps, layers = sorted({k[0] for k in found}), sorted({k[1:] for k in found})
        return [[found.get((step, *layer)) for layer in layers] for step in steps]

    def __repr__(self) -> str:
        return f"AttentionErrors({str(self).removeprefix('attention error').strip(' :')})"

    def _repr_html_(self) -> str:
        shown = showing.table_html(str(self), [])
        if not self._sums:
            return shown
        most = max(v for row in self.map for v in row if v is not None) or 1.0
        caption = (
            f"error by step (down, from {min(self.per_step)}) and layer (to the right): bright is"
            f" {most:.1%}, dark 0"
        )
        return shown + showing.figure_html(showing.heat_picture(self.map, most), caption)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The error in every step and layer.

        Args:
            ax: where to; None makes a figure.

        Raises:
            DiffpatchError: no call was sparse, or matplotlib is not installed.
        """
        if not self._sums:
            raise DiffpatchError(
                "there is nothing to plot: no call was sparse; run the patched pipeline inside of"
                " the `with` block"
            )
        words = ("step", "layer", "relative L1 to dense")
        return showing.heat(ax, self.map, str(self), words, rows=list(self.per_step))

    def __str__(self) -> str:
        if not self._sums:
            return "attention error: no sparse call"
        layer, most = max(self.per_layer.items(), key=lambda item: item[1])
        return (
            f"attention error {self.mean:.2%} (relative L1 to dense, mean of {len(self._sums)}"
            f" calls; the most in {layer}: {most:.2%})"
        )


@contextlib.contextmanager
def attention_error(target: Any) -> Iterator[AttentionErrors]:
    """Measure every sparse attention call of a patched target against dense attention::

        with diffpatch.attention_error(pipe) as errors:
            pipe("a red fox runs through snow")
        print(errors.mean, errors.per_layer, errors.per_step)

    Dense attention gets the same q, k and v, so that an error does not include what earlier layers
    and steps did. It is computed besides, which costs more than a dense run; outputs stay the same.
    Of a pipeline its own runs count, and those of loops that stand in no pipeline's call, but not
    what other pipelines do with the same transformers at that time; of a transformer all count.

    Raises:
        NotPatched: the target carries no patch.
    """
    from diffpatch import internals  # imports diffusers, which takes seconds

    found = named_owners(target)
    if not found:
        raise NotPatched(f"{type(target).__name__} is not patched: call diffpatch.patch(...) first")
    errors = AttentionErrors()

    def observer(name: str | None) -> Observer:
        def observe(call: SparseCall) -> None:
            if internals.is_pipeline(target) and call.run.pipeline not in (None, target):
                return
            transformer, *rest = call.place
            where = Where(name or transformer, *rest)
            errors.add(where, call.out.detach(), call.dense().detach())

        return observe

    patches = {id(owner.patch): (name, owner.patch) for name, owner in found.items()}
    # Transformers patched one by one do not know what they are called in the target.
    with contextlib.ExitStack() as stack:
        for name, patch in patches.values():
            observe = observer(name if len(patches) > 1 else None)
            stack.enter_context(patch.observed(observe))
        yield errors
