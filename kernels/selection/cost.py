"""What a choice of tiles costs beside the attention that follows it: a model, not a measurement.

    python -m diffpatch.kernels.selection.cost

It counts the bytes and operations of each kernel and divides them by what a card can do and by the
fractions of that which such kernels usually attain. It says where time would go, not how much.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

HALVINGS = 16  # of `choose_kernel` for 1,200 strips with normal scores: 11 to 18 on average
PER_HALVING = 2  # integer instructions for each strip: compare and select


class Card(NamedTuple):
    """What a card can do in a second at its boost clock, by its data sheet.

    Attributes:
        memory: bytes.
        tensor: bf16 operations of its tensor cores, without sparsity.
        integer: integer operations, one for each lane.
    """

    name: str
    memory: float
    tensor: float
    integer: float


CARDS = {
    "H200": Card("H200", 4.8e12, 989e12, 132 * 64 * 1.98e9),
    "RTX 4090": Card("RTX 4090", 1.008e12, 165e12, 128 * 64 * 2.52e9),
}
# What kernels attain of it: streaming, tensor cores in attention and in small products, integers.
STREAMING, ATTENTION, PRODUCTS, INTEGERS = 0.8, 0.6, 0.3, 0.6


class ChoiceCost(NamedTuple):
    """Modelled seconds of each part, and of the exact attention to what is chosen."""

    pooling: float
    scores: float
    choosing: float
    attention: float

    @property
    def share(self) -> float:
        """The choice as a fraction of the attention."""
        return (self.pooling + self.scores + self.choosing) / self.attention


def cost(
    card: Card,
    tokens: int,
    heads: int,
    size: int,
    kept: float,
    *,
    tile: int = 128,
    strip: int = 64,
    rest: str = "virtual",
) -> ChoiceCost:
    """Model one call of batch 1 in bf16 with the rule "error".

    Args:
        card: what it runs on.
        tokens: of the sequence.
        heads: of queries, keys and values alike.
        size: channels of a head.
        kept: fraction of the pairs that is computed exactly.
        tile: queries of a tile.
        strip: keys of a strip.
        rest: "virtual" or "drop": what becomes of the others.
    """
    rows, strips = -(-tokens // tile), -(-tokens // strip)
    pairs = float(heads) * rows * strips
    moments = 8.0 * heads * size * (rows + 2 * strips)  # a mean and a variance in fp32
    read = 3 * 2.0 * tokens * heads * size
    pooling = (read + moments) / (STREAMING * card.memory)
    # Products in tf32 run at half of the rate of bf16, and one of three times the precision is
    # three of them: means by means; then squares by variances, and where tiles are dropped two
    # products with the mean values.
    products = 2.0 * pairs * size * (4 if rest == "virtual" else 6)
    scores = products / (PRODUCTS * card.tensor / 2) + 4 * pairs / (STREAMING * card.memory)
    held = float(1 << (strips - 1).bit_length())
    work = heads * rows * held * HALVINGS * PER_HALVING / (INTEGERS * card.integer)
    choosing = work + (4 + 1 + 1) * pairs / (STREAMING * card.memory)
    attention = 4.0 * heads * size * kept * float(tokens) ** 2 / (ATTENTION * card.tensor)
    return ChoiceCost(pooling, scores, choosing, attention)


CALLS = (
    ("75,600 tokens, 40 heads (Wan-14B, 720p)", 75600, 40, 128, 0.1),
    ("32,760 tokens, 12 heads (Wan-1.3B, 480p)", 32760, 12, 128, 0.1),
    ("115,200 tokens, 24 heads (HunyuanVideo)", 115200, 24, 128, 0.1),
)


def table() -> str:
    """The calls of `CALLS` on every card, in Markdown."""
    lines = [
        "| call, 10 % kept | card | rest | pooling | scores | choosing | attention | share |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, tokens, heads, size, kept in CALLS:
        for card in CARDS.values():
            for rest in ("virtual", "drop"):
                found = cost(card, tokens, heads, size, kept, rest=rest)
                times = " | ".join(f"{1e3 * seconds:.2f} ms" for seconds in found)
                lines.append(f"| {name} | {card.name} | {rest} | {times} | {found.share:.1%} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints the table."""
    argparse.ArgumentParser(description="What a choice of tiles costs: a model.").parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
