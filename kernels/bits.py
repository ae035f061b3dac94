"""Booleans packed into the bits of 32-bit words, as kernels read element masks."""

from __future__ import annotations

import torch

WORD = 32  # bits in a mask word


def pack_words(seen: torch.Tensor) -> torch.Tensor:
    """Booleans (..., n) -> int32 words (..., ceil(n / 32)), bit 0 first, the last one filled up
    with zeros."""
    grown = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % WORD))
    bits = torch.arange(WORD, device=seen.device)
    words = (grown.unflatten(-1, (-1, WORD)).long() << bits).sum(-1)
    # As a signed number, the last bit counts negative.
    return (words - ((words >> (WORD - 1)) << WORD)).int()
