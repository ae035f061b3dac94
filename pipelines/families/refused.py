"""The families that cannot be patched, and why."""

from __future__ import annotations

from diffpatch.pipelines.families.info import FamilyInfo

LINEAR = "its self-attention is already linear in the tokens: there is nothing to leave out"
SOUND = "it makes sound, whose tokens are a line and not the grid of an image or video"
PIECES = "it makes one piece of a video after the other, over keys cached from those before"


def _refused(name: str, transformer: str, kind: str, why: str) -> FamilyInfo:
    return FamilyInfo(
        name, transformer, kind, refused=why, guidance="", regional=False, ulysses=False
    )


REFUSED = (
    _refused("Sana", "SanaTransformer2DModel", "image", LINEAR),
    _refused("Sana Video", "SanaVideoTransformer3DModel", "video", LINEAR),
    _refused(
        "Sana-WM",
        "SanaWMTransformer3DModel",
        "video",
        "most of its layers are linear in the tokens, and none has a processor to swap",
    ),
    _refused(
        "Sana-WM refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        "video",
        PIECES,
    ),
    _refused("AnyFlow FAR", "AnyFlowFARTransformer3DModel", "video", PIECES),
    _refused(
        "Wan Animate 2",
        "WanAnimate2Transformer3DModel",
        "video",
        "every frame asks cached keys of its own reference frame, by a BlockMask",
    ),
    _refused(
        "Kandinsky 6 SR",
        "Kandinsky6SRTransformer3DModel",
        "video",
        "its attention is sparse by itself, in windows",
    ),
    _refused(
        "OmniGen",
        "OmniGenTransformer2DModel",
        "image",
        "its text is causal, by a mask of tokens × tokens that differs from call to call",
    ),
    _refused(
        "Ideogram 4",
        "Ideogram4Transformer2DModel",
        "image",
        "it packs several samples into one sequence, by a mask of tokens × tokens",
    ),
    _refused("ACE-Step", "AceStepTransformer1DModel", "audio", SOUND),
    _refused("LongCat-Audio", "LongCatAudioDiTTransformer", "audio", SOUND),
    _refused("MiniMax Music 3", "MiniMaxMusic3Transformer1DModel", "audio", SOUND),
    _refused("Stable Audio", "StableAudioDiTModel", "audio", SOUND),
    _refused("Stable Audio 3", "StableAudio3DiTModel", "audio", SOUND),
)
