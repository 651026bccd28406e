"""Metrics of a detector and a segmenter, as counts per image, so that images can be resampled.

AP is COCO's: detections by falling score, each takes the best free box of its class; precision is
made monotone and averaged over 101 recalls (Lin et al. 2014). mIoU is over all pixels together.

Dimension key:  N images   R resamples   D detections   G true boxes   T thresholds   C classes
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from utils.labels import IGNORE

THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))  # of the overlap that makes a hit
RECALLS = 101


class Detections(NamedTuple):
    """Boxes (D, 4) as left, top, right, bottom in pixels, scores (D,), classes (D,) from 1 on."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def hits(found: Detections, boxes: Tensor, classes: Tensor) -> np.ndarray:
    """(T, D) bool: is this detection a true box? Detections by falling score; of one image.

    Args: boxes: (G, 4), classes: (G,), the truth.
    """
    overlap = box_iou(found.boxes, boxes) if len(boxes) else torch.zeros(len(found.boxes), 0)
    overlap = torch.where(found.classes[:, None] == classes[None], overlap, -1.0).numpy()
    made = np.zeros((len(THRESHOLDS), len(found.boxes)), bool)
    for t, threshold in enumerate(THRESHOLDS):
        free = overlap.copy()
        for d in range(len(free)):
            if free.shape[1] and free[d].max() >= threshold - 1e-9:
                made[t, d] = True
                free[:, free[d].argmax()] = -1
    return made


class DetectionScores:
    """Detections of N images against their true boxes."""

    METRICS = ("mAP", "AP50")

    def __init__(self, classes: int):
        self.num_classes, self.images = classes, 0
        self.rows: list[tuple[np.ndarray, ...]] = []  # scores, classes, hits, truths by class

    def add(self, found: Detections, boxes: Tensor, classes: Tensor) -> None:
        """The next image."""
        order = found.scores.argsort(descending=True, stable=True)
        found = Detections(*(x[order].cpu() for x in found))
        truths = torch.bincount(classes, minlength=self.num_classes + 1)[1:]
        made = hits(found, boxes.cpu(), classes.cpu())
        self.rows.append((found.scores.numpy(), found.classes.numpy(), made, truths.numpy()))

    def draws(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: (R,)} with image i counted weights[r, i] times; NaN where no box is there.

        A mean over the classes that have true boxes in that resample.
        """
        image = np.repeat(np.arange(len(self.rows)), [len(row[0]) for row in self.rows])
        scores, classes = (np.concatenate([row[k] for row in self.rows]) for k in (0, 1))
        made = np.concatenate([row[2] for row in self.rows], axis=1)
        truths = np.stack([row[3] for row in self.rows])
        order = np.argsort(-scores, kind="stable")
        counted = torch.from_numpy(weights).double()
        found = []
        for number in range(self.num_classes):
            own = order[classes[order] == number + 1]
            total = counted @ torch.from_numpy(truths[:, number]).double()
            weight = counted[:, torch.from_numpy(image[own])]
            seen = weight.cumsum(1)
            values = []
            for hit in torch.from_numpy(made[:, own]):
                values.append(average_precision(weight[:, hit], seen[:, hit], total).numpy())
            found.append(np.stack(values))
        by_class = np.stack(found)  # (C, T, R)
        known = ~np.isnan(by_class[:, 0])
        with np.errstate(invalid="ignore"):
            by_threshold = np.nan_to_num(by_class).sum(0) / known.sum(0)
        return {"mAP": by_threshold.mean(0), "AP50": by_threshold[0]}


def average_precision(weight: Tensor, seen: Tensor, total: Tensor) -> Tensor:
    """(R,) of one class and threshold; NaN where there is no true box.

    Args: weight: (R, K), of the K hits by falling score; seen: (R, K), the weight of all detections
        up to each hit; total: (R,), of all true boxes.
    """
    true = weight.cumsum(1)
    recall, precision = true / total.clamp(min=1)[:, None], true / seen.clamp(min=1)
    precision = F.pad(precision, (0, 1))  # 0 at recalls that are never reached
    precision = precision.flip(1).cummax(1).values.flip(1)  # the best at this recall or beyond
    points = torch.linspace(0, 1, RECALLS, dtype=torch.float64).repeat(len(total), 1) - 1e-12
    at = torch.searchsorted(recall.contiguous(), points)
    return torch.where(total > 0, precision.gather(1, at).mean(1), torch.nan)


class SegmentationScores:
    """Label maps of N images against the true ones, whose 255 is left out."""

    METRICS = ("mIoU", "accuracy")

    def __init__(self, classes: int):
        self.num_classes = classes
        self.rows: list[np.ndarray] = []  # (C, C) of (true, predicted), one an image

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """The next image: (H, W) class ids each."""
        known = target != IGNORE
        index = target[known].long() * self.num_classes + predicted[known].long()
        counts = torch.bincount(index, minlength=self.num_classes**2)
        self.rows.append(counts.view(self.num_classes, -1).cpu().numpy())

    def draws(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: (R,)} with image i counted weights[r, i] times; NaN where nothing is labelled.

        mIoU is a mean over the classes that are labelled in that resample.
        """
        counts = np.tensordot(weights, np.stack(self.rows).astype(np.float64), 1)  # (R, C, C)
        hit, labelled = counts.diagonal(axis1=1, axis2=2), counts.sum(2)
        union = labelled + counts.sum(1) - hit
        with np.errstate(invalid="ignore"):
            overlap = np.where(labelled > 0, hit / np.maximum(union, 1), 0).sum(1)
            values = overlap / (labelled > 0).sum(1), hit.sum(1) / labelled.sum(1)
        return dict(zip(self.METRICS, values))
