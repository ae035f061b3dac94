"""The classes that vLLM-Omni loads by name; importing this needs vLLM-Omni."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import json
import math
import os
from typing import Any

import torch
from vllm_omni.diffusion import forward_context
from vllm_omni.diffusion.attention.backends import abstract
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend
from vllm_omni.diffusion.attention.selector import get_attn_backend_for_role
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from diffpatch.adapters.engine import CallPlace, EngineAttention, Told, layer_number
from diffpatch.adapters.vllm_omni import NAME, SETTINGS
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.patterns.grid import Grid, PackedGrid, TokenGrid

_FIELDS = {  # what is read of what vLLM-Omni hands over
    "AttentionMetadata": ("attn_mask", "video_layout", "extra", "full_attn_spans", "joint_query"),
    "VideoTokenLayout": ("prefix_len", "latent_grid", "used_len", "video_spans"),
    "VideoTokenSpan": ("start", "latent_grid"),
    "ForwardContext": ("denoise_step_idx", "total_denoise_steps"),
}
_ARGUMENTS = (
    "num_heads", "head_size", "softmax_scale", "causal", "num_kv_heads", "prefix", "qkv_layout",
    "backend_kwargs",
)  # fmt: skip


class VllmOmniBackend(abstract.AttentionBackend):
    """What stands in the registry under `NAME`."""

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """Masks over keys are honoured; others go to a backend that takes them."""
        return True

    @staticmethod
    def get_name() -> str:
        """The name to choose it by."""
        return NAME

    @staticmethod
    def get_impl_cls() -> type[VllmOmniAttention]:
        """What computes."""
        return VllmOmniAttention

    @staticmethod
    def get_metadata_cls() -> Any:
        """vLLM-Omni's own."""
        return abstract.AttentionMetadata

    @staticmethod
    def get_builder_cls() -> None:
        """None: models build the metadata of diffusion attention themselves."""
        return None

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Every size, which an empty list says; where a kernel lacks one, the call is dense."""
        return []

    @classmethod
    def validate_available(cls) -> None:
        """Look at the version of vLLM-Omni and at the settings before a model is made.

        Raises:
            DiffpatchError: vLLM-Omni is another than expected, or the settings cannot work.
        """
        check_version()
        _engine(os.environ.get(SETTINGS, "{}"))


class VllmOmniAttention(abstract.AttentionImpl):
    """Attention of one layer, (B, S, H, D) in and out.

    Args:
        num_heads: heads of this device's queries.
        head_size: channels of each.
        softmax_scale: the factor on q·k.
        causal: whether keys are seen up to the query alone; such a layer stays dense.
        num_kv_heads: heads of its keys and values, or None for as many.
        prefix: the layer's place in the model, which holds its number.
        qkv_layout: the order of the axes, or None for "BSND".
        backend_kwargs: options that vLLM-Omni knows of other backends.

    Raises:
        DiffpatchError: the sequence is cut so that no call sees all of it, or options of another
            backend are given, or those of ours cannot work.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        check_version()
        if backend_kwargs:
            raise BadParameter(
                f"{', '.join(backend_kwargs)} are options of other backends: those of {NAME} are in"
                f" the environment variable {SETTINGS}"
            )
        self.engine = _engine(os.environ.get(SETTINGS, "{}"))
        self.scale, self.causal, self.layout = softmax_scale, causal, qkv_layout or "BSND"
        self.layer = layer_number(prefix)
        self.some_heads = _shares_heads()
        default, _ = get_attn_backend_for_role("self", head_size)
        masked = default if default.supports_attention_mask() else SDPABackend
        self.dense, self.masked = (
            kind.get_impl_cls()(
                num_heads=num_heads, head_size=head_size, softmax_scale=softmax_scale,
                causal=causal, num_kv_heads=num_kv_heads, prefix=prefix, qkv_layout=qkv_layout,
            )
            for kind in (default, masked)
        )  # fmt: skip

    def forward_cuda(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: Any = None,
    ) -> torch.Tensor:
        """One call; ROCm and MUSA come here, too."""
        mask = None if attn_metadata is None else attn_metadata.attn_mask

        def dense() -> torch.Tensor:
            backend = self.dense if mask is None else self.masked
            out: torch.Tensor = backend.forward(query, key, value, attn_metadata)
            return out

        grid = self._grid(query.shape[1], attn_metadata)
        keys = None if isinstance(grid, str) else _keys(query, grid, attn_metadata)
        context = _context()
        place = CallPlace(
            self.layer, context and context.denoise_step_idx,
            context and context.total_denoise_steps, some_heads=self.some_heads,
        )  # fmt: skip
        return self.engine.attend(query, key, value, grid, place, dense, self.scale, keys)

    forward_npu = forward_cuda
    forward_xpu = forward_cuda

    def _grid(self, tokens: int, metadata: Any) -> Grid | str:
        """Where the tokens of a call stand, or why it is dense."""
        layout = getattr(metadata, "video_layout", None)
        if layout is None:
            return "the model publishes no video_layout for these calls"
        if self.causal or self.layout.upper() != "BSND":
            return f"a layer with causal={self.causal} and qkv_layout={self.layout!r}"
        if metadata.full_attn_spans is not None or metadata.joint_query is not None:
            return "attention in pieces or with joined tensors of its own"
        mask = metadata.attn_mask
        if mask is not None and (mask.ndim != 2 or mask.dtype != torch.bool):
            return f"the model's own mask {tuple(mask.shape)} of {mask.dtype}"
        boundaries = metadata.extra.get("cu_seqlens_q")
        if boundaries is not None and len(boundaries) > 3:
            return "several documents in one sequence"
        spans = [(s.start, s.latent_grid) for s in layout.video_spans]
        if not spans and layout.latent_grid is not None:
            spans = [(layout.prefix_len or 0, layout.latent_grid)]
        used = metadata.extra.get("max_seqlen_q", layout.used_len)
        if layout.used_len is not None and used != layout.used_len:
            return f"a layout of {layout.used_len} tokens in a document of {used}"
        return _packed(spans, tokens)


def check_version() -> None:
    """Look whether vLLM-Omni hands over what is read.

    Raises:
        DiffpatchError: it does not; names its version and what is missing.
    """
    for name, fields in _FIELDS.items():
        kind = getattr(abstract, name, None) or getattr(forward_context, name, None)
        known = {f.name for f in dataclasses.fields(kind)} if kind is not None else set()
        for missing in [field for field in fields if field not in known]:
            raise _changed(f"{name}.{missing}")
    arguments = inspect.signature(abstract.AttentionImpl.__init__).parameters
    for missing in [name for name in _ARGUMENTS if name not in arguments]:
        raise _changed(f"the argument {missing} of AttentionImpl")


def _changed(what: str) -> DiffpatchError:
    version = importlib.metadata.version("vllm-omni")
    return DiffpatchError(
        f"vLLM-Omni {version} has no {what}: {NAME} was written for 0.30; install that, or a"
        " newer diffpatch"
    )


@functools.lru_cache(maxsize=1)  # all layers of a process share its patterns
def _engine(settings: str) -> EngineAttention:
    """The method of the environment variable.

    Raises:
        BadParameter: it is not JSON, or asks for what cannot work.
    """
    try:
        params = json.loads(settings)
    except json.JSONDecodeError as error:
        raise BadParameter(f"{SETTINGS}={settings!r} must be JSON ({error})") from None
    if not isinstance(params, dict):
        raise BadParameter(f'{SETTINGS}={settings!r} must be like {{"method": "radial"}}')
    told = Told(layers=True, steps=True, totals=True)
    return EngineAttention(params.pop("method", "radial"), told, **params)


def _shares_heads() -> bool:
    """Whether this device has some of the heads.

    Raises:
        DiffpatchError: the sequence is cut so that no call sees all of it.
    """
    config = getattr(get_current_diffusion_config_or_none(), "parallel_config", None)
    for what in ("ring_degree", "allgather_degree"):
        if (degree := getattr(config, what, 1)) > 1:
            raise DiffpatchError(
                f"{what}={degree}: such a call never sees the whole sequence; use {NAME} with"
                " ulysses_degree alone"
            )
    sizes = (getattr(config, name, 1) for name in ("ulysses_degree", "tensor_parallel_size"))
    return any(size > 1 for size in sizes)


def _context() -> Any:
    available = forward_context.is_forward_context_available()
    return forward_context.get_forward_context() if available else None


def _packed(spans: list[tuple[int, tuple[int, int, int]]], tokens: int) -> Grid | str:
    """A sequence with grids at some places, everything else being seen by everybody."""
    parts: list[int | tuple[int, int, int]] = []
    end = 0
    for start, grid in sorted(spans):
        if start < end:
            return f"a layout whose videos overlap at token {start}"
        parts += [start - end] if start > end else []
        parts.append((int(grid[0]), int(grid[1]), int(grid[2])))
        end = start + math.prod(grid)
    if end > tokens or not spans:
        return f"a layout of {end} tokens with {len(spans)} videos in a sequence of {tokens}"
    return PackedGrid((*parts, tokens - end) if tokens > end else tuple(parts)).simplest()


def _keys(query: torch.Tensor, grid: Grid, metadata: Any) -> torch.Tensor | None:
    """bool (B, S): without padding, which is what stands behind the used length."""
    mask: torch.Tensor | None = metadata.attn_mask
    used, tokens = metadata.video_layout.used_len, query.shape[1]
    if used is None and isinstance(grid, TokenGrid) and metadata.video_layout.latent_grid:
        used = tokens - grid.text_after
    if used is None or used == tokens:
        return mask
    keys = (torch.arange(tokens, device=query.device) < used).expand(query.shape[0], -1)
    return keys if mask is None else keys & mask
