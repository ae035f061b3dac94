"""A node for ComfyUI: ``Diffpatch Attention`` between a model loader and a sampler.

Install diffpatch into ComfyUI's Python, then write one file,
``ComfyUI/custom_nodes/diffpatch/__init__.py``, with one line::

    from diffpatch.adapters.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Restart ComfyUI and connect ``Load Diffusion Model → Diffpatch Attention → KSampler``. The inputs:

``method``        as in `diffpatch.list_methods()`
``kept``          fraction of the pairs of visual tokens that a sparse call computes, or 0: as the
                  method has it
``dense_steps``   first steps that stay dense, as a fraction of the run (0.2 is what is published)
``dense_layers``  first layers that stay dense
``text``          where text stands among the tokens: "auto" where the model tells or is known,
                  "before" or "after" the image for others
``options``       more parameters of the method, as JSON: ``{"decay": 0.5}``

At the end of a sampling the log says how many calls were sparse, and why the others were not. The
node changes a clone of the model: without the node nothing is left of it.

How it goes in: a wrapper around every forward of the diffusion model reads the token grid off its
input, and puts an ``optimized_attention_override`` over the one that is there for that forward
alone. So whatever else sets an override, later nodes too, computes the dense calls, and ComfyUI's
caches (EasyCache, LazyCache), context windows, ControlNets and LoRAs work as without the node. A
model that does not run these wrappers stays dense, and the log says so.

Written for ComfyUI of September 2026 (``wrap_attn``, ``WrappersMP.DIFFUSION_MODEL``); an older one
is refused with a sentence. The tests run it against a stand-in made after that contract, because
ComfyUI is not a package that can be installed; and its operators against comfy-kitchen.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from diffpatch.adapters.engine import CallPlace, EngineAttention, Told
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.methods.registry import list_methods, make_method
from diffpatch.patching.options import composition
from diffpatch.patterns.grid import TokenGrid

logger = logging.getLogger(__name__)

_KEY = "diffpatch"
_OVERRIDE = "optimized_attention_override"
_TEXT = {"Flux": "before", "QwenImageTransformer2DModel": "before", "HunyuanVideo": "after"}
_TOLERANCE = 1e-4  # of a noise level, which is cast on its way


class Node:
    """The node, as ComfyUI wants one."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/attention"
    DESCRIPTION = "Cheaper attention for image and video transformers (diffpatch)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """The sockets and widgets."""
        fraction = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (_methods(), {"default": "radial"}),
                "kept": ("FLOAT", {"default": 0.0, **fraction}),
                "dense_steps": ("FLOAT", {"default": 0.2, **fraction}),
                "dense_layers": ("INT", {"default": 0, "min": 0, "max": 1000}),
            },
            "optional": {
                "text": (["auto", "before", "after"], {"default": "auto"}),
                "options": ("STRING", {"default": "{}"}),
            },
        }

    def patch(
        self,
        model: Any,
        method: str,
        kept: float = 0.0,
        dense_steps: float = 0.2,
        dense_layers: int = 0,
        text: str = "auto",
        options: str = "{}",
    ) -> tuple[Any]:
        """A clone of the model with its attention changed; see the module for the inputs.

        Raises:
            BadParameter: an input that cannot work.
            DiffpatchError: ComfyUI lacks what the node needs.
        """
        params = _read_options(options)
        made = make_method(method, **params)
        if not 0 <= kept <= 1:
            raise BadParameter(f"kept={kept} must be a fraction between 0 and 1, or 0 to leave it")
        made = made.with_kept(kept, _kind(model)) if kept else made
        engine = EngineAttention(
            made,
            Told(layers=True, steps=True, totals=True, runs=True),
            dense_steps=float(dense_steps),
            dense_layers=int(dense_layers),
        )
        wrappers, patched, sampling = _wrappers(), model.clone(), Sampling(engine, text)
        patched.add_wrapper_with_key(wrappers.OUTER_SAMPLE, _KEY, sampling.around_run)
        patched.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, _KEY, sampling.around_forward)
        return (patched,)


NODE_CLASS_MAPPINGS = {"DiffpatchAttention": Node}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffpatchAttention": "Diffpatch Attention"}


class Sampling:
    """What the node hangs around samplings and forwards of one patched model.

    Args:
        engine: the method with its schedule.
        text: "auto", "before" or "after".
    """

    def __init__(self, engine: EngineAttention, text: str) -> None:
        self.engine, self.text = engine, text
        self._latest: object = None
        self._here: ContextVar[object] = ContextVar("diffpatch_sampling")

    def around_run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One sampling: count from its beginning, forget what was carried at its end."""
        run = self._latest = object()
        before = self._here.set(run)
        self.engine.begin()
        try:
            return executor(*args, **kwargs)
        finally:
            self._here.reset(before)
            self.engine.forget(run)
            said = logger.info if self.engine.reasons[""] else logger.warning
            said("diffpatch: %s", self.engine.summary())

    @property
    def run(self) -> object:
        """The sampling that goes on here; the latest one in a thread that it did not begin."""
        return self._here.get(self._latest)

    def around_forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward of the diffusion model: our override is on top of the others, for as long."""
        named = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        named = {**named, **named.get("kwargs", {})}
        options = named.get("transformer_options")
        if options is None:
            self.engine.dense_because("the model is not given transformer_options")
            return executor(*args, **kwargs)
        before = options.get(_OVERRIDE)
        forward = _Forward(self, executor.class_obj, named, options)
        options[_OVERRIDE] = forward.override(before)
        try:
            return executor(*args, **kwargs)
        finally:
            if before is None:
                options.pop(_OVERRIDE, None)
            else:
                options[_OVERRIDE] = before


class _Forward:
    """What one forward tells of the calls in it."""

    def __init__(
        self, sampling: Sampling, model: Any, named: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.engine = sampling.engine
        self.model = model
        self.x, self.context = next(iter(named.values())), named.get("context")
        self.text = (
            _TEXT.get(type(model).__name__, "") if sampling.text == "auto" else sampling.text
        )
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        self.branch = (*options.get("uuids", ()), *options.get("cond_or_uncond", ()), window)
        self.run = sampling.run
        self.step, self.steps = _step(options)

    def override(self, before: Callable[..., Any] | None) -> Callable[..., Any]:
        """An `optimized_attention_override` over the one before."""

        def attend(
            func: Callable[..., Any],
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            heads: int,
            mask: torch.Tensor | None = None,
            attn_precision: Any = None,
            skip_reshape: bool = False,
            skip_output_reshape: bool = False,
            **kwargs: Any,
        ) -> torch.Tensor:
            def dense() -> torch.Tensor:
                call: Any = func if before is None else lambda *a, **b: before(func, *a, **b)
                out = call(
                    q, k, v, heads, mask=mask, attn_precision=attn_precision,
                    skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs,
                )  # fmt: skip
                return _by_head(out, heads, skip_output_reshape)

            options = kwargs.get("transformer_options") or {}
            a, b, c = (_by_head(x, heads, skip_reshape, q) for x in (q, k, v))
            keys, grid = _keys(mask, a), self.grid(a.shape[1], options)
            out = self.engine.attend(
                a, b, c, keys if isinstance(keys, str) else grid, self.place(options), dense,
                kwargs.get("scale"), None if isinstance(keys, str) else keys,
            )  # fmt: skip
            return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

        return attend

    def place(self, options: Mapping[str, Any]) -> CallPlace:
        """Where a call stands; blocks of the second kind are counted after those of the first."""
        layer = options.get("block_index")
        if layer is not None and options.get("block_type") == "single":
            layer += len(getattr(self.model, "double_blocks", ()))
        return CallPlace(layer, self.step, self.steps, self.branch, self.run)

    def grid(self, tokens: int, options: Mapping[str, Any]) -> TokenGrid | str:
        """Where the tokens of a sequence stand, or why nothing tells."""
        sizes = options.get("grid_sizes") or _sizes(self.model, self.x)
        if isinstance(sizes, str):
            return sizes
        frames, height, width = sizes
        rest = tokens - frames * height * width
        if rest < 0:
            return f"a sequence of {tokens} tokens does not hold the grid {tuple(sizes)}"
        if not rest:
            return TokenGrid(frames, height, width)
        if "img_slice" in options:
            before = options["img_slice"][0]
        elif self.text == "before" and isinstance(self.context, torch.Tensor):
            before = self.context.shape[1]
        elif self.text == "after":
            before = 0
        else:
            return (
                f"where {rest} tokens of text stand is not known: choose text 'before' or 'after'"
            )
        if before > rest:
            return f"{rest} tokens are too few for {before} of text before the image"
        return TokenGrid(frames, height, width, before, rest - before)


def _sizes(model: Any, x: Any) -> tuple[int, ...] | str:
    """(frames, rows, columns) of tokens of an input (B, C, [T,] H, W), padded to whole patches."""
    patch = getattr(model, "patch_size", None)
    if not isinstance(x, torch.Tensor) or x.ndim not in (4, 5) or patch is None:
        return f"the token grid of {type(model).__name__} is not known"
    sides = (1, patch, patch) if isinstance(patch, int) else (1, *patch)[-3:]
    return tuple(-(-n // side) for n, side in zip((1, *x.shape[2:])[-3:], sides, strict=True))


def _by_head(
    x: torch.Tensor, heads: int, split: bool, query: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, S, H, D) of a tensor (B, H, S, D) if it is split already, else (B, S, H·D).

    Keys and values may have fewer heads than the queries, of the same size.
    """
    if split:
        return x.transpose(1, 2)
    size = (x if query is None else query).shape[-1] // heads
    return x.unflatten(-1, (-1, size))


def _keys(mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | str | None:
    """bool (B, S) of a mask over keys alone, or why a mask is not one."""
    if mask is None:
        return None
    if mask.dtype == torch.bool and mask.ndim >= 3 and mask.numel() == mask.shape[0] * q.shape[1]:
        return mask.reshape(mask.shape[0], q.shape[1]).expand(q.shape[0], -1)
    return f"the model's own mask {tuple(mask.shape)} of {mask.dtype}"


def _step(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(step, steps of the run): a solver between two noise levels is in the step of the higher."""
    levels, now = options.get("sample_sigmas"), options.get("sigmas")
    if levels is None or now is None:
        return None, None
    passed = int((levels >= now.flatten()[0].to(levels) * (1 - _TOLERANCE)).sum())
    return max(passed - 1, 0), len(levels) - 1


def _methods() -> list[str]:
    """Every method, and every combination with temporal that works."""
    known = list_methods()
    alone = [name for name, info in known.items() if not info.wraps and name != "dense"]
    return [*known, *(f"{name}+temporal" for name in alone if _combines(name))]


def _combines(name: str) -> bool:
    try:
        composition.check_method(make_method(f"{name}+temporal"))
    except DiffpatchError:
        return False
    return True


def _kind(model: Any) -> str:
    """Whether a model makes images or videos, as its latents tell."""
    latents = model.get_model_object("latent_format")
    return "image" if getattr(latents, "latent_dimensions", 3) == 2 else "video"


def _read_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise BadParameter(
            f'options={text!r} must be JSON like {{"decay": 0.5}} ({error})'
        ) from None
    if not isinstance(options, dict):
        raise BadParameter(f'options={text!r} must be names and values, like {{"decay": 0.5}}')
    return options


def _wrappers() -> Any:
    """ComfyUI's names of what can be wrapped.

    Raises:
        DiffpatchError: this is not ComfyUI, or one without what the node needs.
    """
    try:
        from comfy.ldm.modules.attention import wrap_attn  # noqa: F401  looks for overrides
        from comfy.patcher_extension import WrappersMP
    except ImportError as error:
        raise DiffpatchError(
            f"ComfyUI lacks what this node needs ({error}): run it inside ComfyUI, and update that"
            " to one of September 2026 or newer"
        ) from None
    for name in ("OUTER_SAMPLE", "DIFFUSION_MODEL"):
        if not hasattr(WrappersMP, name):
            raise DiffpatchError(
                f"ComfyUI has no WrappersMP.{name}: update it to one of September 2026 or newer"
            )
    return WrappersMP
