"""Checkpoints that were trained with sparse attention: what they hold beyond the model's weights.

diffusers loads such a folder and passes over the tensors that its model classes do not know. They
stand beside the others, named after the attention module that they belong to:

=====  ==============================================================  =======================
VSA    ``blocks.0.attn1.to_gate_compress.weight`` and ``.bias``        (H·D, channels), (H·D,)
SLA    ``blocks.0.attn1.attn_op.local_attn.proj_l.weight``, ``.bias``  (D, D), (D,)
SLA2   ``blocks.0.attn1.attn_op.local_attn.proj_q.weight``             (D, D)
       ``blocks.0.attn1.attn_op.local_attn.proj_k.weight``             (D, D)
       ``blocks.0.attn1.attn_op.local_attn.alpha``                     (H,) or (H, query tiles)
=====  ==============================================================  =======================

A bias may be missing, and so may ``attn_op`` and ``local_attn`` of VSA and SLA. When this was
written (November 2026) no checkpoint of SLA2 was public: its names are those of its paper, where
SLA has its own. Only safetensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffpatch.errors import BadParameter
from diffpatch.methods.learned.files import Layer, Learned
from diffpatch.methods.learned.hub import fetched

_AGAIN = "fetch the whole checkpoint again"
VSA, SLA, SLA2 = "to_gate_compress", "proj_l", "alpha"
_ROUTER = "proj_q.weight", "proj_k.weight"
_NAME = re.compile(
    r"(?:model\.)?(?:diffusion_model\.)?(?P<layer>.+?)(?:"
    rf"(?:\.attn_op)?(?:\.local_attn)?\.(?P<name>(?P<kind>{VSA}|{SLA})\.(?:weight|bias))"
    rf"|(?:\.attn_op)?\.local_attn\.(?P<second>{SLA2}|proj_[qk]\.weight))"
)


def kind_of(weights: str) -> str:
    """What a checkpoint was trained with, `VSA`, `SLA` or `SLA2`.

    Args:
        weights: a diffusers folder, that of one of its models, a safetensors file, or the name of a
            model on the hub, whose files are then fetched as diffusers does it.

    Raises:
        BadParameter: there is no such checkpoint, or nothing of the kind in it.
    """
    kinds = {found["kind"] or SLA2 for file in _files(weights) for _, found in _names(file)}
    if len(kinds) != 1:
        what = "several kinds" if kinds else "neither to_gate_compress (VSA) nor proj_l (SLA)"
        raise BadParameter(
            f"weights={weights!r} hold {what}: give a checkpoint that was trained sparse, or leave"
            " weights out"
        )
    return str(kinds.pop())


def is_trained(folder: str) -> bool:
    """Whether a folder on this disk holds weights of the kind; files that cannot be read do not."""
    place = Path(folder)
    parts = [part for part in place.glob("transformer*") if part.is_dir()] or [place]
    files = (file for part in parts for file in part.glob("*.safetensors"))
    try:
        return any(True for file in files for _ in _names(file))
    except BadParameter:  # diffusers says it as it loads them
        return False


def load(weights: str, component: str, layers: Sequence[Layer]) -> list[Learned]:
    """What every layer of one transformer learned, in the dtype that it is stored in.

    Args:
        weights: as in `kind_of`.
        component: the name of the transformer in its pipeline.
        layers: its attention modules.

    Raises:
        BadParameter: the checkpoint is of another model.
    """
    found: dict[str, Learned] = {}
    for file in _files(weights, component):
        with _opened(file) as tensors:
            for name, parts in _names(file):
                short = parts["name"] or parts["second"]
                found.setdefault(parts["layer"], {})[short] = tensors.get_tensor(name)
    missing = [layer.path for layer in layers if layer.path not in found]
    extra = sorted(found.keys() - {layer.path for layer in layers})
    if missing or extra:
        lacks = f"nothing for {missing[0]}" if missing else f"something for {extra[0]}"
        raise BadParameter(
            f"weights={weights!r} hold {lacks}, of {len(layers)} layers of {component}: they were"
            " trained for another model"
        )
    for layer in layers:
        _fits(weights, layer, found[layer.path])
    return [found[layer.path] for layer in layers]


def _fits(weights: str, layer: Layer, learned: Learned) -> None:
    """Compare the sizes of the tensors with those of the module."""
    inner, size = layer.inner, None
    if inner is not None and layer.heads:
        size = inner // layer.heads
    expected = {
        f"{VSA}.weight": (inner, layer.channels), f"{VSA}.bias": (inner,),
        f"{SLA}.weight": (size, size), f"{SLA}.bias": (size,),
        SLA2: (layer.heads, None), **dict.fromkeys(_ROUTER, (size, size)),
    }  # fmt: skip
    for name, value in learned.items():
        wanted = expected[name][: value.ndim] if name == SLA2 and value.ndim else expected[name]
        same = len(wanted) == value.ndim and all(
            a is None or a == b for a, b in zip(wanted, value.shape, strict=False)
        )
        if not same:
            raise BadParameter(
                f"weights={weights!r}: {layer.path}.{name} is {tuple(value.shape)} and the model"
                f" needs {wanted}; they were trained for another model"
            )
        if not torch.isfinite(value).all():
            raise BadParameter(
                f"weights={weights!r}: {layer.path}.{name} holds NaN or infinity: {_AGAIN}"
            )
    routed = {SLA2, *_ROUTER}
    if learned.keys() & routed:
        if lacking := sorted(routed - learned.keys()):
            raise BadParameter(f"weights={weights!r}: {layer.path} has no {lacking[0]}: {_AGAIN}")
        if not ((learned[SLA2] >= 0) & (learned[SLA2] <= 1)).all():
            raise BadParameter(
                f"weights={weights!r}: {layer.path}.{SLA2} must be from 0 to 1: it is the share of"
                " the chosen tiles"
            )
    elif not any(name.endswith(".weight") for name in learned):
        raise BadParameter(f"weights={weights!r}: {layer.path} has a bias and no weight: {_AGAIN}")


def _names(file: Path) -> Iterator[tuple[str, re.Match[str]]]:
    """The names of a file that are of interest, taken apart."""
    with _opened(file) as tensors:
        for name in sorted(tensors.keys()):
            if (parts := _NAME.fullmatch(name)) is not None:
                yield name, parts


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadParameter(
            f"{file} is not a safetensors file, or a damaged one ({error}): {_AGAIN}"
        ) from None


def _files(weights: str, component: str | None = None) -> list[Path]:
    """The safetensors of a checkpoint: of one of its transformers, or of all of them."""
    place = Path(weights)
    if not place.exists():
        place = fetched(weights, "transformer*/*.safetensors")
    if place.is_file():
        return [place]
    inner = [place / component] if component else sorted(place.glob("transformer*"))
    folders = [folder for folder in inner if folder.is_dir()] or [place]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise BadParameter(
            f"weights={weights!r} is a folder without safetensors of a transformer: give that of a"
            " pipeline, or of its transformer"
        )
    return files
