"""Teaching linear attention what dense attention gives, on a model's own samples.

Two stages. First every layer for itself, from the queries, keys and values that the dense model
gives it, so that nothing is back-propagated through the network; then all layers together, against
the dense model's prediction on the trajectories of its own samples. The model's weights never
change: what is learned is beside them (`diffpatch.methods.learned.files`), and unpatching leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpatch.errors import BadParameter, UnknownFamily
from diffpatch.kernels.dense import attend_dense
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.learned import files as adapter
from diffpatch.methods.linear import distilled
from diffpatch.methods.linear.method import Linear
from diffpatch.methods.wrapper import Wrapper
from diffpatch.patching.api import patched
from diffpatch.pipelines.families.table import attention_modules, family_of

EVERYWHERE: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0}  # what is taught and tested
Progress = Callable[[str, int, float], None]  # gets the stage, the step, and its loss


@dataclass(frozen=True, eq=False)
class RecordedForward:
    """One call of a transformer: its arguments and the prediction it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: torch.Tensor


@contextlib.contextmanager
def recording(transformer: Any) -> Iterator[list[RecordedForward]]:
    """Collect the forwards that a transformer makes inside, to learn from and to be tested on."""
    forwards: list[RecordedForward] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        forwards.append(RecordedForward(_kept(args), _kept(kwargs), _kept(output[0])))

    hook = transformer.register_forward_hook(note, with_kwargs=True)
    try:
        yield forwards
    finally:
        hook.remove()


def _kept(value: Any) -> Any:
    """Copies of all tensors: pipelines write into theirs."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(_kept(v) for v in value)
    return {k: _kept(v) for k, v in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class _Watch(Wrapper):
    """Dense attention that keeps what went in and came out of every call."""

    name = "watch"
    only_skips = False

    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionCall, torch.Tensor]] = (
        dataclasses.field(default_factory=list, compare=False)
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        out = attend_dense(q, k, v, call.scale, call.key_mask)
        self.seen.append((q, k, v, call, out))
        return Attended(out, 1.0, "dense")


@dataclass(frozen=True)
class _Taught(Wrapper):
    """A method with what the layers have learned so far, in their order."""

    name = "taught"
    only_skips = False

    learned: tuple[dict[str, torch.Tensor], ...] = dataclasses.field(default=(), compare=False)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        learned = self.learned[call.layer]
        return self.over.attend(q, k, v, dataclasses.replace(call, learned=learned))


class Distiller:
    """Learned parameters for every layer of one transformer, and how they are trained.

    A step of the first stage holds q, k, v and the output of all layers for one forward: for a 14 B
    model learn from small samples, since nothing that is learned depends on the grid.

    Args:
        transformer: a transformer of a known family, not patched; it is used as it is and left so.
        method: the form to teach, such as ``Linear(far="hedgehog", allow_untrained=True)``.
        sample: a forward of it, for the sizes of its heads.
        rank: of the corrections of q, k, v and the output, for the second stage; 0 for none.

    Raises:
        BadParameter: the method sees everything in a sample as small as this one.
    """

    def __init__(
        self, transformer: Any, method: Linear, sample: RecordedForward, rank: int = 8
    ) -> None:
        self.transformer, self.method = transformer, method
        family = family_of(transformer)
        if family is None:
            raise UnknownFamily(
                f"{type(transformer).__name__} is not a transformer of a known family"
            )
        paths = [path for path, _ in attention_modules(transformer, family)]
        calls = self._watch(sample)
        if len(calls) != len(paths):
            raise BadParameter(
                f"{method.name}: {len(paths) - len(calls)} of {len(paths)} layers of the sample see"
                f" everything exactly with near={method.near}, kept={method.kept}, so that"
                " there is nothing to learn: lower them, or sample something larger"
            )
        features = method.far not in ("pool", "state")
        self.learned = {
            path: distilled.initial(
                q.shape[2], k.shape[2], q.shape[3], features=features, rank=rank, seed=i
            )
            for i, (path, (q, k, *_)) in enumerate(zip(paths, calls, strict=True))
        }
        for values in self.learned.values():
            values.update({n: x.to(calls[0][0].device) for n, x in values.items()})

    def _watch(self, sample: RecordedForward) -> list[Any]:
        """What the attention of every layer gets and gives in a dense forward."""
        watch = _Watch(self.method)
        with torch.no_grad(), patched(self.transformer, watch, **EVERYWHERE):
            self.transformer(*sample.args, **sample.kwargs)
        return watch.seen

    def layer_errors(self, samples: Sequence[RecordedForward]) -> list[float]:
        """Relative L2 error of every layer's output, each fed with the dense model's tensors."""
        totals = [0.0] * len(self.learned)
        with torch.no_grad():
            for sample in samples:
                for i, loss in enumerate(self._layer_losses(sample)):
                    totals[i] += float(loss) ** 0.5 / len(samples)
        return totals

    def _layer_losses(self, sample: RecordedForward) -> Iterator[torch.Tensor]:
        calls = self._watch(sample)
        for (q, k, v, call, target), learned in zip(calls, self.learned.values(), strict=True):
            out = self.method.attend(q, k, v, dataclasses.replace(call, learned=learned)).out
            yield _relative(out, target)

    def match_layers(
        self, samples: Sequence[RecordedForward], steps: int, rate: float = 1e-2,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """The first stage: gates and feature maps, every layer for itself."""
        chosen = [x for values in self.learned.values() for n, x in values.items()
                  if n in ("gate", "phi_q", "phi_k")]  # fmt: skip
        if not chosen:
            return  # virtual tokens and states have nothing to learn layer by layer

        def backward(sample: RecordedForward) -> float:
            total = 0.0
            for loss in self._layer_losses(sample):
                loss.backward()
                total += float(loss.detach()) / len(self.learned)
            return total

        _descend("layers", chosen, backward, samples, steps, rate, progress)

    def match_predictions(
        self, samples: Sequence[RecordedForward], steps: int, rate: float = 1e-3,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """The second stage: everything, through the whole network."""
        chosen = [x for values in self.learned.values() for x in values.values()]

        def backward(sample: RecordedForward) -> float:
            loss = _relative(self._student(sample), sample.prediction)
            loss.backward()
            return float(loss.detach())

        with self._patched(), _frozen(self.transformer):
            _descend("predictions", chosen, backward, samples, steps, rate, progress)

    def prediction_error(self, samples: Sequence[RecordedForward]) -> float:
        """Mean relative L2 error of the predictions."""
        with torch.no_grad(), self._patched():
            losses = [_relative(self._student(s), s.prediction) for s in samples]
        return sum(float(loss) ** 0.5 for loss in losses) / len(losses)

    def _student(self, sample: RecordedForward) -> torch.Tensor:
        kwargs = {name: _asking(value) for name, value in sample.kwargs.items()}
        prediction: torch.Tensor = self.transformer(*map(_asking, sample.args), **kwargs)[0]
        return prediction

    def _patched(self) -> contextlib.AbstractContextManager[Any]:
        taught = _Taught(self.method, tuple(self.learned.values()))
        return patched(self.transformer, taught, **EVERYWHERE)

    def save(self, path: str | Path, component: str = "transformer") -> None:
        """Write what was learned, for ``diffpatch.patch(pipe, "linear", weights=path)``.

        Into the folder of a pipeline that diffusers saved, too: what is loaded from there brings
        it along, and ``patch(pipe, "linear")`` finds it.
        """
        method = dataclasses.asdict(self.method)
        for name in ("weights", "allow_untrained"):
            del method[name]
        layers = {f"{component}.{layer}": values for layer, values in self.learned.items()}
        adapter.save(path, layers, type(self.transformer).__name__, method)


def _asking(value: Any) -> Any:
    """Inputs that ask for gradients: without one, calls of attention are not differentiated."""
    inputs = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 2
    return value.detach().requires_grad_() if inputs and torch.is_grad_enabled() else value


def _relative(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared relative L2 error."""
    wide = target.float()
    return (out.float() - wide).square().sum() / wide.square().sum()


def _descend(
    stage: str,
    parameters: list[torch.Tensor],
    backward: Callable[[RecordedForward], float],
    samples: Sequence[RecordedForward],
    steps: int,
    rate: float,
    progress: Progress | None,
) -> None:
    """Adam with a cosine from `rate` to a tenth of it, one sample a step."""
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=rate)
    order = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(steps):
            fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = rate * (0.1 + 0.9 * fall)
            optimizer.zero_grad()
            loss = backward(samples[int(torch.randint(len(samples), (), generator=order))])
            optimizer.step()
            if progress is not None:
                progress(stage, step, loss)
    for parameter in parameters:
        parameter.requires_grad_(False)


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients for the weights of a model, for a while."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
