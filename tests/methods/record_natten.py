"""Write tests/methods/natten_masks.json: which keys NATTEN lets each query see, on 36 odd cases.

NATTEN is no requirement of the tests, because its package builds against an installed torch and so
cannot be in the same `pip install` as torch. Record again with ``pip install --no-deps
--no-build-isolation natten`` and ``python -m tests.methods.record_natten``.

The mask is read off NATTEN's output: with zero queries every seen key weighs the same, and with the
identity as values each output row shows which keys those are.
"""

from __future__ import annotations

import base64
import json
import random
import zlib
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).parent / "natten_masks.json"
CASES = 36
MOST_TOKENS = 256  # NATTEN's flexible backend takes heads of up to 512 channels, powers of two


def cases() -> list[dict[str, Any]]:
    """A dozen settings each in one, two and three dimensions, odd ones on purpose."""
    draw, out = random.Random(0), []
    for number in range(CASES):
        dims = number % 3 + 1
        shape = [draw.randint(*((5, 40), (4, 13), (3, 8))[dims - 1]) for _ in range(dims)]
        while torch.tensor(shape).prod() > MOST_TOKENS:
            shape[shape.index(max(shape))] -= 1
        window, stride, dilation, causal = [], [], [], []
        for length in shape:
            window.append(draw.randint(2, length))
            stride.append(draw.randint(1, window[-1]))
            dilation.append(draw.randint(1, max(1, length // window[-1])))
            causal.append(draw.random() < 0.3)
        out.append(
            {
                "shape": shape,
                "window": window,
                "stride": stride,
                "dilation": dilation,
                "causal": causal,
            }
        )
    return out


def pack(mask: torch.Tensor) -> str:
    """A boolean mask as text."""
    bits = mask.flatten().byte()
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    octets = (bits.int() << torch.arange(8)).sum(1).byte().numpy().tobytes()
    return base64.b64encode(zlib.compress(octets, 9)).decode()


def unpack(text: str, tokens: int) -> torch.Tensor:
    """bool (tokens, tokens), the mask that `pack` made text of."""
    octets = torch.tensor(list(zlib.decompress(base64.b64decode(text))))
    bits = (octets[:, None] >> torch.arange(8)) & 1
    return bits.flatten()[: tokens**2].view(tokens, tokens).bool()


def natten_mask(case: dict[str, Any]) -> torch.Tensor:
    """bool (N, N), what NATTEN lets each query see."""
    from natten.functional import neighborhood_attention_generic

    tokens = int(torch.tensor(case["shape"]).prod())
    q = torch.zeros(1, *case["shape"], 1, 2 * MOST_TOKENS)
    v = torch.eye(tokens, 2 * MOST_TOKENS).view(q.shape)
    out = neighborhood_attention_generic(
        q,
        q,
        v,
        kernel_size=tuple(case["window"]),
        stride=tuple(case["stride"]),
        dilation=tuple(case["dilation"]),
        is_causal=tuple(case["causal"]),
        backend="flex-fna",
        torch_compile=False,
    )
    return out.view(tokens, -1)[:, :tokens] > 0


def main() -> None:
    import natten

    recorded = [case | {"mask": pack(natten_mask(case))} for case in cases()]
    lines = ",\n".join(json.dumps(case) for case in recorded)
    FILE.write_text(f'{{"natten": "{natten.__version__}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
