"""A backend for vLLM-Omni's diffusion models: ``DIFFPATCH`` among its attention backends.

Install diffpatch beside it, ``pip install "diffpatch[vllm-omni]"``: vLLM-Omni finds it by itself,
by the entry point ``vllm_omni.general_plugins`` (if ``VLLM_PLUGINS`` is set, add ``diffpatch`` to
it). Choose it for self-attention. The method and its schedule come from an environment variable,
because vLLM-Omni hands options to backends of its own alone::

    export DIFFPATCH_ATTENTION='{"method": "radial", "dense_steps": 0.2, "dense_layers": 1}'
    vllm serve Wan-AI/Wan2.2-T2V-A14B-Diffusers --omni \\
        --diffusion-attention-config.per_role.self.backend DIFFPATCH

Names in the variable: ``method``, ``dense_steps``, ``dense_last_steps`` (a count, or a fraction of
the run), ``dense_layers`` (a count), ``backend`` (of the kernel), and the parameters of the method.

Which calls are sparse: those of models that publish `video_layout` (Wan 2.2, MiniMax-H3): with
text, audio and references exact for everybody, and each of several videos sparse in its own grid.
All others go to the backend that the platform would have used, or to torch where that one takes no
mask; the log says once why. Ulysses works, for methods whose pattern is the same for all heads;
ring attention and gathered keys, which never show a backend the whole sequence, are refused.
Methods that carry something from step to step (``temporal``) are refused: vLLM-Omni does not tell
a backend which request and which guidance branch a call belongs to.

Written for vLLM-Omni 0.30 and tested with its own registry, selector, CUDA platform and attention
layer, on a CPU, over a stand-in for vLLM itself; another version is checked for what is needed of
it, and the first thing missing is named.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

NAME = "DIFFPATCH"
SETTINGS = "DIFFPATCH_ATTENTION"
_PATH = "diffpatch.adapters.vllm_omni.backend.VllmOmniBackend"


def register() -> None:
    """Offer the backend; vLLM-Omni calls this in each of its processes, and twice does no harm.

    Raises nothing: diffpatch may be installed for something else.
    """
    try:
        from aenum import extend_enum
        from vllm_omni.diffusion.attention.backends import registry
    except ImportError as error:
        logger.warning(
            "diffpatch: %s is not offered to vLLM-Omni (%s): pip install 'diffpatch[vllm-omni]'",
            NAME, error,
        )  # fmt: skip
        return
    members = registry.DiffusionAttentionBackendEnum
    if NAME not in members.__members__:
        extend_enum(members, NAME, _PATH)
    registry.register_diffusion_backend(members[NAME], _PATH)
