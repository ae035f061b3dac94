"""Loading a pipeline by name: the built-in demo, a local folder, or a Hugging Face hub id."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpatch.errors import BadParameter, DiffpatchError, choices
from diffpatch.hub import out_of_reach

Pipeline = Any  # a diffusers pipeline, whose annotations hide its own methods from type checkers

DEMOS = ("demo", "demo-long")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFLOADS = ("none", "model", "sequential", "group")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_ADVICE = "; check the id and the network, and log in with `hf auth login` if it is gated"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ModelError(DiffpatchError):
    """The model cannot be found or loaded; the message says what to do."""


class UnusableModel(ModelError, BadParameter):
    """There is no such model, or it cannot be used like that: another name or setting would."""


@dataclass(frozen=True)
class Source:
    """Where a pipeline comes from, found out without loading any weights.

    Attributes:
        name: what the user wrote.
        kind: "demo", "folder" or "hub".
        pipeline: the pipeline class that diffusers will build.
    """

    name: str
    kind: str
    pipeline: type[Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a pipeline call and their defaults (None where there is none)."""
        return call_arguments(self.pipeline)

    @property
    def is_video(self) -> bool:
        """Whether the pipeline makes videos rather than images."""
        return bool({"num_frames", "video_length"} & set(self.arguments))

    @property
    def required(self) -> set[str]:
        """The arguments of a pipeline call that have no default."""
        parameters = inspect.signature(self.pipeline.__call__).parameters
        return {name for name, p in parameters.items() if p.default is p.empty}


def call_arguments(pipeline: Any) -> dict[str, Any]:
    """The arguments that a pipeline (or its class) can be called with, and their defaults."""
    signature = inspect.signature(pipeline.__call__)
    return {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in signature.parameters.items()
        if name != "self"
    }


def find(model: str) -> Source:
    """Find out what a model name means; reads the pipeline's index but no weights.

    Args:
        model: "demo", "demo-long", a folder written by `save_pretrained`, or a hub id. Only the
            last needs a network.

    Raises:
        ModelError: there is no such model, or it is not a diffusers pipeline with safetensors.
    """
    if model in DEMOS:
        return Source(model, "demo", _pipeline_class("WanPipeline", model))
    path = Path(model).expanduser()
    if path.is_dir():
        source = Source(model, "folder", _pipeline_class(_read_index(path), model))
        _check_weights(path)
        return source
    if path.is_file():
        raise UnusableModel(f"{model} is a file; a model is a folder that has a model_index.json")
    if _HUB_ID.fullmatch(model):
        return Source(model, "hub", _pipeline_class(_hub_index(model), model))
    raise UnusableModel(
        f"no model {model!r}: {choices(model, DEMOS)}, a folder, or a hub id such as owner/name"
    )


def load_pipeline(
    model: str | Source,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    offload: str = "none",
    vae_tiling: bool = False,
    compile: bool = False,
    image_input: bool = False,
) -> Pipeline:
    """Load a pipeline, ready to be called.

    Args:
        model: what `find` accepts, or what it returned.
        dtype: of the weights; None is `default_dtype` of the device.
        device: None is the accelerator, if there is one, else the CPU.
        offload: "none", or how weights wait in main memory: "model" moves whole models, "group"
            and "sequential" single layers, each slower and smaller than the one before.
        vae_tiling: decode in tiles, which takes less memory.
        compile: compile the repeated blocks of the denoiser.
        image_input: give its image-to-image form where the pipeline itself takes no image.

    Raises:
        ModelError: the model, or one of the settings, cannot work.
    """
    source = find(model) if isinstance(model, str) else model
    device = choose_device(device)
    if offload not in OFFLOADS:
        raise UnusableModel(f"unknown offload {offload!r}: {choices(offload, OFFLOADS)}")
    if offload != "none" and device.type == "cpu":
        raise UnusableModel(f"offload={offload!r} needs an accelerator; leave it out on the CPU")
    pipe = _load(source, default_dtype(device) if dtype is None else dtype)
    if vae_tiling:
        if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
            raise UnusableModel(
                f"the VAE of {source.name} cannot decode in tiles; drop --vae-tiling"
            )
        pipe.vae.enable_tiling()
    if compile:
        for denoiser in denoisers(pipe):
            denoiser.compile_repeated_blocks()
    _place(pipe, device, offload)
    return with_image_input(pipe) if image_input else pipe


def with_image_input(pipe: Pipeline) -> Pipeline:
    """The pipeline itself if it takes an image, else its image-to-image form on the same weights.

    Raises:
        ModelError: diffusers knows no such form.
    """
    if "image" in call_arguments(pipe):
        return pipe
    from diffusers import AutoPipelineForImage2Image

    try:
        return AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        name = type(pipe).__name__
        raise UnusableModel(f"{name} takes no image; choose an image-to-video model") from error


def denoisers(pipe: Pipeline) -> list[Any]:
    """The networks that a pipeline calls at every step."""
    parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet"))
    return [part for part in parts if part is not None]


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, checked; without a wish the accelerator, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UnusableModel(f"unknown device {device!r}; try cpu, cuda or cuda:0") from None
    if wanted.type not in ("cpu", accelerator.type if accelerator else "cpu"):
        raise UnusableModel(f"device {device!r} is not available here; try --device cpu")
    return wanted


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on accelerators; fp32 on the CPU, where bf16 is fast on few machines only."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _load(source: Source, dtype: torch.dtype) -> Pipeline:
    try:
        if source.kind == "demo":
            from diffpatch.pipelines.demo.model import load_demo

            return load_demo(source.name, dtype=dtype)
        name = str(Path(source.name).expanduser()) if source.kind == "folder" else source.name
        alone = source.kind == "hub" and out_of_reach() is not None
        return source.pipeline.from_pretrained(
            name, torch_dtype=dtype, use_safetensors=True, local_files_only=alone
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        advice = _HUB_ADVICE if source.kind == "hub" else ""
        raise ModelError(f"{source.name} cannot be loaded: {_first_line(error)}{advice}") from error
    except Exception as error:  # safetensors raises its own, unrelated error for damaged files
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(
            f"{source.name} has a damaged safetensors file ({_first_line(error)}); fetch it again"
        ) from error


def _place(pipe: Pipeline, device: torch.device, offload: str) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")
    else:
        pipe.to(device)


def _read_index(folder: Path) -> str:
    """The pipeline class that model_index.json names."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UnusableModel(
            f"{folder} is not a diffusers pipeline: it has no model_index.json; give the folder "
            "that save_pretrained wrote"
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UnusableModel(
            f"{index} is damaged: it names no _class_name; fetch it again"
        ) from None
    return str(name)


def _check_weights(folder: Path) -> None:
    """Refuse components whose only weights are pickles, which can run any code when loaded."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        pickles = sorted(file.name for pattern in _PICKLES for file in part.glob(pattern))
        if pickles and not any(part.glob("*.safetensors")):
            raise UnusableModel(
                f"{part / pickles[0]} is a pickle, which diffpatch does not load; convert it with "
                "pipe.save_pretrained(folder, safe_serialization=True)"
            )


def _hub_index(model: str) -> str:
    """The pipeline class of a repository on the hub; the first use of the network."""
    from diffusers import DiffusionPipeline

    alone = out_of_reach()
    try:
        config = DiffusionPipeline.load_config(model, local_files_only=alone is not None)
        return str(config["_class_name"])
    except (OSError, KeyError) as error:
        if alone is not None:
            raise ModelError(
                f"no pipeline {model} in the cache of the hub, and {alone}, or give a folder"
            ) from error
        raise ModelError(f"no pipeline {model} on the hub or in its cache{_HUB_ADVICE}") from error


def _pipeline_class(name: str, model: str) -> type[Any]:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise UnusableModel(
            f"{model} needs {name}, which diffusers {diffusers.__version__} does not have; "
            "pip install --upgrade diffusers"
        )
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
