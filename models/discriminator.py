"""A patch discriminator, which makes samples sharp: it sees photograph and infrared image.

Isola et al. 2017 (arXiv:1611.07004, Sec. 3.2.2), with a norm that treats every place alone.

Dimension key:  B batch   H, W pixels   h, w patches
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

WIDTHS = (64, 128, 256, 512)


class Verdict(NamedTuple):
    """Scores (B, 1, h, w), high for what looks real, and the distance between the features."""

    real: Tensor
    generated: Tensor  # its gradient reaches the discriminator alone
    persuasion: Tensor  # of the same images; its gradient reaches the generator alone
    feature_distance: Tensor  # (B,) mean absolute difference of the maps inside; generator alone


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every place of (B, C, h, w), in the input's dtype.

    Fast where channels lie beside each other in memory (channels_last); GroupNorm copies there.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps)
        return x.movedim(-1, 1)


class Discriminator(nn.Module):
    """(B, 3, H, W) photographs and (B, 1, H, W) infrared images, both in [0, 1] -> scores."""

    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(4, WIDTHS[0], 4, 2, 1), nn.LeakyReLU(0.2))]
        for a, b in pairwise(WIDTHS):
            stride = 1 if b == WIDTHS[-1] else 2
            conv = nn.Conv2d(a, b, 4, stride, 1)
            layers.append(nn.Sequential(conv, ChannelNorm(b), nn.LeakyReLU(0.2)))
        self.layers = nn.ModuleList(layers)
        self.score = nn.Conv2d(WIDTHS[-1], 1, 4, 1, 1)

    def forward(self, visible: Tensor, infrared: Tensor) -> list[Tensor]:
        """The maps of every layer and, last, the scores."""
        x, maps = torch.cat([visible, infrared], dim=1) * 2 - 1, []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return [*maps, self.score(x)]

    def judge(self, visible: Tensor, infrared: Tensor, generated: Tensor) -> Verdict:
        """Both sides of the game in one call, so that one backward pass trains both.

        Args: infrared, generated: (B, 1, H, W), true and generated; the latter with its gradient.
        """
        *real_maps, real = self(visible, infrared)
        *_, rejected = self(visible, generated.detach())
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        *maps, persuasion = functional_call(self, frozen, (visible, generated))
        distances = [(a - b.detach()).abs().mean((1, 2, 3)) for a, b in zip(maps, real_maps)]
        return Verdict(real, rejected, persuasion, torch.stack(distances).mean(0))
