"""A sweep as its YAML file describes it, checked to the last key before anything runs."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import diffpatch
from diffpatch.errors import BadParameter, choices
from diffpatch.kernels.block_sparse.backends import BACKENDS
from diffpatch.methods.registry import parameter_types
from diffpatch.pipelines.running.loading import DTYPES, OFFLOADS
from diffpatch.targets.choice import choose_for
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target

SCHEDULE_KEYS = ("dense_steps", "dense_layers", "dense_last_steps")
METHOD_KEYS = ("method", "set", "vary", "backend", "kept", "cache", *SCHEDULE_KEYS)
TUNED_KEYS = ("settings", "target", "backend")
TUNED = "tuned"  # the name of what settings choose
SIZE_KEYS = ("height", "width", "num_frames")
FLOORS = ("kernel", "seed")
BARS = ("psnr", "ssim", "caption_accuracy", "clip_score")  # of a verdict; higher is better
NETWORKS = ("clip", "features", "lpips")
RESERVED = {"prompt", "prompts", "generator", "output_type", "callback_on_step_end", "image"}


class BadSweep(BadParameter):
    """The description of a sweep cannot work; the message names the key."""


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
            return f"{self.parameters['target']} ({Path(self.parameters['settings']).name})"
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
            `diffpatch.eval.quality.load_tools` takes them; empty for those that are shipped.
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


KEYS = (*SweepSpec.__dataclass_fields__, "prompt_file")


def read_spec(path: Path) -> SweepSpec:
    """Read and check a sweep.

    Raises:
        BadSweep: a key or value cannot work; one line that names it.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Strict)
    except OSError:
        raise BadSweep(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadSweep(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    return check_spec(data, path.parent)


def check_spec(data: Any, folder: Path) -> SweepSpec:
    """A sweep from what its YAML file holds; file names in it are relative to `folder`."""
    data = _mapping(data, "the sweep", KEYS)
    if not data.get("methods"):
        raise BadSweep("methods: name at least one; `diffpatch methods` lists them")
    error = data.get("attention_error", 0)
    floors = _strings(data.get("noise_floor", list(FLOORS)), "noise_floor", FLOORS)
    prompts = _prompts(data, folder)
    return SweepSpec(
        title=_typed(data.get("title", "Sweep"), "title", str),
        model=_strings(data.get("model", "demo"), "model"),
        dtype=_choice(data.get("dtype", "auto"), "dtype", ("auto", *DTYPES)),
        offload=_choice(data.get("offload", "none"), "offload", OFFLOADS),
        vae_tiling=_typed(data.get("vae_tiling", False), "vae_tiling", bool),
        prompts=prompts,
        seeds=_numbers(data.get("seeds", 0), "seeds", int, 0),
        seeds_in_turn=_typed(data.get("seeds_in_turn", False), "seeds_in_turn", bool),
        call=_call(data.get("call", {})),
        sizes=_sizes(data.get("sizes", {})),
        steps=_numbers(data["steps"], "steps", int, 1) if "steps" in data else (None,),
        schedules=_schedules(data.get("schedules", {})),
        methods=_methods(data["methods"], folder),
        kept=_kept(data.get("kept", [])),
        noise_floor=floors,
        attention_error=len(prompts) if error is True else _count(error or 0, "attention_error"),
        dense_every=_count(data.get("dense_every", 8), "dense_every"),
        bar=_bar(data.get("bar", {"psnr": 25})),
        details=_typed(data.get("details", False), "details", bool),
        networks=_networks(data.get("networks", {}), folder),
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


def _mapping(value: Any, where: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadSweep(f"{where}: {value!r} must be a mapping of names to values")
    for key in value:
        if known is not None and key not in known:
            raise BadSweep(f"{where}: unknown key {key!r}: {choices(key, known)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    """A list, or one value as a list of one."""
    found = value if isinstance(value, list) else [value]
    if not found:
        raise BadSweep(f"{where}: the list is empty")
    for item in found:
        if found.count(item) > 1:
            raise BadSweep(f"{where}: {item!r} stands in it twice")
    return found


def _typed(value: Any, where: str, kind: type[Any]) -> Any:
    if not fits(value, kind):
        noun = {str: "a text", bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise BadSweep(f"{where}: {value!r} must be {noun}")
    return value


def _choice(value: Any, where: str, known: Iterable[str]) -> str:
    if value not in known:
        raise BadSweep(f"{where}: {value!r}: {choices(str(value), known)}")
    return str(value)


def _strings(value: Any, where: str, known: Iterable[str] | None = None) -> tuple[str, ...]:
    if value == [] and known is not None:
        return ()
    found = _list(value, where)
    if known is not None:
        return tuple(_choice(item, where, known) for item in found)
    return tuple(_typed(item, where, str) for item in found)


def _numbers(value: Any, where: str, kind: type[Any], least: float) -> tuple[Any, ...]:
    found = tuple(_typed(item, where, kind) for item in _list(value, where))
    for item in found:
        if item < least:
            raise BadSweep(f"{where}: {item!r} must be at least {least}")
    return found


def _count(value: Any, where: str) -> int:
    return int(_numbers(value, where, int, 0)[0])


def _prompts(data: dict[str, Any], folder: Path) -> tuple[Prompt, ...]:
    found = _list(data["prompts"], "prompts") if "prompts" in data else []
    if "prompt_file" in data:
        path = folder / _typed(data["prompt_file"], "prompt_file", str)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise BadSweep(f"prompt_file: {path} is no text file in UTF-8") from None
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    prompts = tuple(dict.fromkeys(_prompt(item, folder) for item in found))
    if not prompts:
        raise BadSweep("prompts: there is none; list some, or name a prompt_file")
    if len({prompt.image is None for prompt in prompts}) > 1:
        raise BadSweep("prompts: either all or none of them need an image")
    return prompts


def _prompt(item: Any, folder: Path) -> Prompt:
    if isinstance(item, str):
        return Prompt(item)
    item = _mapping(item, "prompts", ("prompt", "image"))
    image = folder / _typed(item.get("image"), "prompts: image", str)
    if not image.is_file():
        raise BadSweep(f"prompts: there is no image {image}")
    return Prompt(_typed(item.get("prompt", ""), "prompts: prompt", str), str(image))


def _call(value: Any) -> dict[str, Any]:
    call = _mapping(value, "call")
    own = {"num_inference_steps": "steps", **dict.fromkeys(SIZE_KEYS, "sizes")}
    for key in call:
        if key in RESERVED:
            raise BadSweep(f"call: {key} is set by the sweep itself; drop it")
        if key in own:
            raise BadSweep(f"call: {key} belongs under {own[key]}, which may hold several")
    return call


def _sizes(value: Any) -> tuple[dict[str, int], ...]:
    sizes = tuple(_mapping(item, "sizes", SIZE_KEYS) for item in _list(value, "sizes"))
    for size in sizes:
        for key, number in size.items():
            _numbers(number, f"sizes: {key}", int, 1)
    return sizes


def _schedules(value: Any) -> tuple[dict[str, Any], ...]:
    items = [_mapping(item, "schedules", SCHEDULE_KEYS) for item in _list(value, "schedules")]
    return tuple(_schedule(item, "schedules") for item in items)


def _schedule(options: dict[str, Any], where: str) -> dict[str, Any]:
    for key in SCHEDULE_KEYS:
        value = options.get(key, 0)
        layers = key == "dense_layers" and isinstance(value, list)
        numbers = value if layers else [value]
        if not all(fits(n, int) or (fits(n, float) and not layers and n <= 1) for n in numbers):
            raise BadSweep(f"{where}: {key}={value!r} must be a count, or a fraction up to 1.0")
        if any(n < 0 for n in numbers):
            raise BadSweep(f"{where}: {key}={value!r} must not be negative")
    return options


def _kept(value: Any) -> tuple[float, ...]:
    found = _numbers(value, "kept", float, 0) if value != [] else ()
    for wanted in found:
        if not 0 < wanted < 1:
            raise BadSweep(f"kept: {wanted!r} must be between 0 and 1")
    return tuple(float(wanted) for wanted in found)


def _bar(value: Any) -> dict[str, float]:
    bar = _mapping(value, "bar", BARS)
    for key, number in bar.items():
        _typed(number, f"bar: {key}", float)
    return bar


def _networks(value: Any, folder: Path) -> dict[str, str]:
    found = {}
    for key, name in _mapping(value, "networks", NETWORKS).items():
        path = folder / _typed(name, f"networks: {key}", str)
        found[key] = str(path) if path.exists() else name
    return found


def _methods(value: Any, folder: Path) -> tuple[MethodSpec, ...]:
    found: list[MethodSpec] = []
    for item in _list(value, "methods"):
        if isinstance(item, dict) and "settings" in item:
            found += _tuned(item, folder)
        else:
            found += _method({"method": item} if isinstance(item, str) else item)
    for method in found:
        if found.count(method) > 1:
            raise BadSweep(f"methods: {method.label} stands in it twice")
    return tuple(found)


def _tuned(item: dict[str, Any], folder: Path) -> list[MethodSpec]:
    """What settings choose, an entry for each target."""
    item = _mapping(item, "methods: settings", TUNED_KEYS)
    path = folder / _typed(item["settings"], "methods: settings", str)
    backend = {}
    if "backend" in item:
        backend = {"backend": _choice(item["backend"], "methods: settings: backend", BACKENDS)}
    found = []
    for target in _strings(item.get("target", []), "methods: settings: target"):
        try:
            choose_for(Settings.load(path), Target.parse(target))
        except BadParameter as error:
            raise BadSweep(f"methods: {error}") from None
        given = {"settings": str(path), "target": target}
        found.append(MethodSpec(TUNED, given, backend, kept=()))
    return found


def _method(item: Any) -> list[MethodSpec]:
    """The entries that one item stands for: one for every combination of what it varies."""
    item = _mapping(item, "methods", METHOD_KEYS)
    name = _typed(item.get("method"), "methods: method", str)
    known = diffpatch.list_methods()
    for part in name.split("+"):
        _choice(part, "methods", known)
    cache = _cache(item["cache"], name) if "cache" in item else (None,)
    if name == "dense" and cache == (None,):
        raise BadSweep("methods: dense is rendered anyway, for every prompt; drop it")
    hints = parameter_types(name)
    fixed = _mapping(item.get("set", {}), f"methods: {name}: set", hints)
    varied = _mapping(item.get("vary", {}), f"methods: {name}: vary", hints)
    axes = [_list(values, f"methods: {name}: vary: {key}") for key, values in varied.items()]
    options = _schedule({k: v for k, v in item.items() if k in SCHEDULE_KEYS}, f"methods: {name}")
    if "backend" in item:
        options["backend"] = _choice(item["backend"], f"methods: {name}: backend", BACKENDS)
    kept = _kept(item["kept"]) if "kept" in item else None
    found = []
    for threshold, *values in itertools.product(cache, *axes):
        parameters = {**fixed, **dict(zip(varied, values, strict=True))}
        try:
            diffpatch.make_method(name, **parameters)
        except BadParameter as error:
            raise BadSweep(f"methods: {error}") from None
        beside = {} if threshold is None else {"cache": threshold}
        found.append(MethodSpec(name, parameters, options | beside, kept))
    return found


def _cache(value: Any, name: str) -> tuple[float, ...]:
    """Thresholds of the step cache, one or several."""
    return _numbers(value, f"methods: {name}: cache", float, 1e-6)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML is one of a type; lists stand for tuples."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else options
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin is typing.Literal:
        return value in options
    if hint in (int, float):
        allowed: Any = int if hint is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool) and abs(value) < 1e18
    if hint in (None, type(None)):
        return value is None
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
