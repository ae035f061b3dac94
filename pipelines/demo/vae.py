"""A linear video autoencoder, written into a stock ``AutoencoderKLWan`` without any training.

The codes are the leading principal components of 8x8 RGB patches. Three facts let a network of
norms and activations compute a linear map almost exactly (to about 0.2 %):

* one channel holds a large constant, so the root-mean-square norm divides by nearly the same
  number everywhere;
* each component is carried twice, as +u and -u, and ``silu(u) - silu(-u) = u``;
* residual branches and attention end in zero weights, so they add nothing.

The decoder's last convolution is a least-squares fit on 3x3 neighbouring codes, which smooths the
seams between patches. Time is not compressed: one latent frame per frame.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify
from torch import Tensor
from torch.nn import functional

from diffpatch.pipelines.demo import clips

PATCH = 8
LATENT_CHANNELS = 16
WIDTH = 40
CONSTANT = 256.0
WHITENING = 0.35
"""Latent channels are scaled to std**0.35: large components stay larger than fine detail."""


def build_vae(seed: int = 5, fit_clips: int = 160) -> AutoencoderKLWan:
    """Compute the autoencoder from freshly drawn clips (a few seconds on a CPU).

    Args:
        seed: Seed of the clips that the components are fitted to.
        fit_clips: How many clips to fit to, at each of the sizes 128 and 64 px.

    Returns:
        The autoencoder in float32, with ``latents_mean`` and ``latents_std`` set.
    """
    generator = torch.Generator().manual_seed(seed)
    patches = [_patches(fit_clips, size, generator) for size in (128, 64)]
    rows = torch.cat([p.movedim(1, -1).flatten(0, 2) for p in patches])
    mean = rows.mean(dim=0)
    variance, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    basis = basis.flip(1)[:, :LATENT_CHANNELS].contiguous()
    spread = variance.flip(0)[:LATENT_CHANNELS].sqrt()
    kernel, bias = _fit_decoder(patches, rows, basis, mean)

    wanted = spread**WHITENING
    wanted = wanted / wanted.square().mean().sqrt()
    vae = AutoencoderKLWan(
        base_dim=WIDTH,
        decoder_base_dim=WIDTH,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1],
        num_res_blocks=0,
        attn_scales=[],
        temperal_downsample=[],
        patch_size=PATCH,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[round(v, 5) for v in (spread / wanted).tolist()],
    )
    _write(vae, basis, mean, kernel, bias)
    return vae.eval()


def encoder_matrix(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Read the encoder back as one affine map from patch pixels to normalised latents.

    Returns:
        Matrix ``[16, 192]`` and offset ``[16]``, float32, on the autoencoder's device.
    """
    conv: Any = vae.encoder.conv_in
    config: Any = vae.config
    matrix = conv.weight[:LATENT_CHANNELS, :, 2, 1, 1].detach().float()
    offset = conv.bias[:LATENT_CHANNELS].detach().float()
    mean = torch.tensor(config.latents_mean, device=offset.device)
    std = torch.tensor(config.latents_std, device=offset.device)
    return matrix / std[:, None], (offset - mean) / std


def encode(video: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Encode frames with the affine map of `encoder_matrix`, far faster than the network.

    Args:
        video: ``[B, 3, F, H, W]`` in [-1, 1]; H and W multiples of 8.
        matrix: ``[16, 192]``.
        offset: ``[16]``.

    Returns:
        Normalised latents ``[B, 16, F, H/8, W/8]``.
    """
    codes = torch.einsum("bcfhw,zc->bzfhw", patchify(video, PATCH), matrix)
    return codes + offset.view(1, -1, 1, 1, 1)


def _patches(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw one random frame of each of ``count`` clips as ``[count, 192, size/8, size/8]``."""
    scenes = clips.draw_scenes(clips.sample_specs(count, generator), generator)
    times = torch.rand(count, 1, generator=generator)
    return patchify(clips.render(scenes, times, size), PATCH)[:, :, 0]


def _fit_decoder(
    patches: list[Tensor], rows: Tensor, basis: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit patch pixels to the codes of the 3x3 neighbourhood by ridge regression.

    Returns:
        Kernel ``[192, 16, 3, 3]`` and bias ``[192]``.
    """
    inputs = []
    for batch in patches:
        codes = torch.einsum("nchw,cz->nzhw", batch - mean.view(1, -1, 1, 1), basis)
        # Zero padding outside the canvas is what the network's own convolution will see.
        inputs.append(functional.unfold(codes, 3, padding=1).movedim(1, -1).flatten(0, 1))
    design = torch.cat(inputs)
    design = torch.cat([design, torch.ones(len(design), 1)], dim=1)
    ridge = 1e-2 * torch.eye(design.shape[1])
    solution = torch.linalg.solve(design.T @ design + ridge, design.T @ rows)
    kernel = solution[:-1].view(LATENT_CHANNELS, 3, 3, -1).permute(3, 0, 1, 2)
    return kernel, solution[-1]


@torch.no_grad()
def _write(vae: Any, basis: Tensor, mean: Tensor, kernel: Tensor, bias: Tensor) -> None:
    """Write the linear maps into the weights of the encoder and the decoder."""
    channels = LATENT_CHANNELS
    identity = torch.eye(channels)
    encoder, decoder = vae.encoder, vae.decoder
    for half in (encoder, decoder):
        _linearise(half)
    for sign, first in ((1.0, 0), (-1.0, channels)):
        pair = slice(first, first + channels)
        encoder.conv_in.weight[pair, :, 2, 1, 1] = sign * basis.T
        encoder.conv_in.bias[pair] = -sign * (basis.T @ mean)
        encoder.conv_out.weight[:channels, pair, 2, 1, 1] = sign * identity
        decoder.conv_in.weight[pair, :, 2, 1, 1] = sign * identity
        decoder.conv_out.weight[:, pair, 2] = sign * kernel
    encoder.conv_out.bias[channels:] = -30.0  # log-variance: the code has no noise
    decoder.conv_out.bias.copy_(bias)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0]).view_as(conv.weight))
        conv.bias.zero_()


def _linearise(half: Any) -> None:
    """Make an encoder or decoder the identity between its first and last convolution."""
    constant = 2 * LATENT_CHANNELS  # the channel that holds the constant
    gain = torch.full((WIDTH,), CONSTANT / WIDTH**0.5)
    gain[constant] = WIDTH**-0.5
    unused = [block for block in half.modules() if type(block).__name__ == "WanResidualBlock"]
    for module in (*unused, *half.mid_block.attentions):
        for layer in module.children():
            if hasattr(layer, "weight"):
                layer.weight.zero_()
                layer.bias.zero_()
    half.norm_out.gamma.copy_(gain.view_as(half.norm_out.gamma))
    for conv in (half.conv_in, half.conv_out):
        conv.weight.zero_()
        conv.bias.zero_()
    half.conv_in.bias[constant] = CONSTANT
