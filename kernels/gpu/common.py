"""What the GPU kernels of every operator share: constants, head sizes, kinds of tensor cores."""

from __future__ import annotations

MAX_HEAD_SIZE = 256
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# A finite start of a running maximum: exp2(-inf - START) is 0 where -inf - -inf would be NaN.
START = -1.0e30
# Compute capabilities, as `support.arch` gives them, whose tensor cores read shared memory.
ASYNC_TENSOR_CORE = (90, 100)


def padded(size: int) -> int:
    """The channels that a kernel computes for a head size: a power of two, 64 at least."""
    return max(64, 1 << (size - 1).bit_length())
