"""How the maps of a scene should relate: intensity follows infrared and differs by material.

Dimension key:  B batch   M materials   H, W pixels   N = H * W
"""

from torch import Tensor

from utils.correlation import pearson

# Variance below which an image counts as flat, for values in [0, 1]: a standard deviation of 0.001.
# It bounds the gradient of a ratio of variances, at a bias of 1e-4 for one of 0.1.
FLAT = 1e-6


def physics_consistency_loss(intensity: Tensor, infrared: Tensor) -> Tensor:
    """mean over samples of 1 - Pearson(intensity, infrared brightness): a scalar in [0, 2].

    Args: intensity, infrared: (B, 1, H, W).
    Raises: ValueError: the shapes differ.
    """
    return (1 - pearson(intensity.float(), infrared.float(), FLAT)).mean()


def material_separation_loss(intensity: Tensor, probabilities: Tensor) -> Tensor:
    """Share of the intensity's variance that lies within materials: a scalar in [0, 1].

    1 minus the correlation ratio of a scene, averaged over scenes: 0 where every material has one
    intensity of its own, 1 where the mean intensities of all materials are equal.

        loss = 1 - sum_m p_m (mean_m - mean)^2 / variance,   mean_m = sum p_m I / sum p_m

    Args:
        intensity: (B, 1, H, W).
        probabilities: (B, M, H, W), summing to 1 over M.
    Raises: ValueError: batch or image sizes differ.
    Source: Fisher 1925, Statistical Methods for Research Workers, Sec. 45 (correlation ratio).
    """
    B, channels, H, W = intensity.shape
    if (
        channels != 1
        or probabilities.ndim != 4
        or probabilities.shape[::2] != (B, H)
        or probabilities.shape[3] != W
    ):
        raise ValueError(
            "need intensity (B, 1, H, W) and probabilities (B, M, H, W), got "
            f"{tuple(intensity.shape)} and {tuple(probabilities.shape)}"
        )
    p_BMN = probabilities.float().flatten(2)
    centred_B1N = intensity.float().flatten(2)
    centred_B1N = centred_B1N - centred_B1N.mean(2, keepdim=True)
    share_BM = p_BMN.mean(2)
    moment_BM = (p_BMN * centred_B1N).mean(2)
    # p (mean_m)^2 = moment^2 / p; a material that is nowhere has neither
    between_B = (moment_BM.square() / share_BM.clamp(min=1e-12)).sum(1)
    variance_B = centred_B1N.square().mean(dim=(1, 2))
    return (1 - between_B / (variance_B + FLAT)).mean()
