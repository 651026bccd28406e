"""How far is one image displaced from another? Phase correlation of their edges.

Kuglin, Hines 1975: a shift is a slope in the phase of the cross spectrum. Its transform back has a
peak at the shift; low-passed by a Gaussian, the peak is one, and a parabola through the logarithms
of three values finds its place between pixels.

Dimension key:  B batch   H, W pixels
"""

import math

import torch
from torch import Tensor

from utils.correlation import peak

PASSED = 0.12  # standard deviation of the low pass, in cycles a pixel
FARTHEST = 16  # pixels that are searched
WARN_ABOVE = 0.5  # pixels of displacement, over a whole set, that are worth a warning
CLEAR = 10.0  # of `clearness`: two images that share nothing reach about 6


def displacement(predicted: Tensor, target: Tensor) -> Tensor:
    """(B, 2): x and y in pixels by which the edges of `predicted` lie right of and below the true.

    Args: predicted, target: (B, 1, H, W). NaN where an image has no edges.
    """
    found = surfaces(predicted, target)
    known = found.flatten(1).amax(1) > 0
    peaks = torch.tensor([peak(x.cpu().numpy())[::-1] for x in found], device=found.device)
    return torch.where(known[:, None], peaks, math.nan).float()


def surfaces(predicted: Tensor, target: Tensor) -> Tensor:
    """How well the edges agree at each displacement: (B, h, w) fp64, no displacement in the middle.

    Of one scale, so that they can be summed over a set: one image alone often has no clear peak.
    All zeros where an image has no edges. Raises: ValueError: shapes, or sides below 8.
    """
    H, W = target.shape[-2:]
    if predicted.shape != target.shape or min(H, W) < 8:
        raise ValueError(
            "displacement needs two images of one shape with sides of 8 or more, got "
            f"{tuple(predicted.shape)} and {tuple(target.shape)}"
        )
    edges = [_edges(x) for x in (predicted, target)]
    spectra = [torch.fft.rfft2(x) for x in edges]
    cross = spectra[0] * spectra[1].conj()
    fy = torch.fft.fftfreq(H, device=cross.device, dtype=torch.float64)[:, None]
    fx = torch.fft.rfftfreq(W, device=cross.device, dtype=torch.float64)
    low_pass = torch.exp(-(fx**2 + fy**2) / (2 * PASSED**2))
    cross = low_pass * cross / cross.abs().clamp(min=1e-12)
    surface = torch.fft.fftshift(torch.fft.irfft2(cross, s=(H, W)), dim=(-2, -1))
    ry, rx = (min(FARTHEST, n // 2 - 2) + 1 for n in (H, W))  # one more, for the parabola
    near = surface[..., H // 2 - ry : H // 2 + ry + 1, W // 2 - rx : W // 2 + rx + 1]
    known = torch.stack([x.flatten(1).amax(1) > 1e-6 for x in edges]).all(0)
    return torch.where(known[:, None, None], near, 0.0)


def added(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two surfaces; of small images one may reach less far, and the sum then too."""
    sides = [min(a, b) for a, b in zip(first.shape[-2:], second.shape[-2:])]
    parts = []
    for surface in (first, second):
        top, left = ((length - n) // 2 for length, n in zip(surface.shape[-2:], sides))
        parts.append(surface[..., top : top + sides[0], left : left + sides[1]])
    return parts[0] + parts[1]


def _edges(image: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, H, W) fp64, steepness, faded out towards the borders."""
    x = image.detach().double()[:, 0]
    dy, dx = torch.gradient(x, dim=(-2, -1))
    steep = (dx.square() + dy.square()).sqrt()
    H, W = steep.shape[-2:]
    windows = [torch.hann_window(n, periodic=False, dtype=x.dtype, device=x.device) for n in (H, W)]
    return (steep - steep.mean((-2, -1), keepdim=True)) * windows[0][:, None] * windows[1]
