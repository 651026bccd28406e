"""A small detector and a small segmenter of infrared images: models, losses, scores.

Both stand on one encoder of torchvision's parts: a ResNet of one block a stage with a feature
pyramid from stride 4 to 32. They start from random weights.

Dimension key:  B batch   N images   H, W pixels   C classes
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.fcn import FCNHead

from data.materials import NUM_MATERIALS
from utils.labels import IGNORE
from utils.objects import LEAST, Boxes
from utils.task_metrics import Detections, DetectionScores, SegmentationScores

WIDTH = 64  # channels of the pyramid
STRIDES = (4, 8, 16, 32)
CENTRE, SPREAD = 0.5, 0.25  # of grey levels, before the encoder
LEAST_SCORE = 0.05  # of a detection
Scores = DetectionScores | SegmentationScores


class Task(Protocol):
    """What is learnt from infrared images, and its truth for N training and M test images."""

    name: str

    def model(self) -> nn.Module:
        """A new one with random weights."""

    def loss(self, model: nn.Module, images: Tensor, indices: list[int], flip: bool) -> Tensor:
        """Of (B, 1, H, W) in [0, 1] that show training scenes `indices`, mirrored if `flip`."""

    def scores(self, model: nn.Module, images: Tensor, batch_size: int) -> Scores:
        """Of all test images (M, 1, H, W) uint8."""


class Truth(NamedTuple):
    """What one split says of its N images."""

    names: list[tuple[str, str]]  # source and name
    materials: Tensor  # (N, H, W) uint8, 255: none


def encoder() -> BackboneWithFPN:
    """Grey as RGB (B, 3, H, W) -> maps at STRIDES with WIDTH channels."""
    stages = {"layer1": "0", "layer2": "1", "layer3": "2"}  # stride 32 is pooled from the last
    return BackboneWithFPN(ResNet(BasicBlock, [1, 1, 1, 1]), stages, [64, 128, 256], WIDTH)


class DetectorTask:
    """FCOS (Tian et al. 2019) on YOLO boxes; those below LEAST pixels of a side do not count.

    Raises: ValueError: no class of `classes` has a box in one of the splits.
    """

    name = "detector"

    def __init__(self, boxes: Boxes, classes: list[str], train: Truth, test: Truth):
        self.classes, self.size = classes, tuple(train.materials.shape[-2:])
        self.train, self.test = (
            [self._read(boxes, *name) for name in x.names] for x in (train, test)
        )
        for split, found in (("training", self.train), ("test", self.test)):
            if not any(len(own) for _, own in found):
                raise ValueError(
                    f"the detector needs boxes: no {split} image has one of {' or '.join(classes)}"
                    f" with sides of {LEAST} pixels or more at {self.size[0]} x {self.size[1]}"
                    f" (boxes in {boxes.folder})"
                )

    def _read(self, boxes: Boxes, source: str, name: str) -> tuple[Tensor, Tensor]:
        """(G, 4) in pixels and (G,) classes from 1 on."""
        H, W = self.size
        rows, kinds = [], []
        for box in boxes.of(source, name):
            left, right = (min(max(x, 0), 1) * W for x in (box.left, box.right))
            top, bottom = (min(max(x, 0), 1) * H for x in (box.top, box.bottom))
            if box.kind in self.classes and min(right - left, bottom - top) >= LEAST:
                rows.append([left, top, right, bottom])
                kinds.append(1 + self.classes.index(box.kind))
        return torch.tensor(rows).reshape(-1, 4), torch.tensor(kinds, dtype=torch.int64)

    def model(self) -> FCOS:
        anchors = AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * len(STRIDES))
        return FCOS(
            encoder(),
            1 + len(self.classes),
            min_size=min(self.size),
            max_size=max(self.size),
            image_mean=[CENTRE] * 3,
            image_std=[SPREAD] * 3,
            anchor_generator=anchors,
            score_thresh=LEAST_SCORE,
        )

    def loss(self, model: nn.Module, images: Tensor, indices: list[int], flip: bool) -> Tensor:
        targets = []
        for boxes, labels in (self.train[i] for i in indices):
            if flip:
                left, top, right, bottom = boxes.unbind(1)
                boxes = torch.stack([self.size[1] - right, top, self.size[1] - left, bottom], 1)
            targets.append({"boxes": boxes.to(images.device), "labels": labels.to(images.device)})
        return torch.stack(list(model(_rgb(images), targets).values())).sum()

    def scores(self, model: nn.Module, images: Tensor, batch_size: int) -> DetectionScores:
        found = DetectionScores(len(self.classes))
        for first, some in _batches(model, images, batch_size):
            for i, own in enumerate(model(_rgb(some))):
                made = Detections(*(own[k].cpu() for k in ("boxes", "scores", "labels")))
                found.add(made, *self.test[first + i])
        return found


class SegmenterTask:
    """A head of two convolutions on the finest map, materials as classes.

    Raises: ValueError: no labels, or fewer than two materials in the training images.
    """

    name = "segmenter"

    def __init__(self, train: Truth, test: Truth):
        self.train, self.test = train.materials, test.materials
        for split, labels in (("training", self.train), ("test", self.test)):
            if not (labels != IGNORE).any():
                raise ValueError(f"the segmenter needs labels: no {split} image has a material")
        kinds = self.train[self.train != IGNORE].unique().tolist()
        if len(kinds) < 2:
            raise ValueError(
                f"the segmenter needs two materials or more: all {len(self.train)} training images"
                f" show only material {kinds[0]}"
            )

    def model(self) -> "Segmenter":
        return Segmenter()

    def loss(self, model: nn.Module, images: Tensor, indices: list[int], flip: bool) -> Tensor:
        labels = self.train[indices]
        labels = (labels.flip(-1) if flip else labels).to(images.device)
        # pixels in one row: the loss of maps has no deterministic gradient on a GPU
        logits = model(images).permute(0, 2, 3, 1).reshape(-1, NUM_MATERIALS)
        return F.cross_entropy(logits, labels.long().flatten(), ignore_index=IGNORE)

    def scores(self, model: nn.Module, images: Tensor, batch_size: int) -> SegmentationScores:
        found = SegmentationScores(NUM_MATERIALS)
        for first, some in _batches(model, images, batch_size):
            for i, predicted in enumerate(model(some).argmax(1).cpu()):
                found.add(predicted, self.test[first + i])
        return found


class Segmenter(nn.Module):
    """(B, 1, H, W) in [0, 1] -> logits (B, NUM_MATERIALS, H, W)."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = encoder(), FCNHead(WIDTH, NUM_MATERIALS)

    def forward(self, images: Tensor) -> Tensor:
        finest = self.encoder((_rgb(images) - CENTRE) / SPREAD)["0"]
        return F.interpolate(self.head(finest), images.shape[-2:], mode="bilinear")


def train(
    task: Task,
    batches: Iterator[tuple[Tensor, list[int], bool]],
    steps: int,
    lr: float,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """A model in eval mode, after `steps` steps on (uint8 images, scenes, mirrored or not)."""
    torch.manual_seed(seed)
    model = task.model().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(2, steps))
    for _ in range(steps):
        images, indices, flip = next(batches)
        shown = as_input(images.flip(-1) if flip else images, device)
        loss = task.loss(model, shown, indices, flip)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
    return model.eval()


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def as_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 on the host -> [0, 1] on the device."""
    return images.to(device).float() / 255


def _batches(model: nn.Module, images: Tensor, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """(index of the first, (B, 1, H, W) in [0, 1]) on the model's device."""
    device = next(model.parameters()).device
    for first in range(0, len(images), batch_size):
        yield first, as_input(images[first : first + batch_size], device)
