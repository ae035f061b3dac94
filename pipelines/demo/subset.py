"""Running the demo model on some frames of a clip, and what else its training needs.

The frames that are kept carry the rotary position embedding of their true places in the clip, so
what is learned on a few frames holds for the whole clip.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
)
from torch import Tensor

from diffpatch.pipelines.demo import clips

TEXT_SLOTS = 16
LONGEST_TEXT = 512
FINE_GRID = 16  # tokens across the canvas at the resolution of the finished model
HINT_CHANNELS = 7
HINT_BLOCK = 3


def choose_frames(batch: int, keep: int, num_frames: Tensor, generator: torch.Generator) -> Tensor:
    """Chooses frames spread over each clip: one at random from each of ``keep`` equal parts.

    Args:
        batch: Number of clips.
        keep: Frames kept of each; all of them if it equals the length of the clip.
        num_frames: ``[batch]`` lengths of the clips.
        generator: Source of randomness.

    Returns:
        ``[batch, keep]`` frame indices in increasing order (int64).
    """
    edges = torch.arange(keep + 1)[None] * num_frames[:, None] / keep
    first, after = edges[:, :-1].ceil(), edges[:, 1:].ceil()
    draw = torch.rand(batch, keep, generator=generator)
    return (first + (draw * (after - first)).floor()).long()


def rotary_embedding(
    transformer: WanTransformer3DModel, frames: Tensor, grid: int
) -> tuple[Tensor, Tensor]:
    """Compute the rotary embedding of some frames of a clip, as the stock model would.

    Args:
        transformer: The model; its rotary embedding gives the sizes.
        frames: ``[B, K]`` true frame indices.
        grid: Tokens across the canvas; fewer than 16 are placed on the same canvas.

    Returns:
        Cosines and sines, each ``[B, K * grid * grid, 1, head_dim]`` float32.
    """
    rope = transformer.rope
    coarse = FINE_GRID / grid
    place = torch.arange(grid, device=frames.device) * coarse + (coarse - 1) / 2
    shape = (*frames.shape, grid, grid)
    axes = (
        (frames.double()[:, :, None, None], rope.t_dim),
        (place.double()[:, None], rope.h_dim),
        (place.double()[None, :], rope.w_dim),
    )
    angles = []
    for position, dim in axes:
        rates = 10000.0 ** (-torch.arange(0, dim, 2, device=frames.device).double() / dim)
        angle = (position[..., None] * rates).repeat_interleave(2, dim=-1)
        angles.append(angle.expand(*shape, dim))
    angle = torch.cat(angles, dim=-1).flatten(1, 3)[:, :, None]
    return angle.cos().float(), angle.sin().float()


def subset_forward(
    transformer: WanTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    frames: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the stock submodules on some frames of a clip, at their true positions.

    With all frames and a grid of 16 this equals ``transformer(...)``.

    Args:
        transformer: The model, with patch size (1, 1, 1).
        latents: ``[B, 16, K, h, w]`` the kept frames.
        timestep: ``[B]`` noise level times 1000.
        text: ``[B, L, text_dim]``.
        frames: ``[B, K]`` true frame indices of the kept frames.

    Returns:
        The predicted velocity, like ``latents``, and the hidden states ``[B, N, dim]`` after
        block `HINT_BLOCK`.
    """
    rotary = rotary_embedding(transformer, frames, latents.shape[-1])
    hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
    embedded, projected, text, _ = transformer.condition_embedder(timestep, text, None)
    projected = projected.unflatten(1, (6, -1))
    middle = hidden
    for index, block in enumerate(transformer.blocks):
        hidden = block(hidden, text, projected, rotary)
        if index + 1 == HINT_BLOCK:
            middle = hidden
    shift, scale = (transformer.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
    hidden = (transformer.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    velocity = transformer.proj_out(hidden).transpose(1, 2).reshape(latents.shape)
    return velocity, middle


def hints(scenes: clips.Scenes, times: Tensor, grid: int) -> Tensor:
    """What the middle of the network should know about each token: ``[B, N, 7]``.

    The channels are: inside the shape or not, offset from its centre (two, at most half a canvas),
    its radius, and the velocity of its centre (two) and of its radius.
    """
    batch, keep = times.shape
    state = scenes.at(times)[:, :, None, None]
    place = (torch.arange(grid, device=times.device) + 0.5) / grid
    offset_x = (place[None, None, None, :] - state[..., 0]).expand(-1, -1, grid, -1)
    offset_y = (place[None, None, :, None] - state[..., 1]).expand(-1, -1, -1, grid)
    radius = state[..., 2].expand(-1, -1, grid, grid)
    inside = (offset_x.square() + offset_y.square() < radius.square()).float()
    offsets = [4 * offset.clamp(-0.5, 0.5) for offset in (offset_x, offset_y)]
    still = torch.stack([inside, *offsets, 8 * radius - 1.5], dim=-1)
    travel = scenes.travel * torch.tensor([2.0, 2.0, 5.0], device=times.device)
    travel = travel[:, None, None, None].expand(-1, keep, grid, grid, -1)
    return torch.cat([still, travel], dim=-1).reshape(batch, -1, HINT_CHANNELS)


class PaddedTextProcessor(WanAttnProcessor):
    """Cross-attention in which the padding of the text weighs as much as ``bias`` says.

    Pipelines pad prompts with zeros, up to 512 tokens, without a mask. Training with only 16
    slots, whose empty ones weigh as much as a random number of them, makes the model indifferent
    to the amount of padding.
    """

    bias: Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See the base class; the mask is replaced by the bias."""
        states, text = hidden_states, encoder_hidden_states
        result: Tensor = super().__call__(attn, states, text, self.bias, rotary_emb)
        return result


def padding_bias(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The logits ``[B, 1, 1, 16]`` that let padding slots stand for 16 to 512 tokens."""
    words = mask.sum(1, keepdim=True).float()
    draw = torch.rand(len(mask), 1, generator=generator).to(mask.device)
    total = TEXT_SLOTS * (LONGEST_TEXT / TEXT_SLOTS) ** draw
    weight = ((total - words) / (TEXT_SLOTS - words)).clamp(min=1e-3)
    return torch.where(mask > 0, 0.0, weight.log())[:, None, None]
