"""What the streams yield and the scripts train on: samples and batches, their keys and shapes.

Dimension key:  B batch   H, W pixels   N tokens of the diptych
"""

from typing import TypedDict

from torch import Tensor


class _Latents(TypedDict, total=False):
    """With data.latents: of the diptych as it is, and with a grey infrared half."""

    latents: Tensor  # (N, 64) fp32 of a sample, (B, N, 64) of a batch
    masked: Tensor  # the same


class Sample(_Latents):
    """One pair."""

    visible: Tensor  # (3, H, W) fp32 in [0, 1]
    infrared: Tensor  # (3, H, W) fp32 in [0, 1], its three channels are equal
    semantic: Tensor  # (H, W) int64, 255 = unlabelled
    draw: int  # its index in the data set, or its position in a stream
    name: str
    source: str


class Batch(_Latents):
    """Samples combined: tensors are stacked; the rest is in lists, which stay on the host."""

    visible: Tensor  # (B, 3, H, W) fp32 in [0, 1]
    infrared: Tensor  # (B, 3, H, W) fp32 in [0, 1], its three channels are equal
    semantic: Tensor  # (B, H, W) int64, 255 = unlabelled
    draw: list[int]
    name: list[str]
    source: list[str]


class BatchInStep(Batch):
    """A batch of `in_step`, which gives every rank equally many."""

    filler: bool  # it only keeps the other ranks company: its results must not count
