"""Which GPU a Triton kernel is launched on."""

from __future__ import annotations

import contextlib

import torch


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of a tensor the current one: Triton launches there, whatever its arguments say.

    Without it a model on a second GPU ends in "cannot be accessed from Triton". Does nothing for
    tensors elsewhere.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
