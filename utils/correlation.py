"""Pearson's correlation of images, for the loss and for the metric; imports nothing of ours.

Dimension key:  B batch
"""

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor, flat: float) -> Tensor:
    """Correlation of two images, per sample: (B,) in [-1, 1]; 0 where one of them is flat.

    Args:
        a, b: (B, ...), the same shape; the result has their type.
        flat: the variance below which an image counts as flat. It bounds the gradient of a ratio
            of variances, and pulls the result to 0 by about flat / variance.
    Raises: ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    covariance = (a * b).mean(1)
    return covariance * torch.rsqrt((a.square().mean(1) + flat) * (b.square().mean(1) + flat))
