"""A sweep as it is run, and how it is made of what its YAML file holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

import diffpatch
from diffpatch.errors import BadParameter
from diffpatch.eval.sweep.schema import (
    SCHEDULE_KEYS,
    BadSweep,
    MethodEntry,
    PromptEntry,
    SweepFile,
    TunedEntry,
    read,
)
from diffpatch.files import read_prompts, read_text
from diffpatch.targets.choice import choose_for
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target

TUNED = "tuned"  # the name of what settings choose


@dataclass(frozen=True)
class Prompt:
    """What to render: a text, and for image-to-video models the first frame."""

    text: str
    image: str | None = None


@dataclass(frozen=True)
class MethodSpec:
    """One method with its parameters, and what it overrides of schedule, backend, kept."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """The method as people write it: ``radial decay=0.5``."""
        if self.name == TUNED:
            name = f"{self.parameters['target']} ({Path(self.parameters['settings']).name})"
            return " ".join([name, *(f"{key}={value}" for key, value in self.options.items())])
        given = {**self.parameters, **self.options}
        return " ".join([self.name, *(f"{key}={_short(value)}" for key, value in given.items())])


@dataclass(frozen=True)
class SweepSpec:
    """Everything that a sweep varies; each field is a key of the YAML file.

    Attributes:
        title: heads the report.
        model: one or several, as `diffpatch render --model` takes them.
        dtype: of the weights; "auto" as in `render`.
        offload: how weights wait in main memory.
        vae_tiling: whether to decode in tiles.
        prompts: what to render.
        seeds: of the noise.
        seeds_in_turn: whether each prompt takes one of the seeds, in turn, and not all of them.
        call: further arguments of the pipeline's call.
        sizes: axis of height, width and num_frames; an empty mapping is the pipeline's own size.
        steps: axis of denoising steps; None is the pipeline's own number.
        schedules: axis of dense steps and layers.
        methods: what is compared with dense.
        kept: fractions of a whole run that every method is fitted to; empty for none.
        noise_floor: what dense is compared with itself by: another kernel, another seed.
        attention_error: number of prompts for which attention errors are measured, in a second
            pass that is not timed.
        dense_every: dense is timed anew after so many timed runs; 0 never.
        bar: the quality that a method must have to be recommended.
        details: whether the judge's answers stand one by one, beside objects and repetitions.
        networks: folders or files of the networks that judge quality, as
            `diffpatch.eval.quality.scores.load_tools` takes them; empty for those that are shipped.
    """

    title: str
    model: tuple[str, ...]
    dtype: str
    offload: str
    vae_tiling: bool
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    seeds_in_turn: bool
    call: Mapping[str, Any]
    sizes: tuple[Mapping[str, int], ...]
    steps: tuple[int | None, ...]
    schedules: tuple[Mapping[str, Any], ...]
    methods: tuple[MethodSpec, ...]
    kept: tuple[float, ...]
    noise_floor: tuple[str, ...]
    attention_error: int
    dense_every: int
    bar: Mapping[str, float]
    details: bool
    networks: Mapping[str, str]


def read_spec(path: Path) -> SweepSpec:
    """Read and check a sweep.

    Raises:
        BadSweep: a key or value cannot work; one line that names it.
    """
    try:
        data = yaml.load(read_text(path), _Strict)
    except OSError as error:
        if path.is_dir():
            raise BadSweep(
                f"{path} is a folder, not a YAML file: repeat the command that made it to go on,"
                " or add --report-only"
            ) from None
        if path.exists():
            raise BadSweep(f"{path} cannot be read ({error.strerror})") from None
        raise BadSweep(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadSweep(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        raise BadSweep(f"{path}: the file is empty; `diffpatch sweep --help` names its keys")
    return check_spec(data, path.parent)


def check_spec(data: Any, folder: Path) -> SweepSpec:
    """A sweep from what its YAML file holds; file names in it are relative to `folder`.

    Raises:
        BadSweep: a key or value cannot work; one line that names it.
    """
    file = read(data)
    prompts = _prompts(file, folder)
    measured = file.attention_error
    return SweepSpec(
        title=file.title,
        model=tuple(file.model),
        dtype=file.dtype,
        offload=file.offload,
        vae_tiling=file.vae_tiling,
        prompts=prompts,
        seeds=tuple(file.seeds),
        seeds_in_turn=file.seeds_in_turn,
        call=file.call,
        sizes=tuple(dict(cast(Mapping[str, int], size)) for size in file.sizes),
        steps=tuple(file.steps) or (None,),
        schedules=tuple(dict(schedule) for schedule in file.schedules),
        methods=_methods(file.methods, folder),
        kept=tuple(file.kept),
        noise_floor=tuple(file.noise_floor),
        attention_error=len(prompts) if measured is None else measured,
        dense_every=file.dense_every,
        bar=dict(file.bar),  # type: ignore[arg-type]
        details=file.details,
        networks={key: _beside(folder, str(name)) for key, name in file.networks.items()},
    )


class _Strict(yaml.SafeLoader):
    """YAML's safe loader, which takes a key given twice for the mistake that it is."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{key!r} stands twice in the mapping at line {line}")
        return super().construct_mapping(node, deep)


def _beside(folder: Path, name: str) -> str:
    """A file or folder beside the YAML file, or the name as it is."""
    path = folder / name
    return str(path) if path.exists() else name


def _prompts(file: SweepFile, folder: Path) -> tuple[Prompt, ...]:
    found = [_prompt(entry, folder) for entry in file.prompts]
    if file.prompt_file is not None:
        path = folder / file.prompt_file
        try:
            found += [Prompt(prompt) for prompt in read_prompts(path)]
        except (OSError, ValueError):
            raise BadSweep(f"prompt_file: {path} is not a text file in UTF-8") from None
    if not found:
        raise BadSweep("prompts: there is none; list some, or name a prompt_file")
    if len({prompt.image is None for prompt in found}) > 1:
        raise BadSweep("prompts: either all or none of them need an image")
    return tuple(dict.fromkeys(found))


def _prompt(entry: PromptEntry, folder: Path) -> Prompt:
    if "image" not in entry:
        return Prompt(entry["prompt"])
    image = folder / entry["image"]
    if not image.is_file():
        raise BadSweep(f"prompts: there is no image {image}")
    return Prompt(entry.get("prompt", ""), str(image))


def _methods(entries: Iterable[MethodEntry | TunedEntry], folder: Path) -> tuple[MethodSpec, ...]:
    found: list[MethodSpec] = []
    for entry in entries:
        found += _tuned(entry, folder) if "settings" in entry else _varied(entry)  # type: ignore[arg-type]
    for method in found:
        if found.count(method) > 1:
            raise BadSweep(f"methods: {method.label} stands in it twice")
    chosen = [method.label for method in found if method.name == TUNED]
    for label in chosen:
        if chosen.count(label) > 1:  # rows are told apart by their names
            raise BadSweep(f"methods: {label} are two files of one name; rename one")
    return tuple(found)


def _tuned(entry: TunedEntry, folder: Path) -> list[MethodSpec]:
    """What settings choose, once for each target."""
    path = folder / entry["settings"]
    options = {"backend": entry["backend"]} if "backend" in entry else {}
    found = []
    for target in entry["target"]:
        try:
            choose_for(Settings.load(path), Target.parse(target))
        except ValueError as error:
            raise BadSweep(f"methods: {error}") from None
        given = {"settings": str(path), "target": target}
        found.append(MethodSpec(TUNED, given, options, kept=()))
    return found


def _varied(entry: MethodEntry) -> list[MethodSpec]:
    """What one entry stands for: a method for every combination of what it varies."""
    name, varied = entry["method"], entry.get("vary", {})
    options: dict[str, Any] = {k: v for k, v in entry.items() if k in (*SCHEDULE_KEYS, "backend")}
    kept = tuple(entry["kept"]) if "kept" in entry else None
    found = []
    skips = (entry.get("cache", [None]), entry.get("hold", [None]))
    for cache, hold, *values in itertools.product(*skips, *varied.values()):
        parameters = {**entry.get("set", {}), **dict(zip(varied, values, strict=True))}
        try:
            diffpatch.make_method(name, **parameters)
        except BadParameter as error:
            raise BadSweep(f"methods: {error}") from None
        beside = {k: v for k, v in (("cache", cache), ("hold", hold)) if v is not None}
        found.append(MethodSpec(name, parameters, options | beside, kept))
    return found


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
