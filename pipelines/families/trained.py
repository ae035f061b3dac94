"""What public checkpoints were trained at, as their model cards and papers say it.

In tokens: 81 frames of 480×832 pixels are 21×30×52 for Wan 2.1, whose tokens are 4 frames of 16×16.
Where a checkpoint was trained at several sizes, the largest stands here.
"""

from __future__ import annotations

from diffpatch.pipelines.families.info import Trained

WAN = (
    Trained(21, 30, 52, heads=12),  # 2.1 1.3B: 81 frames of 480×832
    Trained(21, 45, 80, heads=40),  # 2.1 14B and 2.2 A14B: 81 of 720×1280
    Trained(31, 22, 40, heads=24),  # 2.2 5B: 121 of 704×1280, tokens of 32×32
    Trained(33, 16, 16, heads=3),  # the built-in demo: 13 and 33 of 128×128, tokens of 1×8×8
    Trained(21),
)
HUNYUAN = (Trained(33, 45, 80),)  # 129 frames of 720×1280
HUNYUAN_15 = (Trained(33),)  # of 480p and 720p, in checkpoints that look alike
COGVIDEOX = (
    Trained(11, 48, 85, time_patch=2),  # 1.5: 81 frames of 768×1360, two latent frames a token
    Trained(13, 30, 45),  # 1.0: 49 of 480×720
)
LTX = (Trained(21, 16, 22),)  # 161 frames of 512×704, tokens of 8×32×32
SKYREELS = (Trained(25),)  # 97 frames of 540p and 720p, in checkpoints that look alike
MINIMAX_H3 = (Trained(102),)  # 345 frames, up to 15 seconds, in frames of several sizes
FLUX = (Trained(1, 88, 88),)  # up to 2 megapixels, 1408×1408, tokens of 16×16
SD3 = (Trained(1, 64, 64),)  # 1024×1024
QWEN_IMAGE = (Trained(1, 83, 83),)  # 1328×1328
Z_IMAGE = (Trained(1, 64, 64),)  # 1024×1024
