"""A transformer between convolutions, without a codec, for a model trained from scratch.

    photograph, noisy infrared, stage 1's maps -> convolutions -> 16 x 16 pixel tokens
    -> transformer -> convolutions, with skips from the first ones -> infrared

Convolutions cross the borders of tokens, so no grid of squares can appear, and the skips carry the
photograph's edges at full resolution. (A U-Net with a transformer at its lowest level, as in
arXiv:2105.05233 and arXiv:2209.12152.)

Dimension key:  B batch   H, W pixels   h, w tokens of 16 pixels   I channels of a token
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import Backbone, Condition
from models.codec import check_size
from models.discriminator import ChannelNorm
from models.flux import random_flux

# channels at 1/1, 1/2, 1/4 and 1/8 of the size, and of a token
WIDTHS = {"demo": (16, 24, 48, 64, 128)}
USUAL_WIDTHS = (48, 64, 128, 256, 256)
SEEN_CHANNELS = 3 + 1 + 1 + 1 + 8  # photograph, noisy infrared, fused, intensity, context
SCALES = (2, 4, 8, 16)  # pixels: noise of these sizes is added to that of single pixels


class Pixels(Backbone):
    """The state is the infrared image itself, (B, H W, 1) in [-1, 1]."""

    needs_trained_base = True

    def __init__(self, codec: nn.Module, preset: str | None = None):
        super().__init__(nn.Identity())
        self.convolutions = Convolutions(WIDTHS.get(preset, USUAL_WIDTHS))

    @classmethod
    def random(cls, preset: str, dtype: torch.dtype, device) -> nn.Module:
        width = WIDTHS.get(preset, USUAL_WIDTHS)[-1]
        return random_flux(preset, dtype, device, width, width, zero_output=False)

    def state_shape(self, H: int, W: int) -> tuple[int, int]:
        check_size(H, W)
        return H * W, 1

    def encode(self, visible: Tensor, infrared: Tensor) -> Tensor:
        return infrared.mean(1).flatten(1)[..., None].float() * 2 - 1

    def known(self, visible: Tensor) -> Tensor:
        return visible

    def decode(self, state: Tensor, size: tuple[int, int]) -> Tensor:
        return (state.float() + 1).view(-1, 1, *size) / 2

    def shape_noise(self, white: Tensor, size: tuple[int, int]) -> Tensor:
        """Equal parts of noise at every scale: white noise alone is too unlike a scene."""
        white = white.view(-1, 1, *size)
        total = white
        for k in SCALES:
            coarse = F.avg_pool2d(white, k) * k  # standard normal again
            total = total + F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        return (total / (1 + len(SCALES)) ** 0.5).flatten(1)[..., None]

    def tokens(self, noisy: Tensor, condition: Condition) -> tuple[Tensor, list[Tensor]]:
        (intensity, _, context), fused = condition.stage1
        heat = intensity if fused is None else fused.mean(1, keepdim=True)
        noisy = noisy.view_as(intensity)
        seen = [condition.known * 2 - 1, noisy, heat * 2 - 1, intensity * 2 - 1, context]
        *skips, x = self.convolutions.inward(torch.cat(seen, dim=1))
        return x.flatten(2).mT, skips

    def output(self, tokens: Tensor, kept: list[Tensor], condition: Condition) -> Tensor:
        H, W = condition.size
        x = tokens.mT.unflatten(2, (H // 16, W // 16))
        return self.convolutions.outward(x, kept).float().flatten(1)[..., None]


class Convolutions(nn.Module):
    """The convolutions around the transformer; the last layer starts at zero."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        *of_maps, of_token = widths
        self.first = Block(SEEN_CHANNELS, widths[0])
        self.down = nn.ModuleList(Block(a, b, stride=2) for a, b in pairwise(of_maps))
        self.to_tokens = nn.Conv2d(of_maps[-1], of_token, 3, stride=2, padding=1)
        self.up = nn.ModuleList(Block(a + b, b) for a, b in pairwise(widths[::-1]))
        self.last = nn.Conv2d(widths[0], 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def inward(self, x: Tensor) -> list[Tensor]:
        """(B, 14, H, W) -> maps of 1/1 to 1/8 of the size, and tokens (B, I, h, w)."""
        maps = [self.first(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        return [*maps, self.to_tokens(maps[-1])]

    def outward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Tokens (B, I, h, w) and the maps of `inward` -> (B, 1, H, W)."""
        for up, skip in zip(self.up, reversed(skips)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = up(torch.cat([x, skip], dim=1))
        return self.last(x)


class Block(nn.Sequential):
    """Two convolutions, each followed by ChannelNorm and SiLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        layers: list[nn.Module] = []
        for before, step in ((channels_in, stride), (channels_out, 1)):
            conv = nn.Conv2d(before, channels_out, 3, stride=step, padding=1)
            layers += [conv, ChannelNorm(channels_out), nn.SiLU()]
        super().__init__(*layers)
