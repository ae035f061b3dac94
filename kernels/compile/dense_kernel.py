"""Dense attention in plain Triton, to hold the machine code of our kernels against."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dense_kernel(
    Q, K, V, OUT, scale_log2, stride_qs, stride_ks, stride_vs, tokens,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, all keys; tokens are whole blocks."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, column = tl.arange(0, SIZE), tl.arange(0, BLOCK_N)
    q = tl.load(Q + row[:, None] * stride_qs + channel[None, :])
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, SIZE], tl.float32)
    for start in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):
        key = start + column
        k = tl.load(K + key[:, None] * stride_ks + channel[None, :])
        v = tl.load(V + key[:, None] * stride_vs + channel[None, :])
        scores = tl.dot(q, tl.trans(k))
        new = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        top = new
    out = out / total[:, None]
    at = row[:, None].to(tl.int64) * SIZE + channel[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty))
