"""Files of learned attention parameters: one safetensors file, checked against the model it meets.

In the folder of a pipeline, where diffusers passes over it, the file is called `FILE`. A tensor is
named after the attention module it belongs to, ``transformer.blocks.0.attn1.gate``. The header says
which transformer class the file was made for and with which parameters of the method. Nothing in it
depends on a token grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from diffpatch.checking import file_path
from diffpatch.errors import BadParameter
from diffpatch.files import write_bytes
from diffpatch.methods.learned.hub import fetched

FORMAT, VERSION = "diffpatch learned attention", "1"
FILE = "diffpatch_linear.safetensors"

Learned = dict[str, torch.Tensor]  # what one layer learned, by name


@dataclass(frozen=True)
class Layer:
    """An attention module that learned parameters may belong to.

    Attributes:
        path: its place in the transformer.
        heads: its query heads, None where the module does not tell.
        inner: channels of all its heads together, None where the module does not tell.
        channels: of what it is given, None where the module does not tell.
    """

    path: str
    heads: int | None = None
    inner: int | None = None
    channels: int | None = None

    @classmethod
    def of(cls, path: str, module: Any) -> Layer:
        """The layer of a diffusers attention module."""
        projection = getattr(module, "to_q", None)
        inner, channels = (
            getattr(projection, name, None) for name in ("out_features", "in_features")
        )
        return cls(path, getattr(module, "heads", None), inner, channels)


def save(
    path: str | Path,
    learned: Mapping[str, Mapping[str, torch.Tensor]],
    family: str,
    method: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write learned parameters; the file appears whole or not at all.

    Args:
        path: a new or old file, ending in .safetensors, or the folder of a pipeline.
        learned: layer, such as ``transformer.blocks.0.attn1``, -> its tensors.
        family: the class of the transformer.
        method: the parameters of the method, ready for JSON.
        dtype: what tensors of two and more dimensions are stored in; vectors stay fp32.

    Raises:
        BadParameter: the path is empty.
        DiskFull: there was no space; nothing is left of the file.
    """
    path = Path(path) / FILE if str(path) and Path(path).is_dir() else path
    tensors = {}
    for layer, values in learned.items():
        for name, value in values.items():
            kind = dtype if value.ndim > 1 and min(value.shape) > 4 else torch.float32
            tensors[f"{layer}.{name}"] = value.detach().to("cpu", kind).contiguous()
    header = {"format": FORMAT, "version": VERSION, "family": family, "method": json.dumps(method)}
    write_bytes(file_path(path), to_bytes(tensors, header))


def read_method(path: str | Path) -> dict[str, Any]:
    """The parameters of the method that a file was made with.

    Raises:
        BadParameter: the file is missing, damaged, or something else.
    """
    return _read(path, tensors=False)[1]


def load(
    path: str | Path, component: str, family: str, layers: Sequence[Layer]
) -> tuple[dict[str, Any], list[Learned]]:
    """Read a file for one transformer of a pipeline.

    Args:
        path: the file, a folder with `FILE`, or the name of such a model on the hub.
        component: name of the transformer in its pipeline.
        family: its class.
        layers: its attention modules.

    Returns:
        The parameters of the method, and the tensors of every layer in fp32.

    Raises:
        BadParameter: the file is missing or damaged, or does not belong to this model.
    """
    made_for, method, tensors = _read(path, tensors=True)
    if made_for != family:
        raise BadParameter(
            f"weights={str(path)!r} were made for {made_for}, not {family}: distil this model"
        )
    found: dict[str, Learned] = {}
    for name, value in tensors.items():
        layer, _, short = name.rpartition(".")
        if layer.startswith(component + "."):
            found.setdefault(layer.removeprefix(component + "."), {})[short] = value.float()
        if not torch.isfinite(value).all():
            raise BadParameter(f"weights={str(path)!r}: {name} holds NaN or infinity; distil again")
    _same_layers(path, component, set(found), {layer.path for layer in layers})
    for one in layers:
        _fits(path, one, found[one.path])
    return method, [found[one.path] for one in layers]


def located(path: str | Path) -> Path:
    """The file itself, of a file, a folder or a model on the hub.

    Raises:
        BadParameter: there is none.
    """
    place = Path(path)
    if place.is_file():
        return place
    if not place.is_dir():
        if place.suffix or not place.name:
            raise BadParameter(f"weights={str(path)!r} is not a file")
        place = fetched(str(path), FILE)
    if not (place / FILE).is_file():
        raise BadParameter(
            f"weights={str(path)!r} holds no {FILE}: examples/distill_linear.py writes one"
        )
    return place / FILE


def _read(
    path: str | Path, *, tensors: bool
) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """The class of the transformer, the parameters of the method, and the tensors if asked for."""
    source = located(path)
    try:
        with safe_open(source, framework="pt") as file:
            header = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadParameter(
            f"weights={str(path)!r} is not a safetensors file, or a damaged one ({error})"
        ) from None
    if header.get("format") != FORMAT:
        raise BadParameter(
            f"weights={str(path)!r} holds no learned attention: a model's own weights or a LoRA are"
            " loaded with diffusers"
        )
    if header.get("version") != VERSION:
        raise BadParameter(
            f"weights={str(path)!r} has version {header.get('version')!r} and this diffpatch reads"
            f" {VERSION!r}: update it, or distil again"
        )
    try:
        family, method = header["family"], json.loads(header["method"])
    except (KeyError, ValueError, RecursionError):
        family, method = "", None
    if not isinstance(method, dict):
        raise BadParameter(
            f"weights={str(path)!r} are damaged: the header must name the family and the parameters"
            " of the method; distil again"
        )
    return family, method, values


def _same_layers(path: str | Path, component: str, found: set[str], wanted: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if not missing and not extra:
        return
    said = [f"{len(x)} {what} ({_some(x)})" for x, what in ((missing, "missing"), (extra, "extra"))
            if x]  # fmt: skip
    raise BadParameter(
        f"weights={str(path)!r} do not fit the {len(wanted)} layers of {component}: layers"
        f" {' and '.join(said)}; they were made for another model"
    )


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return first + (", …" if rest else "")


def _is_shaped(name: str, shape: torch.Size) -> bool:
    """Whether it is the shape of something that `methods.linear.distilled.initial` makes."""
    if name == "gate":
        return len(shape) == 2 and shape[1] == 3
    if name in ("phi_q", "phi_k"):
        return len(shape) == 3 and shape[1] == shape[2]
    stem, _, side = name.rpartition("_")
    return len(shape) == 2 and stem in ("q", "k", "v", "out") and side in ("down", "up")


def _have_partners(learned: Learned) -> bool:
    """Whether each half of a low-rank map has the other half."""
    other = {name: name[:-4] + "up" for name in learned if name.endswith("down")}
    ups = sorted(name for name in learned if name.endswith("_up"))
    return ups == sorted(other.values()) and all(
        learned[down].shape == learned[up].shape[::-1] for down, up in other.items()
    )


def _fits(path: str | Path, layer: Layer, learned: Learned) -> None:
    """Compare the sizes that tensors imply with those of the module."""
    for name, value in learned.items():
        if not _is_shaped(name, value.shape):
            raise BadParameter(
                f"weights={str(path)!r}: {layer.path}.{name} of shape {tuple(value.shape)} is"
                " nothing that a layer learns; distil again"
            )
        inner = value.shape[-1] if name.endswith("_down") else None
        heads = value.shape[0] if name in ("gate", "phi_q") else None
        if name == "phi_q":
            inner = value.shape[0] * value.shape[1]
        for what, own, other in (
            ("heads", heads, layer.heads), ("channels", inner, layer.inner)
        ):  # fmt: skip
            wrong = own is not None and other is not None and own != other
            if wrong and name not in ("k_down", "v_down"):  # their heads may be fewer
                raise BadParameter(
                    f"weights={str(path)!r}: {layer.path}.{name} is for {own} {what} and the model"
                    f" has {other}; they were made for another model"
                )
    if not _have_partners(learned):
        raise BadParameter(
            f"weights={str(path)!r}: {layer.path} has half of a low-rank map; distil again"
        )
