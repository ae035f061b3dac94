"""Other ways in than `diffpatch.patch`, for people whose engine has a slot for attention.

====================  ============================================================================
`diffusers_backend`   `set_attention_backend` of diffusers, and of cache-dit
`comfyui`             a node for ComfyUI
`vllm_omni`           an attention backend of vLLM-Omni, found by its plug-in loader
`sglang`              one of SGLang-diffusion's, found by its plug-in loader
`xdit`                a method in the place of one of xDiT's backends
`engine`              what all of them do with a call
====================  ============================================================================

Nothing happens at import, and none of the engines is imported before it is asked for. `patch` knows
more (layers, steps, models, masks): where the engine is diffusers, prefer it.
"""
