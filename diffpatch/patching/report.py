"""What a run really did: kept fraction, dense calls and why, fallbacks."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from diffpatch import showing
from diffpatch.errors import DiffpatchError
from diffpatch.patterns.grid import Grid, PackedGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Key = TypeVar("_Key")


@dataclass(eq=False)
class Record:
    """Counts of one run, filled call by call; plain numbers, so that recording costs nothing.

    Whoever reads them while the run goes on, from another thread, takes a `snapshot`.
    """

    calls: int = 0
    pairs: float = 0.0  # query-key pairs of all calls, dense
    kept_pairs: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    by_step: defaultdict[int, list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0, 0.0])
    )
    by_layer: defaultdict[tuple[str, int], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0, 0.0])
    )
    by_place: defaultdict[tuple[int, str, int], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0, 0.0])
    )
    held: set[int] = field(default_factory=set)  # steps that repeated the last result
    waiting: list[tuple[str, int, int, float, torch.Tensor]] = field(default_factory=list)
    sequences: Counter[Grid] = field(default_factory=Counter)  # packed ones, of sparse calls
    guides: int = 0  # forwards beside those of the pipeline (see `diffpatch.patching.swap.guide`)
    state_bytes: int = 0  # the most that was held across steps
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    reading: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(
        self,
        where: str,
        layer: int,
        step: int,
        pairs: float,
        kept: float | torch.Tensor,
        backend: str,
        reason: str | None = None,
        grid: Grid | None = None,
    ) -> None:
        """One attention call of `pairs` query-key pairs, of which `kept` were computed.

        Args:
            where: the transformer.
            layer: of it.
            step: of the run.
            pairs: all of the call.
            kept: fraction of them.
            backend: what computed them.
            reason: why the call was dense, if it was.
            grid: where its tokens stand, if it was sparse.
        """
        with self.lock:
            self.calls += 1
            if isinstance(grid, PackedGrid):
                self.sequences[grid] += 1
            if reason is not None:
                self.reasons[reason] += 1
            self.backends[backend] += 1
            if isinstance(kept, torch.Tensor):  # read if somebody asks: that waits for the device
                self.waiting.append((where, layer, step, pairs, kept))
            else:
                self._count(where, layer, step, pairs, kept)

    def _count(self, where: str, layer: int, step: int, pairs: float, kept: float) -> None:
        self.pairs += pairs
        self.kept_pairs += pairs * kept
        place = self.by_place[(step, where, layer)]
        for bucket in (self.by_step[step], self.by_layer[(where, layer)], place):
            bucket[0] += pairs
            bucket[1] += pairs * kept

    def hold(self, step: int) -> None:
        """A step whose forward was not made."""
        with self.lock:
            self.held.add(step)

    def add_beside(self, where: str, layer: int, step: int, pairs: float) -> None:
        """A dense call of a guide forward, which the pipeline itself did not make."""
        with self.lock:
            self.kept_pairs += pairs
            place = self.by_place[(step, where, layer)]
            for bucket in (self.by_step[step], self.by_layer[(where, layer)], place):
                bucket[1] += pairs

    def snapshot(self) -> Record:
        """The counts as they are now, with those that were still on a device."""
        with self.reading:  # whoever asks meanwhile waits for them, too; calls go on being counted
            with self.lock:
                waiting, self.waiting = self.waiting, []
            read = [(w, layer, step, pairs, float(kept)) for w, layer, step, pairs, kept in waiting]
            with self.lock:
                for where, layer, step, pairs, kept in read:
                    self._count(where, layer, step, pairs, kept)
                return self._copy()

    def _copy(self) -> Record:
        return replace(
            self, lock=threading.Lock(), reading=threading.Lock(), waiting=[],
            notes=list(self.notes), held=set(self.held), reasons=self.reasons.copy(),
            backends=self.backends.copy(), sequences=self.sequences.copy(),
            by_step=_copied(self.by_step), by_layer=_copied(self.by_layer),
            by_place=_copied(self.by_place),
        )  # fmt: skip

    def kept_map(self) -> list[list[float | None]]:
        """Kept fraction by step and, in each, by layer."""
        places = {place: kept / all_ for place, (all_, kept) in self.by_place.items() if all_}
        layers = sorted(self.by_layer)
        return [[places.get((step, *layer)) for layer in layers] for step in sorted(self.by_step)]

    @classmethod
    def joined(cls, records: Mapping[str, Record]) -> Record:
        """One record of several transformers that were patched one by one, by their names."""
        out = cls()
        for name, one in records.items():
            one = one.snapshot()
            out.calls += one.calls
            out.pairs += one.pairs
            out.kept_pairs += one.kept_pairs
            out.reasons += one.reasons
            out.backends += one.backends
            out.sequences += one.sequences
            out.guides += one.guides
            out.held |= one.held
            out.state_bytes += one.state_bytes
            out.notes += one.notes
            out.by_layer |= {(name, layer): both for (_, layer), both in one.by_layer.items()}
            out.by_place |= {(s, name, layer): b for (s, _, layer), b in one.by_place.items()}
            for step, (pairs, kept) in one.by_step.items():
                out.by_step[step][0] += pairs
                out.by_step[step][1] += kept
        return out


def _copied(counts: defaultdict[_Key, list[float]]) -> defaultdict[_Key, list[float]]:
    out: defaultdict[_Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    out.update({key: list(both) for key, both in counts.items()})
    return out


@dataclass(frozen=True)
class Report:
    """The last run of a patched target.

    Attributes:
        method: the method that was asked for, with its parameters.
        kept: fraction of the query-key pairs that was computed, over all patched attention calls,
            dense steps and layers included.
        calls: number of patched attention calls.
        dense_calls: how many of them ran dense.
        reasons: why calls ran dense -> number of calls.
        backends: name of the backend -> number of calls.
        sequences: spans of a packed sequence -> number of sparse calls; empty for other models.
        steps: denoising steps of the run, counted in model evaluations, without held ones.
        layers: number of patched attention layers, over all transformers.
        kept_per_step: kept fraction of every step.
        kept_per_layer: kept fraction of every layer.
        kept_map: by step, kept fraction of every layer; None if the layer did not run in that step,
            as happens with two experts.
        held_steps: steps that repeated the last result of the transformer; they make no calls.
        state_bytes: the most memory held from step to step; it is freed after the last step.
        notes: remarks, such as that the number of the step was unknown.
    """

    method: str
    kept: float
    calls: int
    dense_calls: int
    reasons: dict[str, int]
    backends: dict[str, int]
    steps: int
    layers: int
    kept_per_step: list[float]
    kept_per_layer: dict[str, float]
    kept_map: list[list[float | None]]
    state_bytes: int = 0
    notes: tuple[str, ...] = ()
    held_steps: int = 0
    sequences: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, method: str, layers: int, record: Record, notes: Sequence[str] = ()) -> Report:
        """The report of a record."""
        record = record.snapshot()
        told = [*dict.fromkeys(record.notes), *notes]
        if record.guides:
            told.append(
                f"{record.guides} guide forwards ran dense beside the others: kept has them"
            )
        return cls(
            method=method,
            kept=record.kept_pairs / record.pairs if record.pairs else 1.0,
            calls=record.calls,
            dense_calls=sum(record.reasons.values()),
            reasons=dict(record.reasons),
            backends=dict(record.backends),
            steps=len(record.by_step),
            layers=layers,
            kept_per_step=[
                kept / all_ for _, (all_, kept) in sorted(record.by_step.items()) if all_
            ],
            kept_per_layer={
                f"{where}.{layer}": kept / all_
                for (where, layer), (all_, kept) in sorted(record.by_layer.items())
                if all_
            },
            kept_map=record.kept_map(),
            state_bytes=record.state_bytes,
            notes=tuple(told),
            held_steps=len(record.held - set(record.by_step)),
            sequences={str(grid): count for grid, count in record.sequences.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        if not self.calls:
            return f"Report({self.method}: no run yet)"
        return (
            f"Report({self.method}: {self.kept:.1%} kept, {self.calls} calls of which"
            f" {self.dense_calls} dense, {self.steps} steps × {self.layers} layers)"
        )

    def _repr_html_(self) -> str:
        shown = showing.facts_html(str(self))
        if self.kept_map:
            picture = showing.heat_picture(self.kept_map)
            caption = "kept by step (down) and layer (to the right): bright is dense, grey not run"
            shown += showing.figure_html(picture, caption)
        return shown

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """What was kept in every step and layer.

        Args:
            ax: where to; None makes a figure.

        Raises:
            DiffpatchError: there was no run, or matplotlib is not installed.
        """
        if not self.kept_map:
            raise DiffpatchError("there is nothing to plot: run the pipeline first")
        title = f"{self.kept:.1%} kept, {self.dense_calls} of {self.calls} calls dense"
        figure, ax = showing.heat(ax, self.kept_map, title, ("step", "layer", "kept"))
        ax.images[0].set_clim(0, 1)
        return figure, ax

    def __str__(self) -> str:
        notes = [f"  note      {note}" for note in self.notes]
        if not self.calls:
            return "\n".join([f"{self.method}: no run yet", *notes])
        lines = [
            self.method,
            f"  kept      {self.kept:.1%} of all query-key pairs",
            f"  calls     {self.calls} in {self.steps} steps × {self.layers} layers,"
            f" {self.dense_calls} dense",
        ]
        if self.held_steps:
            lines.append(f"  held      {self.held_steps} more steps repeat the result before them")
        lines += [f"  dense     {count} calls: {why}" for why, count in self.reasons.items()]
        lines += [f"  spans     {grid}: {count} calls" for grid, count in self.sequences.items()]
        lines += [f"  backend   {name}: {count} calls" for name, count in self.backends.items()]
        if self.state_bytes:
            lines.append(f"  state     {self.state_bytes / 2**20:.1f} MiB across steps")
        return "\n".join(lines + notes)
