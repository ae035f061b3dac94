"""The scores and features of many clips: measured one by one, merged in any order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffpatch.eval.quality import scores as quality
from diffpatch.eval.quality.distances import FeatureSet


@dataclass(frozen=True)
class Tally:
    """What is known about some clips; tallies of different clips merge exactly.

    Attributes:
        scores: name of a clip -> its metrics.
        features: their features by the name of the extractor, for set distances.
        missing: name of a clip -> metric -> why it lacks that.
    """

    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    features: Mapping[str, FeatureSet] = field(default_factory=dict)
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def merge(self, *others: Tally) -> Tally:
        """All clips together, the same whoever measured which.

        Raises:
            ValueError: a clip is there twice, or features of other extractors.
        """
        parts = [part for part in (self, *others) if part.scores]
        if not parts:
            return self
        if len(makers := {tuple(part.features) for part in parts}) > 1:
            raise ValueError(f"features of {' and '.join(map(str, makers))} cannot be merged")
        features = {
            maker: own.merge(*(part.features[maker] for part in parts[1:]))
            for maker, own in parts[0].features.items()
        }
        scores: dict[str, Mapping[str, float]] = {}
        missing: dict[str, Mapping[str, str]] = {}
        for part in parts:
            scores |= part.scores
            missing |= part.missing
        return Tally(dict(sorted(scores.items())), features, dict(sorted(missing.items())))

    def means(self) -> dict[str, float]:
        """Every metric's mean over the clips that have it, in the order of names."""
        values: dict[str, list[float]] = {}
        for scores in self.scores.values():
            for metric, value in scores.items():
                values.setdefault(metric, []).append(value)
        return {metric: math.fsum(found) / len(found) for metric, found in values.items()}

    def reasons(self) -> dict[str, str]:
        """Metric -> why clips lack it: the reason of the first, and of how many if not of all."""
        found: dict[str, list[str]] = {}
        for reasons in self.missing.values():
            for metric, why in reasons.items():
                found.setdefault(metric, []).append(why)
        total = len(self.scores)
        return {
            metric: whys[0] + (f" ({len(whys)} of {total} clips)" if len(whys) < total else "")
            for metric, whys in found.items()
        }

    def row(self, name: str, reference: Tally | None = None, **more: Any) -> dict[str, Any]:
        """A line of a result, ready for JSON; with the distances to a reference's features."""
        others = {} if reference is None else reference.features
        sets = {maker: quality.sets(self.features[maker], other) for maker, other in others.items()}
        return {
            "name": name,
            **more,
            "count": len(self.scores),
            "scores": self.means(),
            "sets": sets,
            "items": {key: dict(value) for key, value in self.scores.items()},
        }


def measure(
    name: str,
    frames: Tensor,
    tools: quality.Tools,
    *,
    prompt: str | None = None,
    reference: Tensor | None = None,
) -> Tally:
    """Everything about one clip.

    Args:
        name: of the clip, the same in every set it is compared with.
        frames: (F, 3, H, W) floats in [0, 1].
        tools: from `diffpatch.eval.quality.scores.load_tools`.
        prompt: what it should show.
        reference: the same clip rendered dense.
    """
    scores = {} if reference is None else quality.paired(frames, reference, tools)
    scores |= quality.alone(frames, prompt, tools)
    features = {e.name: FeatureSet({name: e(frames)}, e.name) for e in tools.extractors}
    missing = {name: quality.absent(tools, frames=frames, prompt=prompt)}
    return Tally({name: scores}, features, missing)
