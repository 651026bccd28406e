"""FLUX.1-Fill in two layouts: the infrared beside the photograph, or in the same tokens.

diptych    one picture [visible | infrared], its right half masked: what Fill was made for
channels   one picture, all of it masked, the photograph where Fill expects the masked picture:
           half the tokens, and every token is aligned with its own place in the photograph

    tokens = [noisy latents 64 | latents of the masked picture 64 | mask 256]

Dimension key:  B batch   H, W pixels of one panel   N tokens of 16 x 16 pixels
"""

import torch
from torch import Tensor

from models.backbones.base import Backbone, Condition, grid_ids
from models.codec import CHANNELS, TOKEN, VAE_SCALE, check_size, pack, unpack


class FillDiptych(Backbone):
    """The state is the whole diptych, (B, N, 64) packed latents; its left half is known."""

    panels = 2

    def state_shape(self, H: int, W: int) -> tuple[int, int]:
        return tokens_shape(H, W)

    def encode(self, visible: Tensor, infrared: Tensor) -> Tensor:
        return pack(self.codec.encode(compose_diptych(visible, infrared))).float()

    def known(self, visible: Tensor) -> Tensor:
        """The latents of the diptych whose infrared half is mid grey."""
        return self.encode(visible, torch.full_like(visible, 0.5))

    def decode(self, state: Tensor, size: tuple[int, int]) -> Tensor:
        H, W = size
        latents = unpack(state, H // VAE_SCALE, 2 * W // VAE_SCALE)
        return infrared_panel(self.codec.decode(latents))

    def painted(self, H: int, W: int, device=None) -> Tensor:
        return in_infrared_panel(H, W, device)

    def tokens(self, noisy: Tensor, condition: Condition) -> tuple[Tensor, None]:
        mask = pack_mask(*condition.size, noisy.device).expand(len(noisy), -1, -1)
        return torch.cat([noisy, condition.known, mask], dim=-1), None

    def ids(self, H: int, W: int, device=None) -> Tensor:
        return token_positions(H, W, device)

    def places(self, H: int, W: int, device=None) -> Tensor:
        places = self.ids(H, W, device)[:, 1:]
        places[:, 1] %= W // TOKEN
        return places


class FillChannels(Backbone):
    """The state is the infrared image, (B, N, 64) packed latents."""

    def state_shape(self, H: int, W: int) -> tuple[int, int]:
        N, C = tokens_shape(H, W)
        return N // 2, C

    def encode(self, visible: Tensor, infrared: Tensor) -> Tensor:
        check_size(*infrared.shape[-2:])
        return pack(self.codec.encode(infrared * 2 - 1)).float()

    def known(self, visible: Tensor) -> Tensor:
        """The latents of the photograph."""
        return self.encode(visible, visible)

    def decode(self, state: Tensor, size: tuple[int, int]) -> Tensor:
        H, W = size
        image = self.codec.decode(unpack(state, H // VAE_SCALE, W // VAE_SCALE))
        return (image.mean(1, keepdim=True) + 1) / 2

    def tokens(self, noisy: Tensor, condition: Condition) -> tuple[Tensor, None]:
        mask = noisy.new_ones(*noisy.shape[:2], self.in_channels - 2 * noisy.shape[2])
        return torch.cat([noisy, condition.known, mask], dim=-1), None


def compose_diptych(visible: Tensor, infrared: Tensor) -> Tensor:
    """[visible | infrared], both (B, 3, H, W) in [0, 1] -> (B, 3, H, 2W) in [-1, 1].

    Raises: ValueError: the shapes differ, or a side is no multiple of 16.
    """
    if visible.shape != infrared.shape or visible.shape[1] != 3:
        raise ValueError(f"need two (B, 3, H, W), got {visible.shape=}, {infrared.shape=}")
    check_size(*visible.shape[-2:])
    return torch.cat([visible, infrared], dim=-1) * 2 - 1


def infrared_panel(diptych: Tensor) -> Tensor:
    """The right half of a diptych (B, 3, H, 2W) in [-1, 1]: (B, 1, H, W), about [0, 1]."""
    panel = diptych[..., diptych.shape[-1] // 2 :].mean(1, keepdim=True)
    return (panel + 1) / 2


def pack_mask(H: int, W: int, device=None) -> Tensor:
    """The mask of a diptych of panels H x W, 1 = infrared half, packed: (1, N, 256) fp32.

    FLUX.1-Fill sees the mask at full resolution: the 8x8 pixels behind a latent pixel become 64
    channels.
    """
    mask = torch.zeros(1, H, 2 * W, device=device)
    mask[..., W:] = 1
    h, w = H // VAE_SCALE, 2 * W // VAE_SCALE
    pixels = mask.reshape(1, h, VAE_SCALE, w, VAE_SCALE)
    pixels = pixels.permute(0, 2, 4, 1, 3).reshape(1, VAE_SCALE * VAE_SCALE, h, w)
    return pack(pixels)


def token_positions(H: int, W: int, device=None) -> Tensor:
    """(N, 3) fp32 ids (0, row, column) of one continuous token grid over the diptych."""
    return grid_ids(H, 2 * W, device)


def in_infrared_panel(H: int, W: int, device=None) -> Tensor:
    """(N,) bool: True where a token belongs to the right, infrared half."""
    return token_positions(H, W, device)[:, 2] >= W // TOKEN


def tokens_shape(H: int, W: int) -> tuple[int, int]:
    """(N, 64): the packed latents of a diptych of panels H x W.

    Raises: ValueError: a side is no multiple of 16.
    """
    check_size(H, W)
    return 2 * (H // TOKEN) * (W // TOKEN), 4 * CHANNELS
