"""The objective of stage 1: pseudo-labels for every map, and the fused image against the infrared.

    total = 1.0 intensity + 0.5 material + 0.3 context + 0.05 consistency + 0.01 separation
            [+ 0.5 physics + 0.2 reconstruction, unless physics is off]

Dimension key:  B batch   H, W pixels   M materials   C context channels
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.image import image_loss
from losses.physics import material_separation_loss, physics_consistency_loss
from utils.labels import IGNORE
from utils.problems import Checked


@dataclass(kw_only=True)
class PretrainLossConfig(Checked):
    """Weights of the terms; a term with weight 0 is logged but not added to the total."""

    intensity: float = 1.0  # squared error against the labelled intensity
    material: float = 0.5  # cross-entropy
    context: float = 0.3  # squared error
    physics: float = 0.5  # squared error of the fused image against the infrared
    reconstruction: float = 0.2  # absolute error of the fused image's values and gradients
    image: float = 0.0  # image loss (losses/image.py) of the fused image against the infrared
    consistency: float = 0.05  # 1 - Pearson(intensity, infrared)
    separation: float = 0.01  # share of intensity's variance within materials
    balance: float = 0.0  # cross-entropy's class weights are frequency ** -balance; 0: none

    def problems(self) -> Iterator[str]:
        weights = asdict(self)
        if not any(weight for name, weight in weights.items() if name != "balance"):
            yield "every weight of loss is 0: there is nothing to learn"
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                yield f"loss.{name} must be at least 0 and finite, got {weight}"


# names of the terms: those of the maps, and those of the fused image, which not every run has
FUSED_TERMS = ("physics", "reconstruction")
IF_WEIGHTED = ("image",)  # of the fused image too, where its weight is not 0
_OTHERS = ("balance", *FUSED_TERMS, *IF_WEIGHTED)
TERMS = [f.name for f in fields(PretrainLossConfig) if f.name not in _OTHERS]


class Labels(Protocol):
    """The labels that the data supply for every map."""

    @property
    def intensity(self) -> Tensor: ...  # (B, 1, H, W) in [0, 1]

    @property
    def material(self) -> Tensor: ...  # (B, H, W) int64, 255 where unknown

    @property
    def context(self) -> Tensor: ...  # (B, C, H, W)


class MultiTaskPretrainLoss:
    """The weighted sum of all terms, and each of them to log.

    Args:
        frequency: (M,) share of each material among the labels, on the device of the labels; None
            if `cfg.balance` is 0.
    Raises: ValueError: a weight is negative or not finite.
    """

    def __init__(self, cfg: PretrainLossConfig, frequency: Tensor | None = None):
        self.cfg, self.class_weights = cfg, None
        if frequency is not None and cfg.balance:
            self.class_weights = class_weights(frequency, cfg.balance)

    def __call__(
        self,
        intensity: Tensor,
        material_logits: Tensor,
        context: Tensor,
        fused: Tensor | None,
        labels: Labels,
        infrared: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total (a scalar with gradient) and its parts (unweighted, detached, on the device).

        Args:
            intensity: (B, 1, H, W) in [0, 1].
            material_logits: (B, M, H, W).
            context: (B, C, H, W).
            fused: (B, 3, H, W), or None when physics is off: then its two terms are gone.
            infrared: (B, 1, H, W) in [0, 1].

        Returns: of the parts, `material_ce` is the cross-entropy without class weights, the mean
            over samples with labels (NaN if there are none), `labelled` their share. The term
            itself divides by B: ranks and accumulation agree.
        Raises: ValueError: shapes that do not belong together.
        """
        cfg = self.cfg
        ce = material_cross_entropy(material_logits, labels.material, self.class_weights)
        probabilities = material_logits.float().softmax(dim=1)
        terms = {
            "intensity": mean_squared_error(intensity, labels.intensity),
            "material": ce.weighted_B.mean(),
            "context": mean_squared_error(context, labels.context),
            "consistency": physics_consistency_loss(intensity, infrared),
            "separation": material_separation_loss(intensity, probabilities),
        }
        # last, so that the sum of the others is the same to the last bit without them
        if fused is not None:
            target = infrared.expand(-1, fused.shape[1], -1, -1)  # (B, 1, H, W), as compared above
            terms["physics"] = mean_squared_error(fused, target)
            terms["reconstruction"] = reconstruction_loss(fused, target)
            if cfg.image:
                terms["image"] = image_loss(fused.mean(1, keepdim=True), infrared).mean()
        weights = asdict(cfg)
        total = sum(weights[name] * term for name, term in terms.items())
        parts = {name: term.detach() for name, term in terms.items()}
        labelled = ce.labelled_B.float()
        parts["material_ce"] = ce.plain_B.detach().sum() / labelled.sum()
        parts["labelled"] = labelled.mean()
        return total, parts


def mean_squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """A scalar in fp32.

    Raises: ValueError: the shapes differ. (They would broadcast, and train on nonsense.)
    """
    _same_shape(predicted, target)
    return F.mse_loss(predicted.float(), target.float())


def reconstruction_loss(fused: Tensor, infrared: Tensor) -> Tensor:
    """Mean absolute error of values, plus that of forward differences in x and in y: a scalar.

    Args: fused, infrared: (B, 3, H, W).
    Raises: ValueError: the shapes differ.
    """
    _same_shape(fused, infrared)
    error = fused.float() - infrared.float()
    loss = error.abs().mean()
    for axis in (-1, -2):
        if error.shape[axis] > 1:  # the mean of no differences is NaN
            # differences are linear: the difference of errors is the error of differences
            loss = loss + error.diff(dim=axis).abs().mean()
    return loss


class CrossEntropy(NamedTuple):
    """Per sample, averaged over its labelled pixels; 0 and False where there are none."""

    weighted_B: Tensor  # fp32, the mean over pixels weighted by class
    plain_B: Tensor  # fp32, without class weights
    labelled_B: Tensor  # bool


def class_weights(frequency: Tensor, exponent: float) -> Tensor:
    """frequency ** -exponent, scaled to a mean of 1 over pixels.

    Args:
        frequency: (M,), at least 0, any scale. What was not met counts as the rarest that was.
        exponent: 0: all equal; 1: every material that was met has the same total weight.
    """
    share = frequency.double() / frequency.sum()
    weights = share.clamp(min=share[share > 0].min()) ** -exponent
    return (weights / (share * weights).sum()).float()


def material_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None
) -> CrossEntropy:
    """Cross-entropy of logits against material ids.

    Args:
        logits: (B, M, H, W).
        labels: (B, H, W) int64 in 0..M-1, or 255 for pixels that do not count.
        weights: (M,) of the classes, or None.
    Raises: ValueError: batch or image sizes differ.
    """
    if (
        logits.ndim != 4
        or labels.ndim != 3
        or logits.shape[::2] != labels.shape[:2]
        or logits.shape[3] != labels.shape[2]
    ):
        raise ValueError(
            "need logits (B, M, H, W) and labels (B, H, W), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    known = labels != IGNORE
    # one row a pixel: for images torch's gradient is not the same in every run on a GPU
    pixel_loss = F.cross_entropy(
        logits.float().movedim(1, -1).flatten(0, 2),
        labels.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    ).view(labels.shape)  # (B, H, W)
    plain_B = _mean(pixel_loss, known.float())
    weighted_B = plain_B
    if weights is not None:
        weighted_B = _mean(pixel_loss, weights[labels.where(known, 0)] * known)
    return CrossEntropy(weighted_B, plain_B, known.flatten(1).any(1))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """(B, H, W) -> (B,), 0 where all weights are."""
    total = weights.sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    return (values * weights).sum(dim=(1, 2)) / total


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
