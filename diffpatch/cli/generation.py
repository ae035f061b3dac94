"""From command-line options to the arguments of a pipeline call."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

import diffpatch
from diffpatch.cli import progress
from diffpatch.cli.errors import UsageError
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.files import read_prompts
from diffpatch.kernels.block_sparse.backends import unsupported_reason
from diffpatch.patching.options.settle import AUTO
from diffpatch.pipelines.families.table import list_families
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import preset_call, steps_of, too_many_dense
from diffpatch.pipelines.running.loading import Source
from diffpatch.pipelines.running.two_stages import check_strength
from diffpatch.pipelines.shapes.find import find_shape
from diffpatch.pipelines.shapes.table import ModelShape

OPTIONS = (
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
)
SIDE_MULTIPLE = 16  # what every video pipeline accepts as a side in pixels


def prompts(args: argparse.Namespace) -> list[str]:
    """All prompts: those of --prompt, then the lines of --prompt-file."""
    found = list(args.prompt)
    if args.prompt_file is not None:
        try:
            found += read_prompts(args.prompt_file)
        except UnicodeDecodeError:
            raise UsageError(f"{args.prompt_file} is not a text file in UTF-8") from None
    if not found:
        raise UsageError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    return found


def call_arguments(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """The arguments of a call without its prompt: preset or pipeline defaults, then options.

    Raises:
        UsageError: an option that the pipeline does not have.
    """
    known = source.arguments
    check_prompts(source)
    call = preset_call(source)
    for name in OPTIONS:
        value = getattr(args, name)
        if value is None:
            continue
        if name not in known:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{source.pipeline.__name__} has no {name}; drop {option}")
        call[name] = value
    call |= _image(args, source)
    if args.height is not None or args.width is not None:
        check_size(source, call)
    return call


def check_prompts(source: Source) -> None:
    """Refuse pipelines that make pictures of something else than text."""
    if "prompt" in source.arguments:
        return
    needed = ", ".join(sorted(source.required - {"self"})) or "nothing"
    raise UsageError(
        f"{source.pipeline.__name__} takes no prompt, it needs {needed}: call it from Python after"
        " diffpatch.patch(pipe)"
    )


def check_size(source: Source, call: Mapping[str, Any]) -> None:
    """Refuse a size that the model cannot make, before its weights are loaded: configs tell.

    Raises:
        UsageError: names the closest size that works.
    """
    known = _shape_and_size(source, call)
    if known is None:
        return
    shape, frames, height, width = known
    try:
        shape.grid(frames, height, width)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_fit(
    source: Source, call: Mapping[str, Any], method: str, options: Mapping[str, Any]
) -> None:
    """Refuse a method that cannot work on the tokens of the call, before weights are loaded.

    One that keeps every pair there works, and gains nothing: a line says so.

    Raises:
        UsageError: says which parameter does not fit, and where.
    """
    known = _shape_and_size(source, call)
    if known is None:
        return
    shape, frames, height, width = known
    planned = {name: value for name, value in options.items() if name != "backend"}
    steps = steps_of(dict(call), source) or 50
    try:
        made = diffpatch.plan(
            shape, method, height=height, width=width, num_frames=frames,
            num_inference_steps=steps, **planned,
        )  # fmt: skip
    except BadParameter as error:
        raise UsageError(str(error)) from None
    if made.kept_sparse >= 1 and not made.at_most:
        progress.say(f"{method} keeps every pair of {made.grid} tokens: nothing will be faster")


def check_place(device: torch.device, backend: str = "auto", offload: str = "none") -> None:
    """Refuse what a device cannot do, before weights are loaded.

    Raises:
        UsageError: the backend asked for cannot run there, or weights cannot wait elsewhere.
    """
    if offload != "none" and device.type == "cpu":
        raise UsageError(f"--offload {offload} needs an accelerator; leave it out on the CPU")
    pattern = diffpatch.Window(window=-1).pattern(diffpatch.TokenGrid(1, 8, 8))
    q = torch.empty(1, 64, 1, 64, dtype=loading.default_dtype(device), device=device)
    if reason := unsupported_reason(q, pattern.on(device), backend):
        raise UsageError(f"--backend {backend} cannot run: {reason}; use --backend auto")


def _shape_and_size(
    source: Source, call: Mapping[str, Any]
) -> tuple[ModelShape, int, int, int] | None:
    """The model's shape, frames, height and width of a call; None where configs do not tell."""
    used = {**source.arguments, **call}
    height, width = used.get("height"), used.get("width")
    if source.kind == "hub" or not (isinstance(height, int) and isinstance(width, int)):
        return None  # a hub model's configs come with its weights
    try:
        shape = find_shape(source.name)
    except DiffpatchError:  # its rule is not known; the pipeline itself will check
        return None
    frames = used.get("num_frames") or 1
    if frames > 1:  # pipelines round the number of frames themselves
        frames = shape.frames_up_to(frames)
    return shape, frames, height, width


def first_size(source: Source, call: Mapping[str, Any], strength: float) -> tuple[int, int]:
    """Height and width in pixels of the first of two stages: those that the model was trained at.

    Where that is not known, they are the usual of the pipeline.

    Raises:
        UsageError: the strength cannot work, no size is known, or it is no smaller than the second.
    """
    try:
        check_strength(strength, steps_of(dict(call), source))
    except BadParameter as error:
        raise UsageError(f"--{error}") from None
    size = _trained_pixels(source) or (
        source.arguments.get("height"), source.arguments.get("width")
    )  # fmt: skip
    height, width = size
    if not (isinstance(height, int) and isinstance(width, int)):
        raise UsageError(f"--strength: the size that {source.name} was trained at is not known")
    second = call.get("height") or height, call.get("width") or width
    if second[0] * second[1] <= height * width:
        raise UsageError(
            f"--strength enlarges what was made at {height}×{width} and --height, --width ask for"
            f" {second[0]}×{second[1]}: give a larger size, or leave --strength out"
        )
    return height, width


def _trained_pixels(source: Source) -> tuple[int, int] | None:
    """The largest size of training, None where it is not known without a network."""
    if source.kind == "hub":
        return None
    try:
        shape = find_shape(source.name)
    except DiffpatchError:
        return None
    family = next((f for f in list_families() if f.transformer == shape.transformer), None)
    trained = None if family is None else family.trained_at(shape.heads, shape.patch[0])
    if trained is None or trained.height is None or trained.width is None:
        return None
    step = shape.space * shape.patch[1], shape.space * shape.patch[2]
    return trained.height * step[0], trained.width * step[1]


def method_for(name: str, source: Source) -> str:
    """The method that "auto" stands for on a model, or the name itself."""
    return AUTO["video" if source.is_video else "image"] if name == "auto" else name


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """How the model options want a pipeline loaded, as `load_pipeline` takes it."""
    return {
        "dtype": loading.DTYPES.get(args.dtype),
        "device": args.device,
        "offload": args.offload,
        "vae_tiling": args.vae_tiling,
        "compile": args.compile,
        "image_input": args.image is not None,
    }


def load(source: Source, options: Mapping[str, Any]) -> Any:
    """A pipeline that shows no bars of its own."""
    pipe = loading.load_pipeline(source, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_dense_steps(options: Mapping[str, Any], steps: int | None) -> None:
    """Refuse more dense steps than there are steps, before anything is computed."""
    if name := too_many_dense(options, steps):
        option = "--" + name.replace("_", "-")
        raise UsageError(f"{option} {options[name]} is more than the {steps} steps; lower it")


def _image(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """The image to start from, with a size in its proportions unless the user gave one."""
    known, name = source.arguments, source.pipeline.__name__
    if args.image is None:
        if source.is_video and "image" in source.required:
            raise UsageError(f"{name} starts from an image; give --image FILE")
        return {}
    if source.is_video and "image" not in known:
        raise UsageError(f"{name} takes no image; drop --image or choose an image-to-video model")
    image = _open(args.image)
    size = {}
    if args.height is None and args.width is None:
        size = _size_like(image, known.get("height"), known.get("width"))
    return {"image": image} | size


def _open(path: Any) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError:
        raise UsageError(
            f"{path} is not an image that Pillow can read; convert it to PNG"
        ) from None


def _size_like(image: Image.Image, height: Any, width: Any) -> dict[str, int]:
    """As many pixels as the pipeline's default, in the proportions of the image."""
    if not (isinstance(height, int) and isinstance(width, int)):
        return {}
    ratio = image.height / image.width
    sides = math.sqrt(height * width * ratio), math.sqrt(height * width / ratio)
    rounded = [max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in sides]
    return {"height": rounded[0], "width": rounded[1]}
