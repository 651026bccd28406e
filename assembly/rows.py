"""The rows of evaluate.py's table: names, and functions from a batch to infrared images.

To add a row, add a `Row` to one of the two lists.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from assembly.checkpoints import Opened
from assembly.peers import Peer, PeerPairs
from baselines.training import BaselineConfig
from data.pairs import DataConfig, open_pairs
from data.stream import sequential
from models.sampler import translate
from models.stage1 import Stage1Output

MEAN_IMAGES = 400  # at most so many training images, evenly spaced, go into the training mean
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
Batch = dict[str, Any]


class Row(NamedTuple):
    """One method.

    image: a batch on the device -> (B, 1, H, W) in [0, 1], or n samples of each image,
        (B, n, H, W): their mean is the image, their standard deviation its uncertainty.
    of_model: what the checkpoint made; such rows are compared with all others.
    """

    name: str
    image: Callable[[Batch], Tensor]
    of_model: bool = True


def reference_rows(training_mean: Tensor | None) -> list[Row]:
    """Rows without a model: the training mean (1, 1, H, W) where it is known, and both greys."""
    rows = [Row("grey", grey, False), Row("inverted grey", lambda batch: 1 - grey(batch), False)]
    if training_mean is None:
        return rows

    def mean(batch: Batch) -> Tensor:
        visible = batch["visible"]
        image = training_mean.to(visible.device)
        if image.shape[-2:] != visible.shape[-2:]:  # images keep their own aspects
            image = F.interpolate(image, visible.shape[-2:], mode="bilinear", antialias=True)
        return image.expand(len(visible), -1, -1, -1)

    return [Row("training mean", mean, False), *rows]


def training_mean(
    data: DataConfig, batch_size: int, needed: bool, peer: Peer | None = None
) -> tuple[Tensor | None, str]:
    """(1, 1, H, W), the mean infrared image of the training split pixel by pixel, and no note.

    Images of several aspects are squashed to data.size for it: `reference_rows` stretches it back.
    With a peer's protocol, of images cropped as it says. Where the training data is not at hand: no
    image, and a note that says so, unless `needed`.
    """
    train: Any
    try:
        aspect = "squash" if data.aspect == "buckets" else data.aspect
        train = open_pairs(replace(data, aspect=aspect), "train")
    except ValueError as error:
        if needed:
            raise
        return None, f"no row of the training mean, its pairs are missing: {error}"
    train = PeerPairs(train, peer) if peer else train
    total, count = torch.zeros(()), 0
    for batch in sequential(train, batch_size, num_workers=data.num_workers, limit=MEAN_IMAGES):
        total = total + batch["infrared"][:, :1].double().sum(0, keepdim=True)
        count += len(batch["infrared"])
    return (total / count).float(), ""


def model_rows(opened: Opened) -> list[Row]:
    """The checkpoint's rows, from the simplest to the last stage; the last row is its best.

    For a run of stage 1 without physics: no row.
    """
    if isinstance(opened.trained, BaselineConfig):
        network: Any = opened.stage1
        seed = opened.trained.training.seed
        name = {"unet": "U-Net", "pix2pix": "pix2pix"}[opened.trained.model.baseline]
        return [Row(name, lambda batch: network.generate(batch["visible"], batch["draw"], seed))]
    rows = []
    if opened.stage1.fusion is not None:
        rows.append(Row("fused (stage 1)", lambda batch: fused(decomposed(opened, batch))))
    trained: Any = opened.trained
    if opened.translator and (share := trained.flow.mean_share) < 1:
        rows.append(Row("sample" if share else "ours", lambda batch: samples(opened, batch)))
    if opened.translator and trained.flow.mean_share > 0:
        rows.append(Row("mean", lambda batch: mean(opened, batch)))
    return rows


def codec_rows(opened: Opened) -> list[Row]:
    """What the codec leaves of the true image, which no model behind it can exceed; none without
    a codec."""
    trained: Any = opened.trained
    if not opened.translator or trained.model.layout == "pixels":
        return []
    translator = opened.translator

    def round_trip(batch: Batch) -> Tensor:
        state = translator.encode(batch["visible"], batch["infrared"])
        return translator.decode(state, batch["visible"].shape[-2:])

    return [Row("codec round trip", round_trip, False)]


def mean(opened: Opened, batch: Batch) -> Tensor:
    """The mean prediction: one forward pass without noise, or two where the run mirrors."""
    assert opened.translator is not None and opened.sampling is not None
    cfg = replace(opened.sampling, mode="mean")
    return translate(opened.translator, batch["visible"], batch["draw"], cfg)


def grey(batch: Batch) -> Tensor:
    luma = torch.tensor(LUMA, device=batch["visible"].device).view(1, 3, 1, 1)
    return (batch["visible"] * luma).sum(1, keepdim=True).clamp(0, 1)


def fused(seen: Stage1Output) -> Tensor:
    assert seen.fused is not None
    return seen.fused.mean(1, keepdim=True).clamp(0, 1)


def decomposed(opened: Opened, batch: Batch) -> Stage1Output:
    """Stage 1's output, computed once per batch."""
    if "decomposed" not in batch:
        network = opened.translator.decompose if opened.translator else opened.stage1
        batch["decomposed"] = network(batch["visible"])
    return batch["decomposed"]


def samples(opened: Opened, batch: Batch) -> Tensor:
    """(B, n, H, W): the samples that `translate` averages, one by one and not mirrored."""
    assert opened.translator is not None and opened.sampling is not None
    n = opened.sampling.samples
    one = replace(opened.sampling, mode="sample", samples=1, mirror=False)
    keys = [[draw * n + k for draw in batch["draw"]] for k in range(n)]
    found = [translate(opened.translator, batch["visible"], key, one) for key in keys]
    return torch.cat(found, 1)
