"""The pocket autoencoder: principal components of 4×4 patches, 3×32×32 pixels to 32×8×8 latents and back.

A learned autoencoder of this size lost what the tasks ask for (engine dots, thin lines); the best linear one keeps it, costs
nothing, and stands in a `StableDiffusionPipeline` like any other `vae`.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput


class PatchVAE(ModelMixin, ConfigMixin):
    """(b, 3, h, w) pixels in [-1, 1] to (b, latent_channels, h/4, w/4) latents of mean variance 1; linear, without noise.

    `block_out_channels` has one entry more than there are halvings of the side: the pipeline reads its scale factor there.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 32,
        patch_size: int = 4,
        block_out_channels: tuple[int, ...] = (1, 1, 1),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.encoder = torch.nn.Conv2d(in_channels, latent_channels, patch_size, stride=patch_size)
        self.decoder = torch.nn.ConvTranspose2d(latent_channels, out_channels, patch_size, stride=patch_size)

    def encode(self, x: torch.Tensor, return_dict: bool = True):  # type: ignore[no-untyped-def]
        mean = self.encoder(x)
        never = torch.full_like(mean, -30.0)  # log-variance: a sample of the posterior is its mean
        posterior = DiagonalGaussianDistribution(torch.cat([mean, never], dim=1))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None):  # type: ignore[no-untyped-def]
        sample = self.decoder(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def fit_patch_vae(images: np.ndarray, latent_channels: int = 32, patch_size: int = 4) -> PatchVAE:
    """Principal components of the patches of (n, h, w, 3) uint8 images.

    Each latent is divided by the square root of its deviation, halfway between raw and whitened: coarse channels keep more
    weight in the loss than fine ones, and no fine one drowns.
    """
    p = patch_size
    pixels = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 127.5 - 1
    patches = pixels.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * p * p)
    mean = patches.mean(0)
    variance, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    variance, components = variance.flip(0)[:latent_channels], components.flip(1)[:, :latent_channels]
    components = components * components.sum(0).sign()
    scale = variance.sqrt().sqrt()
    scale = scale * (variance / scale**2).mean().sqrt()
    vae = PatchVAE(latent_channels=latent_channels, patch_size=p)
    with torch.no_grad():
        vae.encoder.weight.copy_((components / scale).T.reshape(latent_channels, 3, p, p))
        vae.encoder.bias.copy_(-(components / scale).T @ mean)
        vae.decoder.weight.copy_((components * scale).T.reshape(latent_channels, 3, p, p))
        vae.decoder.bias.copy_(mean.view(3, -1).mean(1))
        residual = mean - mean.view(3, -1).mean(1).repeat_interleave(p * p)
        vae.encoder.bias.add_((components / scale).T @ residual)
    return vae.eval()
