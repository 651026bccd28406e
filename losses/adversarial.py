"""The game between a generator and a patch discriminator, with the hinge loss.

Lim, Ye 2017 (arXiv:1705.02894); matching the discriminator's features: Wang et al. 2018
(arXiv:1711.11585, Eq. 4).

Dimension key:  B batch   h, w patches
"""

import torch
from torch import Tensor

FEATURES = 10.0  # weight of matching features beside the generator's hinge, as in Wang et al.


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """(B,): scores (B, 1, h, w) of real patches should exceed 1, of generated ones be below -1."""
    loss = torch.relu(1 - real.float()) + torch.relu(1 + generated.float())
    return loss.mean((1, 2, 3))


def generator_loss(persuasion: Tensor, feature_distance: Tensor) -> Tensor:
    """(B,): scores (B, 1, h, w) of generated patches should be high, features (B,) as real ones."""
    return FEATURES * feature_distance.float() - persuasion.float().mean((1, 2, 3))
