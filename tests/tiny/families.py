"""The matrix: what each family's tiny pipeline must look like from outside, written down by hand.

Nothing here uses diffpatch's own table. Where a visual token stands follows from the family's own
packing of latents (`Case.touch`), and the rest from its transformer's code.
"""

from __future__ import annotations

from tests.tiny import images as images
from tests.tiny import more as more
from tests.tiny import packed as mixed
from tests.tiny import videos as videos
from tests.tiny.family_case import Case, last_item, last_video, latents, listed, packed, row


def _paths(*names: str, each: int = 2) -> tuple[str, ...]:
    return tuple(n.format(i) for n in names for i in range(each))


VIDEO = (3, 4, 6)
IMAGE = (1, 4, 6)
CROSS = _paths("transformer_blocks.{}.attn1")
JOINT = _paths("transformer_blocks.{}.attn")
WAN = _paths("blocks.{}.attn1")
TWO_KINDS = _paths("transformer_blocks.{}.attn", "single_transformer_blocks.{}.attn", each=1)
TEXT = frozenset({8})

_packed_image = packed("FluxPipeline", IMAGE)
_bcfhw, _bchw = latents("BCFHW"), latents("BCHW")

CASES: dict[str, Case] = {
    "wan": Case(videos.wan, "WanTransformer3DModel", WAN, VIDEO, _bcfhw),
    "wan-vace": Case(
        videos.wan_vace,
        "WanVACETransformer3DModel",
        (*WAN, "vace_blocks.0.attn1"),
        (4, 4, 6),
        _bcfhw,
    ),
    "wan-animate": Case(videos.wan_animate, "WanAnimateTransformer3DModel", WAN, VIDEO, _bcfhw),
    "skyreels": Case(videos.skyreels, "SkyReelsV2Transformer3DModel", WAN, VIDEO, _bcfhw),
    "hunyuan": Case(
        videos.hunyuan, "HunyuanVideoTransformer3DModel", TWO_KINDS, VIDEO, _bcfhw, after=TEXT
    ),
    "hunyuan15": Case(
        videos.hunyuan15,
        "HunyuanVideo15Transformer3DModel",
        JOINT,
        VIDEO,
        latents("BCFHW", p=1),
        after=frozenset({4 + 8 + 8}),
    ),
    "cogvideox": Case(
        videos.cogvideox, "CogVideoXTransformer3DModel", CROSS, VIDEO, latents("BFCHW"), before=8
    ),
    "cogvideox15": Case(
        videos.cogvideox15,
        "CogVideoXTransformer3DModel",
        CROSS,
        (2, 4, 6),
        latents("BFCHW", t=2),
        before=8,
    ),
    "mochi": Case(
        videos.mochi,
        "MochiTransformer3DModel",
        CROSS,
        VIDEO,
        _bcfhw,
        after=frozenset({5, 3}),
    ),
    "ltx": Case(
        videos.ltx, "LTXVideoTransformer3DModel", CROSS, VIDEO, packed("LTXPipeline", VIDEO)
    ),
    "ltx-condition": Case(
        videos.ltx_condition,
        "LTXVideoTransformer3DModel",
        CROSS,
        (3, 4, 8),
        packed("LTXPipeline", (3, 4, 8), before=32),
        before=32,
    ),
    "ltx2": Case(
        videos.ltx2,
        "LTX2VideoTransformer3DModel",
        CROSS,
        VIDEO,
        packed("LTXPipeline", VIDEO),
        after=frozenset({24}),
    ),
    "cosmos": Case(videos.cosmos, "CosmosTransformer3DModel", CROSS, VIDEO, _bcfhw),
    "cosmos25": Case(videos.cosmos25, "CosmosTransformer3DModel", CROSS, VIDEO, _bcfhw),
    "kandinsky": Case(
        videos.kandinsky,
        "Kandinsky5Transformer3DModel",
        _paths("visual_transformer_blocks.{}.self_attention"),
        VIDEO,
        latents("BFHWC"),
    ),
    "allegro": Case(videos.allegro, "AllegroTransformer3DModel", CROSS, VIDEO, _bcfhw),
    "latte": Case(
        videos.latte,
        "LatteTransformer3DModel",
        _paths("transformer_blocks.{}.attn1", each=1),
        IMAGE,
        _bcfhw,
    ),
    "flux": Case(images.flux, "FluxTransformer2DModel", TWO_KINDS, IMAGE, _packed_image, before=8),
    "flux-kontext": Case(
        images.flux_kontext,
        "FluxTransformer2DModel",
        TWO_KINDS,
        IMAGE,
        _packed_image,
        before=8,
        after=frozenset({24}),
    ),
    "flux2": Case(
        images.flux2,
        "Flux2Transformer2DModel",
        TWO_KINDS,
        IMAGE,
        packed("Flux2Pipeline", IMAGE),
        before=8,
    ),
    "flux2-references": Case(
        images.flux2_references,
        "Flux2Transformer2DModel",
        TWO_KINDS,
        IMAGE,
        packed("Flux2Pipeline", IMAGE),
        before=8,
        after=frozenset({12}),
    ),
    "chroma": Case(
        images.chroma, "ChromaTransformer2DModel", TWO_KINDS, IMAGE, _packed_image, before=8
    ),
    "sd3": Case(
        images.sd3,
        "SD3Transformer2DModel",
        (*JOINT, "transformer_blocks.0.attn2"),
        IMAGE,
        _bchw,
        after=frozenset({8, 0}),
    ),
    "pixart": Case(images.pixart, "PixArtTransformer2DModel", CROSS, IMAGE, _bchw),
    "qwen": Case(images.qwen, "QwenImageTransformer2DModel", JOINT, IMAGE, _packed_image, before=8),
    "qwen-edit": Case(
        images.qwen_edit,
        "QwenImageTransformer2DModel",
        JOINT,
        IMAGE,
        _packed_image,
        before=8,
        after=frozenset({15}),
    ),
    "z-image": Case(
        images.z_image,
        "ZImageTransformer2DModel",
        _paths("layers.{}.attention"),
        IMAGE,
        listed,
        after=frozenset({8 + 64}),
    ),
    "hidream": Case(
        images.hidream,
        "HiDreamImageTransformer2DModel",
        ("double_stream_blocks.0.block.attn1", "single_stream_blocks.0.block.attn1"),
        IMAGE,
        _bchw,
        after=frozenset({40 + 24}),
    ),
    "lumina2": Case(
        images.lumina2,
        "Lumina2Transformer2DModel",
        _paths("layers.{}.attn"),
        IMAGE,
        _bchw,
        before=None,
    ),
    "auraflow": Case(
        images.auraflow,
        "AuraFlowTransformer2DModel",
        _paths("joint_transformer_blocks.{}.attn", "single_transformer_blocks.{}.attn", each=1),
        IMAGE,
        _bchw,
        before=16,
    ),
    "hunyuan-dit": Case(images.hunyuan_dit, "HunyuanDiT2DModel", WAN, IMAGE, _bchw),
    "dit": Case(images.dit, "DiTTransformer2DModel", CROSS, (1, 4, 4), _bchw),
    "chronoedit": Case(more.chronoedit, "ChronoEditTransformer3DModel", WAN, VIDEO, _bcfhw),
    "anyflow": Case(more.anyflow, "AnyFlowTransformer3DModel", WAN, VIDEO, latents("BFCHW")),
    "consisid": Case(
        more.consisid, "ConsisIDTransformer3DModel", CROSS, VIDEO, latents("BFCHW"), before=8
    ),
    "easyanimate": Case(
        more.easyanimate, "EasyAnimateTransformer3DModel", CROSS, VIDEO, _bcfhw, before=13
    ),
    "cogview4": Case(more.cogview4, "CogView4Transformer2DModel", CROSS, IMAGE, _bchw, before=8),
    "cogview3": Case(
        more.cogview3, "CogView3PlusTransformer2DModel", CROSS, IMAGE, _bchw, before=8
    ),
    "bria": Case(more.bria, "BriaTransformer2DModel", TWO_KINDS, IMAGE, _packed_image, before=8),
    "longcat": Case(
        more.longcat, "LongCatImageTransformer2DModel", TWO_KINDS, IMAGE, _packed_image, before=8
    ),
    "ovis": Case(
        more.ovis, "OvisImageTransformer2DModel", TWO_KINDS, IMAGE, _packed_image, before=8
    ),
    "hunyuan-image": Case(
        more.hunyuan_image,
        "HunyuanImageTransformer2DModel",
        TWO_KINDS,
        IMAGE,
        _bchw,
        after=frozenset({12}),
    ),
    "bria-fibo": Case(
        more.bria_fibo, "BriaFiboTransformer2DModel", TWO_KINDS, IMAGE, _packed_image, before=8
    ),
    "bria-fibo2": Case(
        more.bria_fibo2,
        "BriaFibo2Transformer2DModel",
        _paths("layers.{}.attention"),
        IMAGE,
        _bchw,
        before=8,
        after=frozenset({6}),
    ),
    "glm-image": Case(more.glm_image, "GlmImageTransformer2DModel", CROSS, IMAGE, _bchw, before=8),
    "ernie-image": Case(
        more.ernie_image,
        "ErnieImageTransformer2DModel",
        _paths("layers.{}.self_attention"),
        IMAGE,
        _bchw,
        after=TEXT,
    ),
    "motif-video": Case(
        more.motif_video,
        "MotifVideoTransformer3DModel",
        ("transformer_blocks.0.attn", *_paths("single_transformer_blocks.{}.attn")),
        VIDEO,
        _bcfhw,
        after=frozenset({8, 72}),
    ),
    "joy-image": Case(
        more.joy_image,
        "JoyImageEditTransformer3DModel",
        _paths("double_blocks.{}.attn"),
        IMAGE,
        last_item,
        after=frozenset({24 + 8}),
    ),
    "joy-image-plus": Case(
        more.joy_image_plus,
        "JoyImageEditPlusTransformer3DModel",
        _paths("double_blocks.{}.attn"),
        IMAGE,
        _packed_image,
        after=frozenset({6 + 2 + 8}),
    ),
    "krea2": Case(more.krea2, "Krea2Transformer2DModel", JOINT, IMAGE, _packed_image, before=8),
    "kandinsky6": Case(
        more.kandinsky6,
        "Kandinsky6Transformer3DModel",
        _paths("visual_transformer_blocks.{}.video_dec_block.self_attention"),
        VIDEO,
        latents("BFHWC"),
    ),
    "flux3": Case(
        more.flux3,
        "Flux3Transformer2DModel",
        _paths("mode_blocks.image.{}.attn", "single_transformer_blocks.{}.attn", each=1),
        IMAGE,
        _packed_image,
        before=None,
    ),
    "lumina-next": Case(
        more.lumina_next,
        "LuminaNextDiT2DModel",
        _paths("layers.{}.attn1"),
        IMAGE,
        _bchw,
    ),
    "minimax-h3": Case(
        mixed.minimax_h3,
        "MiniMaxH3Transformer3DModel",
        JOINT,
        VIDEO,
        row(6, first=48),
        before=7 + 48 + 10,
    ),
    "minimax-h3-references": Case(
        mixed.minimax_h3_references,
        "MiniMaxH3Transformer3DModel",
        JOINT,
        VIDEO,
        row(6, first=6 + 60),
        spans=(7 + 6 + 6 + 4, (4, 3, 5), 10, VIDEO),
    ),
    "cosmos3": Case(
        mixed.cosmos3,
        "Cosmos3OmniTransformer",
        _paths("layers.{}.self_attn"),
        VIDEO,
        last_video,
        before=7,
        after=frozenset({5}),
        silent=7,
    ),
    "cosmos3-videos": Case(
        mixed.cosmos3_videos,
        "Cosmos3OmniTransformer",
        _paths("layers.{}.self_attn"),
        VIDEO,
        last_video,
        spans=(7, (4, 3, 5), VIDEO, 5),
        silent=7,
    ),
    "cosmos3-pipeline": Case(
        mixed.cosmos3_pipeline,
        "Cosmos3OmniTransformer",
        _paths("layers.{}.self_attn"),
        VIDEO,
        last_video,
        before=5,
        silent=5,
    ),
    "framepack": Case(
        mixed.framepack,
        "HunyuanVideoFramepackTransformer3DModel",
        TWO_KINDS,
        VIDEO,
        _bcfhw,
        before=2 + 6 + 24,
        after=frozenset({2 + 5}),
    ),
    "helios": Case(mixed.helios, "HeliosTransformer3DModel", WAN, VIDEO, _bcfhw, before=2 + 6 + 24),
    "helios-pipeline": Case(
        mixed.helios_pipeline, "HeliosTransformer3DModel", WAN, (9, 4, 6), _bcfhw, before=None
    ),
    "qwen21": Case(
        mixed.qwen21,
        "QwenImage21Transformer2DModel",
        JOINT,
        IMAGE,
        row(6, first=8),
        before=5 + 8 + 3,
        silent=16,
    ),
    "qwen21-pipeline": Case(
        mixed.qwen21_pipeline,
        "QwenImage21Transformer2DModel",
        JOINT,
        IMAGE,
        row(6),
        before=8,
        silent=8,
    ),
    "prx": Case(
        mixed.prx,
        "PRXTransformer2DModel",
        _paths("blocks.{}.attention"),
        IMAGE,
        _bchw,
        before=8,
        silent=8,
    ),
    "nucleus": Case(
        mixed.nucleus,
        "NucleusMoEImageTransformer2DModel",
        JOINT,
        IMAGE,
        row(6),
        after=TEXT,
        silent=-8,
    ),
}
