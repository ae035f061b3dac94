"""What tuning measured on a model, as a file that can be shared.

The file holds curves, from which settings for any target follow. It is plain JSON with a version,
and says what the curves were measured on: for another model or size they are refused, with the
reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffpatch.checking import file_path
from diffpatch.errors import BadParameter
from diffpatch.files import read_text, write_text
from diffpatch.targets.curves import Point

VERSION = 1
MOST_BYTES = 64 * 2**20  # of a file: curves of the largest models take a few MB
MOST_UNITS = 2**20
REACH = 2.0  # factor on the number of tokens within which curves are carried to another grid

LONGEST = 20_000  # letters of a prompt; structured captions take thousands

Text = Annotated[str, Field(max_length=4000)]
Prompt = Annotated[str, Field(max_length=LONGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=1e-6, le=1e9)]  # so that no quotient of two is nothing
Decibels = Annotated[float, Field(ge=-200, le=200)]
Unit = Annotated[str, Field(pattern=r"^\w{1,200}\.\d{1,6}\.\d{1,6}$")]


class _Part(BaseModel):
    """A part of the file: fixed once read; what is missing, unknown or not finite is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MeasuredOn(_Part):
    """What the curves were measured on.

    Attributes:
        model: fingerprint of the weights, as `fingerprint` makes it.
        transformers: name in the pipeline -> (class, layers, heads).
        grid: (num_frames, height, width) in tokens, and tokens of text.
        kind: "video" or "image".
        tile: most tokens in a tile.
        pool: tokens that one virtual token stands for.
        steps: denoising steps of the runs.
        dense_steps: first steps that stay dense, as a fraction of the run.
        dtype: dtype of the weights, such as "bfloat16".
        prompts: prompts of the runs.
        seeds: seeds of the noise of the runs.
        versions: package -> version.
        time: time of the measurement, in ISO 8601.
    """

    model: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    transformers: dict[Text, tuple[Text, int, int]]
    grid: tuple[int, int, int, int]
    kind: Literal["video", "image"]
    tile: Annotated[int, Field(ge=1, le=4096)]
    pool: Annotated[int, Field(ge=1, le=4096)]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    dense_steps: Fraction
    dtype: Text
    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=10_000)]
    seeds: Annotated[list[int], Field(min_length=1, max_length=10_000)]
    versions: dict[Text, Text]
    time: Text


class Rendered(_Part):
    """A prompt rendered dense and with one choice: the predicted error and the measured result.

    Attributes:
        prompt: text of the prompt.
        kept: fraction of all pairs of the run that was computed.
        error: mean error that the curves predict.
        psnr: measured PSNR to the dense result, in dB.
        seconds: time of the denoising.
        dense_seconds: time of the dense denoising in the same process.
    """

    prompt: Prompt
    kept: Fraction
    error: Annotated[float, Field(ge=0)]
    psnr: Decibels
    seconds: Seconds
    dense_seconds: Seconds


class Measured(_Part):
    """One rendered run of the front: what was applied to the model, and the measured result.

    Attributes:
        prompt: text of the prompt.
        sparse: kept fraction of sparse calls, divided among the heads by the curves; 1 leaves all
            attention dense.
        dense_steps: first steps that stay dense, as a fraction of the run.
        cache: threshold of the step cache; None without a cache.
        hold: tolerance within which steps are held; None if none are.
        kept: fraction of the pairs that was computed, over the calls that were made.
        calls: attention calls that were made, as a fraction of those of a dense run.
        psnr: PSNR to the dense result, in dB.
        seconds: time of the denoising.
        dense_seconds: time of the dense denoising in the same process.
    """

    prompt: Prompt
    sparse: Share
    dense_steps: Fraction
    cache: Positive | None
    hold: Positive | None = None
    kept: Fraction
    calls: Fraction
    psnr: Decibels
    seconds: Seconds
    dense_seconds: Seconds


class Checked(_Part):
    """A prompt that was not used for tuning, rendered with the settings chosen for a target.

    Attributes:
        prompt: text of the prompt.
        target: the target, as a text.
        predicted: predicted PSNR, in dB; None if there was no prediction.
        psnr: measured PSNR, in dB.
        predicted_speedup: predicted speedup of the denoising; None if there was no prediction.
        seconds: time of the denoising.
        dense_seconds: time of the dense denoising in the same process.
    """

    prompt: Prompt
    target: Text
    predicted: Decibels | None
    psnr: Decibels
    predicted_speedup: float | None
    seconds: Seconds
    dense_seconds: Seconds


class Settings(_Part):
    """What `tune` measured on a model, for ``patch(pipe, settings=…, target=…)``.

    Attributes:
        format: the mark of such a file.
        version: version of the format.
        measured_on: the model, sizes and prompts that the curves hold for.
        objective: which error the curves hold.
        curves: "transformer.layer.head" -> rule -> [[kept, error], …].
        rendered: rendered pairs, from which PSNR and time are predicted.
        front: rendered runs with sparse attention, with a step cache, with held steps and with two
            of them; targets in dB and speedups are chosen from them.
        steps: denoising steps of the runs of the front; None if that is not known.
        checked: other prompts, rendered with the settings chosen for a target.
        floor: PSNR of dense against dense with another kernel, in dB; no target can be higher.
    """

    format: Literal["diffpatch settings"] = "diffpatch settings"
    version: Literal[1] = 1
    measured_on: MeasuredOn
    objective: Literal["relative L1 error of a head's output"] = (
        "relative L1 error of a head's output"
    )
    curves: Annotated[
        dict[Unit, dict[Text, list[tuple[Fraction, Annotated[float, Field(ge=0)]]]]],
        Field(min_length=1, max_length=MOST_UNITS),
    ]
    rendered: Annotated[list[Rendered], Field(max_length=100_000)] = []
    front: Annotated[list[Measured], Field(max_length=100_000)] = []
    steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    checked: Annotated[list[Checked], Field(max_length=100_000)] = []
    floor: Decibels | None = None

    @model_validator(mode="after")
    def _has_every_head(self) -> Settings:
        heads: dict[str, set[int]] = {}
        for unit in self.curves:
            layer, _, head = unit.rpartition(".")
            heads.setdefault(layer, set()).add(int(head))
        for layer, found in heads.items():
            if found != set(range(len(found))):
                raise ValueError(f"{layer} lacks curves of some heads")
        return self

    def points(self) -> dict[str, list[Point]]:
        """Unit -> all points of its curves, and the dense point."""
        dense = Point(1.0, 0.0, "dense")
        return {
            unit: [*(Point(k, e, rule) for rule, curve in rules.items() for k, e in curve), dense]
            for unit, rules in self.curves.items()
        }

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            BadParameter: the path is empty or that of a folder.
        """
        write_text(file_path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Settings:
        """Read and check a file.

        Raises:
            BadParameter: the file is missing, too large, damaged, of another format or of a later
                version; one sentence says which.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MOST_BYTES:
                raise BadParameter(f"settings {path}: larger than {MOST_BYTES >> 20} MB, not ours")
            text = read_text(path)
        except FileNotFoundError:
            raise BadParameter(
                f"settings {path}: there is no such file; `diffpatch tune -o {path}` writes one"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadParameter(f"settings {path}: cannot be read as text ({error})") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str = "settings") -> Settings:
        """The same from the text of a file; errors call the file `name`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise BadParameter(f"settings {name}: not JSON; was it cut off? Tune again") from None
        if not isinstance(data, dict) or data.get("format") != "diffpatch settings":
            raise BadParameter(f"settings {name}: not a file that `diffpatch tune` wrote")
        if data.get("version") != VERSION:
            raise BadParameter(
                f"settings {name}: version {data.get('version')!r}, and this diffpatch reads"
                f" {VERSION}: update diffpatch, or tune again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))[:200]
            raise BadParameter(
                f"settings {name}: {where}: {first['msg'].lower()}; tune again"
            ) from None

    def check_model(self, models: Mapping[str, torch.nn.Module]) -> None:
        """Refuse a model that the curves were not measured on.

        Args:
            models: the transformers of a pipeline, by name.

        Raises:
            BadParameter: the classes or the weights of the transformers differ.
        """
        own = {name: cls for name, (cls, _, _) in self.measured_on.transformers.items()}
        here = {name: type(model).__name__ for name, model in models.items()}
        if own != here:
            raise BadParameter(
                f"settings are of {_described(own)}, and this model has {_described(here)}: tune"
                " it, or take its own settings"
            )
        found = fingerprint(models)
        if self.measured_on.model != found:
            raise BadParameter(
                f"settings are of other weights (fingerprint {self.measured_on.model}, this model"
                f" {found}): tune this model as it is, or load the weights that they were made for,"
                " in bfloat16 or float32 and without a LoRA, fused or quantised layers"
            )

    def check_grid(self, grid: tuple[int, int, int, int]) -> str | None:
        """Refuse a grid that is too different from the one the curves were measured on.

        Returns:
            None for the measured grid, else a remark for the report.

        Raises:
            BadParameter: one grid is a video and the other an image, or their numbers of tokens
                differ by more than a factor of 2.
        """
        own = self.measured_on.grid
        if grid[:3] == own[:3]:  # as much text as there is; it is kept whole
            return None
        here, there = (f * h * w for f, h, w, _ in (grid, own))
        ratio = here / there
        if (grid[0] == 1) != (own[0] == 1) or not 1 / REACH <= ratio <= REACH:
            raise BadParameter(
                f"settings were measured on {_size(own)} tokens, and this run has {_size(grid)}:"
                " tune at this size"
            )
        return f"curves of {_size(own)} tokens, carried to {_size(grid)}"


def check_lengths(prompts: Sequence[str]) -> None:
    """Refuse prompts that no file would hold, before anything is measured with them.

    Raises:
        BadParameter: one is too long.
    """
    for prompt in prompts:
        if len(prompt) > LONGEST:
            raise BadParameter(
                f"prompts: {prompt[:40]!r}… has {len(prompt):,} letters, and settings hold at most"
                f" {LONGEST:,}: shorten it"
            )


def _described(transformers: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {cls}" for name, cls in transformers.items())


def _size(grid: tuple[int, int, int, int]) -> str:
    return "×".join(map(str, grid[:3])) + (f" + {grid[3]}" if grid[3] else "")


def fingerprint(transformers: Mapping[str, torch.nn.Module]) -> str:
    """16 hex digits that name a model's weights, without reading all of them.

    It depends on the names, the shapes and a few values of all parameters, so a merged LoRA or
    another checkpoint of the same shape counts as another model. So does a model with a LoRA, with
    fused or quantised layers, or in float16, which rounds the smallest weights. It does not depend
    on device or offload, nor on whether weights are bfloat16 or float32.
    """
    digest = hashlib.sha256()
    for name in sorted(transformers):
        digest.update(f"{name}:{type(transformers[name]).__name__}\n".encode())
        for path, parameter in sorted(transformers[name].named_parameters()):
            digest.update(f"{path}{tuple(parameter.shape)}".encode())
            value = _stored(transformers[name], path, parameter)
            if value.device.type != "meta" and value.numel():
                every = max(1, value.numel() // 4)
                some = value.detach().flatten()[::every][:4]
                digest.update(some.bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored(model: torch.nn.Module, path: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter; where accelerate offloads parts of a model, what it keeps of it."""
    if parameter.device.type != "meta":
        return parameter
    owner, _, name = path.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            found: torch.Tensor = kept[name]
            return found
    return parameter
