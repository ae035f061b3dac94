"""What families do around attention: classifier-free guidance, regional compilation, several GPUs.

Known of diffusers' own pipelines and models; the tests look it up there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What differs beside the row of a family.

    Attributes:
        guidance: how its pipelines ask with and without the prompt: "batch" (one forward of both),
            "calls" (a forward each), "distilled" (the model was taught to need one forward, a call
            each where a true scale is given), or "" where no test knows.
        regional: whether diffusers can compile its blocks alone (`compile_repeated_blocks`);
            others compile whole.
        ulysses: whether its sequence can be cut over several GPUs by diffusers' own plan.
    """

    guidance: str = ""
    regional: bool = False
    ulysses: bool = False


TRAITS: dict[str, Traits] = {}
