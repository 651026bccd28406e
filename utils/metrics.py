"""Image metrics, one value per image, and the confusion matrix of a label map.

Dimension key:  B batch   H, W pixels   C classes
Every image metric takes predicted and target (B, 1, H, W) in [0, 1] and gives (B,), leaving its
arguments as they were.
"""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from utils import correlation, dist
from utils.labels import IGNORE

HOTTEST = 0.05  # share of an image's pixels that are its hot spots
MS_SSIM_SIDE = 161  # the smallest side for which the coarsest of five scales holds the window
CONSTANT = 1e-18  # the variance in fp64 at and below which an image counts as constant
EDGES = 0.1  # share of an image's pixels that count as its edges: those of the steepest target


def psnr(predicted: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB against a peak of 1; infinite for equal images."""
    predicted, target = _checked(predicted, target)
    return peak_signal_noise_ratio(
        predicted, target, data_range=1.0, dim=(1, 2, 3), reduction="none"
    )


def ssim(predicted: Tensor, target: Tensor) -> Tensor:
    """Structural similarity, Gaussian window of 11 pixels; beyond its border an image is mirrored.

    scikit-image leaves the border out instead; on mirrored images it gives the same value.
    Raises: ValueError: sides below 11.
    """
    predicted, target = _checked(predicted, target)
    if min(predicted.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs sides of 11 or more, got {tuple(predicted.shape[-2:])}")
    values = structural_similarity_index_measure(
        predicted, target, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)  # a pair only if asked for the picture
    return values.reshape(len(predicted))


def ssim_inside(predicted: Tensor, target: Tensor, uniform: bool = False) -> Tensor:
    """SSIM over the windows that lie wholly inside the image, as in Wang et al. 2004.

    Args: uniform: as scikit-image computes it unless told otherwise: all pixels of a window of 7
        count alike, and its variances are those of a sample; not the Gaussian window of 11.
    Raises: ValueError: sides below the window's.
    """
    predicted, target = _checked(predicted, target)
    side = 7 if uniform else 11
    if min(predicted.shape[-2:]) < side:
        raise ValueError(f"SSIM needs sides of {side} or more, got {tuple(predicted.shape[-2:])}")
    places = torch.arange(side, dtype=torch.float64, device=target.device) - side // 2
    taps = torch.ones_like(places) if uniform else torch.exp(-0.5 * (places / 1.5) ** 2)
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    a, b = predicted.double(), target.double()
    a_mean, b_mean, aa, bb, ab = (
        torch.nn.functional.conv2d(x, kernel) for x in (a, b, a * a, b * b, a * b)
    )
    sample = side**2 / (side**2 - 1) if uniform else 1.0
    a_var, b_var, both = (
        sample * (square - product)
        for square, product in ((aa, a_mean**2), (bb, b_mean**2), (ab, a_mean * b_mean))
    )
    light = (2 * a_mean * b_mean + 0.01**2) / (a_mean**2 + b_mean**2 + 0.01**2)
    structure = (2 * both + 0.03**2) / (a_var + b_var + 0.03**2)
    return (light * structure).mean((1, 2, 3)).float()


def ms_ssim(predicted: Tensor, target: Tensor) -> Tensor:
    """SSIM over five scales. Raises: ValueError: sides below 161, too small for the coarsest.

    Source: Wang et al. 2003, by torchmetrics; a negative scale counts as 0.
    """
    predicted, target = _checked(predicted, target)
    if min(predicted.shape[-2:]) < MS_SSIM_SIDE:
        raise ValueError(
            f"MS-SSIM needs sides of {MS_SSIM_SIDE} or more, got {tuple(predicted.shape[-2:])}"
        )
    pairs = zip(predicted.split(1), target.split(1))  # its mean over a batch is not per image
    values = [
        multiscale_structural_similarity_index_measure(a, b, data_range=1.0, normalize="relu")
        for a, b in pairs
    ]
    return torch.stack(values)


class Lpips:
    """How different two images look to a network: (B,), 0 for equal ones, less is better.

    AlexNet or VGG-16, of grey repeated to three channels and, unless `scaled` is false, scaled to
    [-1, 1], as it was made for.
    Raises: ValueError: its weights cannot be fetched, or sides below 64.
    Source: Zhang et al. 2018 (arXiv:1801.03924), by torchmetrics.
    """

    NAMES = {"alex": "AlexNet", "vgg": "VGG-16"}  # noqa: RUF012 (read only)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        network: Literal["alex", "vgg"] = "alex",
        scaled: bool = True,
    ):
        try:
            metric = LearnedPerceptualImagePatchSimilarity(network, normalize=scaled)
            self.metric = metric.to(device)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the weights of {self.NAMES[network]} cannot be fetched ({error}); leave out "
                "--lpips, or put them into torch's cache"
            ) from error

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        pair = _checked(predicted, target)
        if min(predicted.shape[-2:]) < 64:
            raise ValueError(f"LPIPS needs sides of 64 or more, got {tuple(predicted.shape[-2:])}")
        images = zip(*(x.expand(-1, 3, -1, -1).split(1) for x in pair))
        return torch.stack([self.metric(a, b) for a, b in images])


def mae(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    predicted, target = _checked(predicted, target)
    return (predicted - target).abs().mean(dim=(1, 2, 3))


def pearson(predicted: Tensor, target: Tensor) -> Tensor:
    """Linear correlation over the pixels, in [-1, 1]; 0 where an image is constant."""
    predicted, target = _checked(predicted, target)
    return correlation.pearson(predicted.double(), target.double(), CONSTANT).float()


def rank_correlation(predicted: Tensor, target: Tensor) -> Tensor:
    """Spearman's correlation, in [-1, 1]; 0 where an image is constant.

    Is what is warmer there also warmer here? Blind to any monotone change of the grey levels.
    """
    predicted, target = _checked(predicted, target)
    a, b = (torch.stack([_ranks(image.flatten()) for image in x]) for x in (predicted, target))
    return correlation.pearson(a, b, CONSTANT).float()


def edge_sharpness(predicted: Tensor, target: Tensor) -> Tensor:
    """Steepness of the prediction across the target's edges: 1 equal, 0 flat, below 0 inverted.

    Both images are scaled to a standard deviation of 1, so gain and offset do not matter. The
    edges are the tenth of the pixels where the target's gradient is largest; there the prediction's
    gradient is measured along the target's, as a share of it. Blur lowers the value; noise does
    not raise it, as its gradient has no direction. 0 where an image is constant.
    """
    predicted, target = _checked(predicted, target)
    if min(predicted.shape[-2:]) < 2:
        raise ValueError(f"edges need sides of 2 or more, got {tuple(predicted.shape[-2:])}")
    gradients, spreads = [], []
    for x in (predicted, target):
        dx, dy = x[..., :-1, :].diff(dim=-1), x[..., :-1].diff(dim=-2)
        gradients.append(torch.stack([dx, dy]).flatten(2).double())  # (2, B, (H-1)(W-1))
        spreads.append(x.flatten(1).double().std(dim=1, correction=0))
    seen, true = gradients
    steepness = true.square().sum(0).sqrt()
    edges = steepness.topk(max(1, round(EDGES * steepness.shape[1])), dim=1)
    across = (seen * true).sum(0) / steepness.clamp(min=1e-12)
    share = across.gather(1, edges.indices).sum(1) / edges.values.sum(1).clamp(min=1e-12)
    known = (spreads[0] > 1e-6) & (spreads[1] > 1e-6)
    return torch.where(known, share * spreads[1] / spreads[0].clamp(min=1e-6), 0.0).float()


def hot_spot_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Overlap of the hottest twentieth of both images, intersection over union, in [0, 1].

    Each image has its own threshold, so levels do not matter; pixels equal to the threshold count,
    so a saturated image has more of them. 0 where an image is constant.
    """
    predicted, target = _checked(predicted, target)
    hot, varied = [], torch.ones(len(target), dtype=torch.bool, device=target.device)
    for x in (predicted.flatten(1), target.flatten(1)):
        threshold = x.topk(max(1, round(HOTTEST * x.shape[1])), dim=1).values[:, -1:]
        hot.append(x >= threshold)
        varied = varied & (x.amax(1) > x.amin(1))
    both, either = (hot[0] & hot[1]).sum(1), (hot[0] | hot[1]).sum(1)
    return torch.where(varied, both / either, 0.0)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 on, fp64; equal values share the mean of their ranks."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts - 1) / 2)[group]


def _checked(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as fp32. Raises: ValueError: shapes, or values outside [0, 1]."""
    if predicted.shape != target.shape or predicted.ndim != 4 or predicted.shape[1] != 1:
        raise ValueError(
            "expected two images of shape (B, 1, H, W), got "
            f"{tuple(predicted.shape)} and {tuple(target.shape)}"
        )
    for name, x in (("predicted", predicted), ("target", target)):
        low, high = x.min().item(), x.max().item()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(f"{name} must be in [0, 1], it spans {low:.4g} to {high:.4g}")
    return predicted.detach().float(), target.detach().float()


class ConfusionMatrix:
    """Counts of (target, predicted) classes over many batches; 255 in the target is left out."""

    RESULTS = ("accuracy", "miou")

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add label maps (B, H, W) of class ids. Raises: ValueError: unequal shapes, or bad ids."""
        if predicted.shape != target.shape:
            raise ValueError(f"shapes differ: {tuple(predicted.shape)}, {tuple(target.shape)}")
        known = target != IGNORE
        classes = torch.stack([target[known], predicted[known]]).long()
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
            raise ValueError(
                f"class ids must be 0..{self.num_classes - 1} or {IGNORE}, got "
                f"{int(classes.min())}..{int(classes.max())}"
            )
        index = classes[0] * self.num_classes + classes[1]
        counts = torch.bincount(index, minlength=self.num_classes**2)
        self.counts += counts.view_as(self.counts).to(self.counts.device)

    def result(self) -> dict[str, float]:
        """{accuracy, miou} (RESULTS) over all ranks; NaN if nothing was labelled. Collective.

        A class that is in neither target nor prediction does not count in the mean.
        """
        counts = dist.sum_over_ranks(self.counts).double()
        hit, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
        present = union > 0
        values = hit.sum() / counts.sum(), (hit[present] / union[present]).mean()
        return {name: value.item() for name, value in zip(self.RESULTS, values)}


# What pretrain.py measures of the intensity and of the fused image, both against the infrared; rank
# and edge_sharpness also compare runs whose intensity has another scale.
OF_INTENSITY = {"pearson": pearson, "rank": rank_correlation, "edge_sharpness": edge_sharpness}
OF_FUSED = {"psnr": psnr, "ssim": ssim, "fused_edge_sharpness": edge_sharpness}
