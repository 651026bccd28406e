"""FLUX.1-dev and Kontext: the photograph as reference tokens after those of the infrared image.

Their tokens have 64 channels and no mask. As in FLUX.1-Kontext (arXiv:2506.15742, Sec. 3), the
reference has the same rows and columns under another first id.

Dimension key:  B batch   H, W pixels   N tokens of 16 x 16 pixels of one image
"""

import torch
from torch import Tensor

from models.backbones.base import Condition, grid_ids
from models.backbones.fill import FillChannels


class Reference(FillChannels):
    """The state is the infrared image, (B, N, 64); the transformer sees (B, 2 N, 64)."""

    in_channels = 64

    def tokens(self, noisy: Tensor, condition: Condition) -> tuple[Tensor, None]:
        return torch.cat([noisy, condition.known], dim=1), None

    def output(self, tokens: Tensor, kept: None, condition: Condition) -> Tensor:
        return tokens[:, : tokens.shape[1] // 2]

    def ids(self, H: int, W: int, device=None) -> Tensor:
        return torch.cat([grid_ids(H, W, device), grid_ids(H, W, device, image=1)])
