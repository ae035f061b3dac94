"""The names that options offer.

Each is defined by the module that knows what it means, and those load torch, which --help must not
wait for. `tests/cli/test_help.py` compares them.
"""

BACKENDS = (
    "auto", "triton", "triton-int8", "triton-fp8", "gluon", "flex", "torch", "torch-int8",
    "torch-fp8", "reference",
)  # fmt: skip
QUALITIES = ("high", "balanced", "fast")
DTYPES = ("fp32", "bf16", "fp16")
OFFLOADS = ("none", "model", "sequential", "group")
VIDEO_FORMATS = ("mp4", "gif", "webp", "apng", "png")
# Of `plan`.
PICTURES = ("tiles", "query", "distance")
DEVICES = ("4090", "a100", "cpu", "h100", "h200", "l40s")
# Of `bench kernels`.
PARTS = ("checks", "kernels", "choices", "steps")
SHAPES = (
    "hunyuan", "wan-720p", "wan-480p", "flux-1k", "flux-4k", "h3-38k", "h3-104k", "hunyuan-sliding",
    "wan-720p-natten", "wan-720p-sliding", "wan-480p-natten", "flux-4k-natten", "flux-4k-sliding",
    "small-25%", "small-10%", "small-25%-d128", "small-10%-d128", "small-radial", "small-sliding",
)  # fmt: skip
LAYOUTS = ("permuted", "gather", "ordered")
LOADS = ("auto", "pointer", "tma")
