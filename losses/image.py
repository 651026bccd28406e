"""How different two infrared images are: the loss of mean predictions, beside the flow loss.

    loss = |error| + 2 error^2 + 0.2 (1 - SSIM) + 0.5 |gradient of the error|, averaged

Squared error alone blurs; structure and gradients keep edges where they are certain.
Source of SSIM: Wang et al. 2004, Eq. 13 (Gaussian window of 11 pixels, sigma 1.5).

Dimension key:  B batch   H, W pixels
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SPREAD = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for images in [0, 1]
SCALES = 3  # gradients at full, half and quarter size


def image_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """(B,) fp32 with gradient, 0 for equal images.

    Args: predicted, target: (B, 1, H, W), about [0, 1], sides of 11 or more.
    Raises: ValueError: the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(predicted.shape)} and {tuple(target.shape)}")
    with torch.autocast(predicted.device.type, enabled=False):
        predicted, target = predicted.float(), target.float()
        error = predicted - target
        values = error.abs() + 2 * error.square()
        structure = 0.2 * (1 - structural_similarity(predicted, target))
        return values.mean((1, 2, 3)) + structure + 0.5 * gradient_error(error)


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of (B, 1, H, W) in [0, 1], over windows that lie inside: (B,)."""
    offset = torch.arange(WINDOW, device=a.device) - WINDOW // 2
    line = torch.exp(-0.5 * (offset / SPREAD) ** 2)
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return (luminance * (2 * covariance + C2) / (var_a + var_b + C2)).mean((1, 2, 3))


def gradient_error(error: Tensor) -> Tensor:
    """Mean absolute forward differences of an error image at three sizes: (B,)."""
    total = error.new_zeros(len(error))
    for scale in range(SCALES):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=-1).abs().mean((1, 2, 3))
        total = total + error.diff(dim=-2).abs().mean((1, 2, 3))
    return total / SCALES
