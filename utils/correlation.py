"""Pearson's correlation of images, and the peak of a phase correlation; imports nothing of ours.

Dimension key:  B batch   h, w displacements in pixels, none in the middle
"""

import numpy as np
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


def peak(surface: np.ndarray) -> tuple[float, float]:
    """Rows and columns from the middle of (h, w) to its highest value, to a fraction of a pixel.

    The outermost values only help to find the fraction: a peak there is not sought.
    """
    inner = surface[1:-1, 1:-1]
    row, column = divmod(int(inner.argmax()), inner.shape[1])
    down, across = surface[row : row + 3, column + 1], surface[row + 1, column : column + 3]
    middle = [size // 2 - 1 for size in surface.shape]
    return row - middle[0] + _vertex(down), column - middle[1] + _vertex(across)


def clearness(surface: np.ndarray) -> float:
    """How far the highest value stands out, in median deviations of the surface."""
    above = surface - np.median(surface)
    return float(above[1:-1, 1:-1].max()) / max(float(np.median(np.abs(above))), 1e-12)


def _vertex(three: np.ndarray) -> float:
    """Where a parabola through the logarithms of three values has its top, in [-0.5, 0.5]."""
    before, at, after = np.log(np.maximum(three, 1e-12))
    bend = before - 2 * at + after
    return float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0
