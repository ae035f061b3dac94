"""What may stand in the YAML file of a sweep: strict pydantic models, and their errors in one line.

Wherever a list is asked for, a single value is a list of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NotRequired, TypeVar

from annotated_types import Ge, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

import diffpatch
from diffpatch.checking import SEEDS, Count, Natural, shown
from diffpatch.errors import BadParameter, choices
from diffpatch.kernels.block_sparse.backends import check_backend
from diffpatch.patching.options.schedule import Schedule
from diffpatch.pipelines.running.loading import DTYPES, OFFLOADS

RESERVED = {"prompt", "prompts", "generator", "output_type", "callback_on_step_end", "image"}
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class BadSweep(BadParameter):
    """The description of a sweep cannot work; the message names the key."""


T = TypeVar("T")


def _listed(value: Any) -> Any:
    """A list, or one value as a list of one."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        raise BadSweep("the list is empty")
    return found


def _listed_or_none(value: Any) -> Any:
    return [] if value in ([], ()) else _listed(value)


def _different(found: list[T]) -> list[T]:
    for item in found:
        if found.count(item) > 1:
            raise BadSweep(f"{shown(item)} stands in it twice")
    return found


LISTED, LISTED_OR_NONE = BeforeValidator(_listed), BeforeValidator(_listed_or_none)
DIFFERENT = AfterValidator(_different)


def _one_of(names: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise BadSweep(f"{shown(value)}: {choices(value, names)}")
        return value

    return AfterValidator(check)


def _passing(check: Callable[[Any], Any]) -> AfterValidator:
    """Values that another check lets pass; its errors are the errors here."""

    def validate(value: T) -> T:
        check(value)
        return value

    return AfterValidator(validate)


def _between(value: float) -> float:
    if not 0 < value < 1:
        raise BadSweep(f"{value:g} must be between 0 and 1")
    return value


def _known_method(name: str) -> str:
    known = diffpatch.list_methods()
    for part in name.split("+"):
        if part not in known:
            raise BadSweep(f"{shown(part)}: {choices(part, known)}")
    return name


def _call(call: dict[str, Any]) -> dict[str, Any]:
    own = {"num_inference_steps": "steps", **dict.fromkeys(SIZE_KEYS, "sizes")}
    for key in call:
        if key in RESERVED:
            raise BadSweep(f"{key} is set by the sweep itself; drop it")
        if key in own:
            raise BadSweep(f"{key} belongs under {own[key]}, which may hold several")
    return call


def _texts_as(key: str, value: Any) -> list[Any]:
    """A list of mappings, in which a text stands for a mapping of one key."""
    found = _listed(value)
    _different([item for item in found if isinstance(item, str)])
    return [{key: item} if isinstance(item, str) else item for item in found]


def _keys(entry: Any) -> Iterable[Any]:
    return entry if isinstance(entry, dict) else ()


def _some_methods(value: Any) -> list[Any]:
    if not value:
        raise BadSweep("name at least one; `diffpatch methods` lists them")
    return _texts_as("method", value)


def _prompt_entries(value: Any) -> list[Any]:
    return _texts_as("prompt", value)


@with_config(STRICT)
class Size(TypedDict, total=False):
    """Height and width in pixels, and frames; the pipeline's own where they are left out."""

    height: Count
    width: Count
    num_frames: Count


@with_config(STRICT)
class ScheduleEntry(TypedDict, total=False):
    """Dense steps and layers, as in `patch`."""

    dense_steps: Any
    dense_layers: Any
    dense_last_steps: Any


Backend = Annotated[str, _passing(check_backend)]
KeptFraction = Annotated[float, AfterValidator(_between)]
KeptFractions = Annotated[list[KeptFraction], LISTED_OR_NONE, DIFFERENT]
ScheduleOptions = Annotated[ScheduleEntry, _passing(lambda given: Schedule(**given))]


@with_config(STRICT)
class MethodEntry(ScheduleEntry, total=False):
    """A method, what is set and varied of its parameters, and what it overrides."""

    method: Annotated[str, AfterValidator(_known_method)]
    set: dict[str, Any]
    vary: dict[str, Annotated[list[Any], LISTED, DIFFERENT]]
    backend: Backend
    kept: KeptFractions
    cache: Annotated[list[Annotated[float, Ge(1e-6)]], LISTED, DIFFERENT]
    hold: Annotated[list[Annotated[float, Ge(1e-6)]], LISTED, DIFFERENT]


@with_config(STRICT)
class TunedEntry(TypedDict):
    """What settings choose for one or several targets."""

    settings: str
    target: Annotated[list[str], LISTED, DIFFERENT]
    backend: NotRequired[Backend]


@with_config(STRICT)
class PromptEntry(TypedDict, total=False):
    """A text, and for image-to-video models the first frame."""

    prompt: str
    image: str


@with_config(STRICT)
class Bar(TypedDict, total=False):
    """What a verdict asks for; higher is better."""

    psnr: float
    ssim: float
    caption_accuracy: float
    clip_score: float


@with_config(STRICT)
class Networks(TypedDict, total=False):
    """Folders or files of the networks that judge quality."""

    clip: str
    features: str
    lpips: str


def _check_prompt(entry: Any) -> None:
    if not entry:
        raise BadSweep("an entry is empty: give it a prompt, an image, or both")


def _check_entry(entry: Any) -> None:
    if "method" not in entry:
        raise BadSweep("name the method, as in {method: radial}")
    if entry["method"] == "dense" and not {"cache", "hold"} & set(entry):
        raise BadSweep("dense is rendered anyway, for every prompt; drop it")
    Schedule(**{key: entry[key] for key in SCHEDULE_KEYS if key in entry})


SCHEDULE_KEYS = tuple(ScheduleEntry.__annotations__)
METHOD_KEYS = tuple(dict.fromkeys((*MethodEntry.__annotations__, *SCHEDULE_KEYS)))
TUNED_KEYS = tuple(TunedEntry.__annotations__)
SIZE_KEYS, BARS = tuple(Size.__annotations__), tuple(Bar.__annotations__)
NETWORKS = tuple(Networks.__annotations__)
FLOORS = ("kernel", "seed")


AnyMethod = Annotated[
    Annotated[MethodEntry, _passing(_check_entry), Tag("method")]
    | Annotated[TunedEntry, Tag("settings")],
    Discriminator(lambda entry: "settings" if "settings" in _keys(entry) else "method"),
]


class SweepFile(BaseModel):
    """The keys of the file; see `diffpatch.eval.sweep.spec.SweepSpec` for what they mean."""

    model_config = STRICT

    title: str = "Sweep"
    model: Annotated[list[str], LISTED, DIFFERENT] = ["demo"]
    dtype: Annotated[str, _one_of(("auto", *DTYPES))] = "auto"
    offload: Annotated[str, _one_of(OFFLOADS)] = "none"
    vae_tiling: bool = False
    prompts: Annotated[
        list[Annotated[PromptEntry, _passing(_check_prompt)]], BeforeValidator(_prompt_entries)
    ] = []
    prompt_file: str | None = None
    seeds: Annotated[list[Annotated[Natural, Lt(SEEDS)]], LISTED, DIFFERENT] = [0]
    seeds_in_turn: bool = False
    call: Annotated[dict[str, Any], AfterValidator(_call)] = {}
    sizes: Annotated[list[Size], LISTED, DIFFERENT] = [{}]
    steps: Annotated[list[Count], LISTED, DIFFERENT] = []
    schedules: Annotated[list[ScheduleOptions], LISTED, DIFFERENT] = [{}]
    methods: Annotated[list[AnyMethod], BeforeValidator(_some_methods)] = Field(
        default=[], validate_default=True
    )
    kept: KeptFractions = []
    noise_floor: Annotated[list[Annotated[str, _one_of(FLOORS)]], LISTED_OR_NONE, DIFFERENT] = list(
        FLOORS
    )
    # Of how many prompts; None, which the file writes as true, is all of them.
    attention_error: Annotated[
        Natural | None, BeforeValidator(lambda value: None if value is True else value or 0)
    ] = 0
    dense_every: Natural = 8
    bar: Bar = Bar(psnr=25)
    details: bool = False
    networks: Networks = {}


KEYS = tuple(SweepFile.model_fields)
KNOWN = {
    "sizes": SIZE_KEYS,
    "schedules": SCHEDULE_KEYS,
    "methods": METHOD_KEYS,
    "prompts": ("prompt", "image"),
    "bar": BARS,
    "networks": NETWORKS,
}
WORDS = {
    "string_type": "a text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
}


def read(data: Any) -> SweepFile:
    """Check what a file holds.

    Raises:
        BadSweep: the first key or value that cannot work; one line with place, value and cure.
    """
    try:
        return SweepFile.model_validate(data)
    except ValidationError as found:
        errors = found.errors(include_url=False)
    errors.sort(key=lambda error: error["type"] != "extra_forbidden")  # misspelled keys come first
    raise BadSweep(_line(errors[0], data)) from None


def _line(error: Any, data: Any) -> str:
    loc, value = error["loc"], error["input"]
    place = _place(loc, data) or "the sweep"
    if error["type"] == "extra_forbidden":
        place = _place(loc[:-1], data) or "the sweep"
        return f"{place}: unknown key {shown(loc[-1])}: {choices(str(loc[-1]), _known(loc[:-1]))}"
    if "error" in error.get("ctx", {}):
        return f"{place}: {error['ctx']['error']}"
    if error["type"] == "invalid_key":
        return f"{_place(loc[:-1], data) or 'the sweep'}: the key {shown(value)} must be a text"
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "greater_than_equal":
        return f"{place}: {shown(value)} must be at least {error['ctx']['ge']}"
    if error["type"] == "less_than":
        return f"{place}: {shown(value)} must be below {error['ctx']['lt']}"
    return f"{place}: {shown(value)} must be {WORDS.get(error['type']) or _mapping_words(loc)}"


def _known(loc: Sequence[int | str]) -> Sequence[str]:
    """The keys of the mapping at a place."""
    if not loc:
        return KEYS
    return TUNED_KEYS if "settings" in loc else KNOWN[str(loc[0])]


def _place(loc: Sequence[int | str], data: Any) -> str:
    """Where an error is, with the name of the method in place of its number."""
    told = ("[key]", "method", "backend")  # by the error itself
    names = [part for part in loc if isinstance(part, str) and part not in told]
    if len(loc) > 1 and loc[0] == "methods" and isinstance(loc[1], int):
        entry = _listed(data["methods"])[loc[1]]
        name = entry.get("method") if isinstance(entry, dict) else None
        if isinstance(name, str) and name in diffpatch.list_methods():
            names.insert(1, name)
    return ": ".join(names)


def _mapping_words(loc: Sequence[int | str]) -> str:
    """A mapping, and of what."""
    if loc and loc[0] == "prompts":
        return "a mapping {prompt: …, image: …}, or a text, which YAML may want in quotes"
    if loc and loc[0] == "methods" and loc[2:] == ("method",):
        return "a mapping {method: …, set: …}, or the name of a method"
    known = _known(loc) if len(loc) < 3 and loc and loc[0] in KNOWN else None
    return f"a mapping {{{': …, '.join(known)}: …}}" if known else "a mapping of names to values"
