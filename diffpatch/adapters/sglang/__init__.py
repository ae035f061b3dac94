"""A backend for SGLang-diffusion: what its ``block_sparse_attn`` computes on CUDA is diffpatch.

SGLang's list of backends is closed, but its plug-ins may change what one of them is. On CUDA,
``block_sparse_attn`` is nothing (it is a kernel of Ascend), and SGLang already hands a backend of
that name the size of the latents. Install diffpatch beside SGLang, which finds it by the entry
point ``sglang.multimodal_gen.plugins`` (if ``SGLANG_PLUGINS`` is set, add ``diffpatch`` to it)::

    sglang serve --model-path Wan-AI/Wan2.1-T2V-14B-Diffusers \\
        --attention-backend block_sparse_attn \\
        --attention-backend-config '{"method": "radial", "dense_steps": 10, "dense_layers": 1}'

Names in the configuration: ``method``, ``dense_steps`` and ``dense_layers`` (counts), ``text``
("before" or "after": where tokens that are not of the video stand, for models that have such),
``backend`` (of the kernel), and the parameters of the method.

Calls that do not fit (cross-attention, which SGLang gives another backend by itself, other sizes,
packed sequences) are computed by torch, dense, and the log says once why. Ulysses works for methods
whose pattern is the same for all heads; ring attention is refused by SGLang, because the backend
says that it cannot. Fractions of steps and ``temporal`` are refused: SGLang does not tell a backend
how many steps there are, nor which request a call belongs to.

Written for SGLang 0.5.23 and tested, on a CPU, with its own plug-in loader, hooks, CUDA platform
and attention classes, over what stands in for three packages that these import and do not use; not
tested in a running server. Another version is checked for what is needed of it.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

MEMBER = "BLOCK_SPARSE_ATTN"
TARGET = "sglang.multimodal_gen.runtime.platforms.cuda.CudaPlatformBase.get_attn_backend_cls_str"
_PATH = "diffpatch.adapters.sglang.backend.SGLangBackend"


def register() -> None:
    """Stand in for `MEMBER`; SGLang calls this in each of its processes.

    Raises nothing: diffpatch may be installed for something else.
    """
    try:
        from sglang.multimodal_gen.runtime.platforms.plugins import HookType, plugin_hook
    except ImportError as error:
        logger.warning(
            "diffpatch: %s stays SGLang's own (%s): this was written for SGLang 0.5.23", MEMBER,
            error,
        )  # fmt: skip
        return

    @plugin_hook(TARGET, HookType.AROUND)
    def choose(original: Any, *args: Any, **kwargs: Any) -> Any:
        asked = [getattr(value, "name", None) for value in (*args, *kwargs.values())]
        return _PATH if MEMBER in asked else original(*args, **kwargs)
