"""What families do around attention: classifier-free guidance, regional compilation, several GPUs.

Known of diffusers' own pipelines and models, and written down so that the table of families costs
no import of them; the tests look every one of these facts up there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What differs beside the row of a family.

    Attributes:
        guidance: how its pipelines ask with and without the prompt: "batch" (one forward of both),
            "calls" (a forward each), "distilled" (the model was taught to need one forward, a call
            each where a true scale is given), or "" where diffusers has no pipeline for it.
        regional: whether diffusers can compile its blocks alone (`compile_repeated_blocks`);
            others compile whole.
        ulysses: whether its sequence can be cut over several GPUs by diffusers' own plan.
    """

    guidance: str = ""
    regional: bool = False
    ulysses: bool = False


TRAITS: dict[str, Traits] = {
    "WanTransformer3DModel": Traits("calls", regional=True, ulysses=True),
    "WanVACETransformer3DModel": Traits("calls", regional=True),
    "WanAnimateTransformer3DModel": Traits("calls", regional=True),
    "HunyuanVideoTransformer3DModel": Traits("distilled", regional=True),
    "HunyuanVideo15Transformer3DModel": Traits("calls", regional=True),
    "CogVideoXTransformer3DModel": Traits("batch"),
    "MochiTransformer3DModel": Traits("batch"),
    "LTXVideoTransformer3DModel": Traits("batch", regional=True, ulysses=True),
    "LTX2VideoTransformer3DModel": Traits("batch", regional=True, ulysses=True),
    "CosmosTransformer3DModel": Traits("calls"),
    "SkyReelsV2Transformer3DModel": Traits("calls", regional=True),
    "Kandinsky5Transformer3DModel": Traits("calls", regional=True),
    "AllegroTransformer3DModel": Traits("batch"),
    "LatteTransformer3DModel": Traits("batch"),
    "FluxTransformer2DModel": Traits("distilled", regional=True, ulysses=True),
    "Flux2Transformer2DModel": Traits("distilled", regional=True, ulysses=True),
    "SD3Transformer2DModel": Traits("batch"),
    "PixArtTransformer2DModel": Traits("batch"),
    "QwenImageTransformer2DModel": Traits("calls", regional=True, ulysses=True),
    "ZImageTransformer2DModel": Traits("batch", regional=True),
    "HiDreamImageTransformer2DModel": Traits("batch"),
    "Lumina2Transformer2DModel": Traits("calls"),
    "AuraFlowTransformer2DModel": Traits("batch"),
    "HunyuanDiT2DModel": Traits("batch"),
    "ChromaTransformer2DModel": Traits("calls", regional=True),
    "DiTTransformer2DModel": Traits("batch"),
    "ChronoEditTransformer3DModel": Traits("calls", regional=True, ulysses=True),
    "AnyFlowTransformer3DModel": Traits("batch", regional=True),
    "ConsisIDTransformer3DModel": Traits("batch"),
    "EasyAnimateTransformer3DModel": Traits("batch"),
    "CogView4Transformer2DModel": Traits("calls"),
    "CogView3PlusTransformer2DModel": Traits("batch"),
    "BriaTransformer2DModel": Traits("batch"),
    "LongCatImageTransformer2DModel": Traits("calls", regional=True),
    "OvisImageTransformer2DModel": Traits("calls", regional=True),
    "HunyuanImageTransformer2DModel": Traits("calls", regional=True),
    "BriaFiboTransformer2DModel": Traits("batch", regional=True),
    "BriaFibo2Transformer2DModel": Traits("calls", regional=True),
    "GlmImageTransformer2DModel": Traits("calls", regional=True),
    "ErnieImageTransformer2DModel": Traits("batch", regional=True),
    "MotifVideoTransformer3DModel": Traits("calls", regional=True),
    "JoyImageEditTransformer3DModel": Traits("calls", regional=True),
    "JoyImageEditPlusTransformer3DModel": Traits("batch", regional=True),
    "Krea2Transformer2DModel": Traits("calls", regional=True),
    "Kandinsky6Transformer3DModel": Traits("calls", regional=True),
    "Flux3Transformer2DModel": Traits(regional=True),
    "LuminaNextDiT2DModel": Traits("batch"),
}
