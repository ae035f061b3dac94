"""The classes that SGLang loads by name; importing this needs SGLang."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.multimodal_gen.runtime.layers.attention.backends import attention_backend as abstract
from sglang.multimodal_gen.runtime.layers.attention.backends.sdpa import SDPAImpl
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum

from diffpatch.adapters.engine import CallPlace, EngineAttention, Told, layer_number
from diffpatch.adapters.sglang import MEMBER
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.patterns.grid import TokenGrid

_ARGUMENTS = ("num_heads", "head_size", "softmax_scale", "causal", "num_kv_heads", "prefix")
# What SGLang hands to builders of the backend we stand for, and is not ours.
_OTHERS = ("skip_first_steps", "sparsity")


class SGLangBackend(abstract.AttentionBackend):
    """What the plug-in puts in the place of `MEMBER`."""

    @staticmethod
    def get_enum() -> Any:
        """The member it stands for."""
        return AttentionBackendEnum[MEMBER]

    @staticmethod
    def get_impl_cls() -> type[SGLangAttention]:
        """What computes."""
        return SGLangAttention

    @staticmethod
    def get_metadata_cls() -> type[Metadata]:
        """What a call is told."""
        return Metadata

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        """What makes that, once a step."""
        return MetadataBuilder


@dataclasses.dataclass
class Metadata(abstract.AttentionMetadata):
    """What a call is told.

    Attributes:
        current_timestep: number of the denoising step, from 0.
        sizes: frames, rows and columns of tokens; None where the latents are not a video's.
    """

    current_timestep: int
    sizes: tuple[int, int, int] | None = None


class MetadataBuilder(abstract.AttentionMetadataBuilder):
    """What makes the metadata of a step."""

    def build(
        self,
        current_timestep: int = 0,
        raw_latent_shape: Sequence[int] = (),
        patch_size: Sequence[int] | int = 1,
        **others: Any,
    ) -> Metadata:
        """From the shape of the latents (B, C, T, H, W) and the size of a patch (t, h, w)."""
        if len(raw_latent_shape) != 5:
            return Metadata(current_timestep)
        sides = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
        frames, height, width = (
            -(-int(n) // int(side)) for n, side in zip(raw_latent_shape[2:], sides, strict=True)
        )
        return Metadata(current_timestep, (frames, height, width))


class SGLangAttention(abstract.AttentionImpl):
    """Attention of one layer, (B, S, H, D) in and out.

    Args:
        num_heads: heads of this device's queries.
        head_size: channels of each.
        softmax_scale: the factor on q·k.
        causal: whether keys are seen up to the query alone; such a layer stays dense.
        num_kv_heads: heads of its keys and values, or None for as many.
        prefix: the layer's place in the model, which holds its number.

    Raises:
        DiffpatchError: SGLang is another than expected, or its configuration cannot work.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra: Any,
    ) -> None:
        check_version()
        self.engine, self.text = _engine(json.dumps(_configuration(), sort_keys=True))
        self.scale, self.causal, self.layer = softmax_scale, causal, layer_number(prefix)
        self.dense = SDPAImpl(
            num_heads=num_heads, head_size=head_size, softmax_scale=softmax_scale, causal=causal,
            num_kv_heads=num_kv_heads, prefix=prefix, **extra,
        )  # fmt: skip

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: Any
    ) -> torch.Tensor:
        """One call."""

        def dense() -> torch.Tensor:
            out: torch.Tensor = self.dense.forward(query, key, value, attn_metadata)
            return out

        step = getattr(attn_metadata, "current_timestep", None)
        place = CallPlace(self.layer, step, some_heads=_ulysses_degree() > 1)
        grid = self._grid(query.shape[1], attn_metadata)
        return self.engine.attend(query, key, value, grid, place, dense, self.scale)

    def forward_varlen(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Packed sequences, whose places nothing tells: dense."""
        self.engine.dense_because("several documents in one sequence")
        out: torch.Tensor = self.dense.forward_varlen(query, *args, **kwargs)
        return out

    def _grid(self, tokens: int, metadata: Any) -> TokenGrid | str:
        """Where the tokens of a call stand, or why it is dense."""
        if self.causal:
            return "a causal layer"
        if not isinstance(metadata, Metadata) or metadata.sizes is None:
            return "SGLang does not tell the size of the video to these calls"
        frames, height, width = metadata.sizes
        rest = tokens - frames * height * width
        if rest < 0:
            return f"a sequence of {tokens} tokens does not hold the grid {metadata.sizes}"
        if rest and self.text is None:
            return f'where {rest} more tokens stand is not known: configure "text"'
        before = rest if self.text == "before" else 0
        return TokenGrid(frames, height, width, before, rest - before)


def check_version() -> None:
    """Look whether SGLang hands over what is read.

    Raises:
        DiffpatchError: it does not; names its version and what is missing.
    """
    missing = [f"AttentionBackendEnum.{MEMBER}"] if MEMBER not in _names() else []
    arguments = inspect.signature(abstract.AttentionImpl.__init__).parameters
    missing += [f"the argument {n} of AttentionImpl" for n in _ARGUMENTS if n not in arguments]
    fields = {field.name for field in dataclasses.fields(abstract.AttentionMetadata)}
    missing += [] if "current_timestep" in fields else ["AttentionMetadata.current_timestep"]
    if missing:
        version = importlib.metadata.version("sglang")
        raise DiffpatchError(
            f"SGLang {version} has no {missing[0]}: this backend was written for 0.5.23; install"
            " that, or a newer diffpatch"
        )


def _names() -> Sequence[str]:
    return list(AttentionBackendEnum.__members__)


def _configuration() -> dict[str, Any]:
    """What the user wrote as attention-backend-config."""
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args

    return dict(getattr(get_global_server_args(), "attention_backend_config", None) or {})


def _ulysses_degree() -> int:
    """How many devices share the heads."""
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    asked: Callable[[], int] = parallel_state.get_ulysses_parallel_world_size
    return asked() if parallel_state.model_parallel_is_initialized() else 1


@functools.lru_cache(maxsize=1)  # all layers of a process share its patterns
def _engine(settings: str) -> tuple[EngineAttention, str | None]:
    """The method of the configuration, and where text stands.

    Raises:
        BadParameter: it asks for what cannot work.
    """
    params = {k: v for k, v in json.loads(settings).items() if k not in _OTHERS}
    text = params.pop("text", None)
    if text not in (None, "before", "after"):
        raise BadParameter(f'text={text!r} in the configuration must be "before" or "after"')
    told = Told(layers=True, steps=True)
    return EngineAttention(params.pop("method", "radial"), told, **params), text
