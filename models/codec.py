"""Images to latents and back: the FLUX autoencoder, or a training-free block cosine transform.

Both have `encode`: (B, 3, H, W) in [-1, 1] -> (B, 16, H/8, W/8), about zero mean and unit variance,
and `decode`, its inverse up to the codec's error. Latents are packed 2x2 for the transformer.

Dimension key:  B batch   H, W pixels   h, w latent pixels (8 x 8)   N tokens (16 x 16 pixels)
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 16
VAE_SCALE = 8  # pixels per latent pixel, in each direction
TOKEN = 16  # pixels per packed token, in each direction

# The first coefficients of JPEG's zig-zag: (vertical, horizontal) frequency.
LUMA = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
CHROMA = LUMA[:3]

# Deviation of each channel over visible | infrared diptychs (RoadScene and MSRS, 256 x 256 panels).
STD_LUMA = [7.4, 0.92, 0.84, 0.46, 0.42, 0.57, 0.38, 0.29, 0.27, 0.29]
STD_CHROMA = [0.68, 0.13, 0.11, 0.35, 0.08, 0.07]
MEAN = [-4.7, *[0.0] * 9, 0.1, 0.0, 0.0, -0.17, 0.0, 0.0]


class DctCodec(nn.Module):
    """Orthonormal 8x8 block DCT of three orthonormal colour axes, keeping 10 + 3 + 3 coefficients:
    a training-free codec with the latent shape of the FLUX autoencoder.

    Source: Ahmed, Natarajan, Rao 1974 (the transform); colour axes as in Ohta et al. 1980.
    """

    channels = CHANNELS

    def __init__(self):
        super().__init__()
        self.register_buffer("basis", _dct_basis(), persistent=False)  # (16, 3, 8, 8)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, -1, 1, 1), persistent=False)
        self.register_buffer(
            "std", torch.tensor(STD_LUMA + STD_CHROMA).view(1, -1, 1, 1), persistent=False
        )

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 16, H/8, W/8) fp32; outside of autocast."""
        with torch.autocast(image.device.type, enabled=False):
            coefficients = F.conv2d(image.float(), self.basis, stride=VAE_SCALE)
            return (coefficients - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 16, h, w) -> (B, 3, 8h, 8w), about [-1, 1]: the transpose of the basis."""
        with torch.autocast(latents.device.type, enabled=False):
            coefficients = latents.float() * self.std + self.mean
            return F.conv_transpose2d(coefficients, self.basis, stride=VAE_SCALE)

    def identity(self) -> str:
        """Equal for codecs that give equal latents."""
        return digest(self)


class FluxCodec(nn.Module):
    """The autoencoder of FLUX.1 (diffusers' AutoencoderKL), shifted and scaled by its config."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        if vae.config.latent_channels != CHANNELS:
            raise ValueError(
                f"the autoencoder has {vae.config.latent_channels} latent channels,"
                f" FLUX has {CHANNELS}"
            )
        self.vae = vae.requires_grad_(False).eval()
        self.shift, self.scale = vae.config.shift_factor, vae.config.scaling_factor

    def encode(self, image: Tensor) -> Tensor:
        """The mode of the posterior: an image always has the same latents (and can be cached)."""
        with torch.autocast(image.device.type, enabled=False):
            latents = self.vae.encode(image.to(self.vae.dtype)).latent_dist.mode()
        return (latents.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 16, h, w) -> (B, 3, 8h, 8w) fp32; image by image, to save memory."""
        latents = (latents / self.scale + self.shift).to(self.vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            images = [self.vae.decode(x).sample for x in latents.split(1)]
        return torch.cat(images).float()

    def identity(self) -> str:
        """Equal for codecs that give equal latents."""
        return f"{digest(self)} {self.shift} {self.scale}"


def digest(module: nn.Module) -> str:
    """Class name and sha256 of all weights and buffers, including those not in checkpoints."""
    digest = hashlib.sha256()
    for name, x in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"{type(module).__name__} {digest.hexdigest()}"


def _dct_basis() -> Tensor:
    """(16, 3, 8, 8): one orthonormal 8x8 colour pattern per latent channel."""
    n = torch.arange(VAE_SCALE, dtype=torch.float64)
    wave = torch.cos(math.pi * (2 * n[None] + 1) * n[:, None] / (2 * VAE_SCALE)) * math.sqrt(
        2 / VAE_SCALE
    )
    wave[0] /= math.sqrt(2)
    axes = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True)
    chosen = [(axes[0], c) for c in LUMA] + [(a, c) for a in axes[1:] for c in CHROMA]
    patterns = [torch.einsum("c,i,j->cij", axis, wave[v], wave[u]) for axis, (v, u) in chosen]
    return torch.stack(patterns).float()


def check_size(H: int, W: int) -> None:
    """Raises: ValueError: a side is not a multiple of 16."""
    if H % TOKEN or W % TOKEN:
        raise ValueError(f"image sides must be multiples of {TOKEN}, got {H}x{W} (data.size)")


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C): each 2x2 patch becomes one token."""
    B, C, h, w = latents.shape
    patches = latents.reshape(B, C, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, (h // 2) * (w // 2), C * 4)


def unpack(tokens_BNC: Tensor, h: int, w: int) -> Tensor:
    """(B, N, 4C) -> (B, C, h, w), the inverse of `pack`."""
    B, _, C = tokens_BNC.shape
    patches = tokens_BNC.reshape(B, h // 2, w // 2, C // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(B, C // 4, h, w)
