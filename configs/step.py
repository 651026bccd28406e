"""A training step of stage 1 as one function: labels from the images, the network, the losses."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.pseudo_labels import LabelConfig, prepare_pseudo_labels
from losses.pretrain import MultiTaskPretrainLoss

# torch 2.11's common kernel for sums along rows and columns fails on these losses
OPTIONS = {"triton.mix_order_reduction": False}


def stage1_step(labels: LabelConfig, objective: MultiTaskPretrainLoss, compiled: bool) -> Callable:
    """loss_fn(model, batch) -> (loss, parts to log), as `fit` wants it.

    Args: compiled: all of it is one graph for one shape, so that little of what lies between
        labels, maps and losses leaves the chip. The first step then takes a minute.
    """

    def step(model: nn.Module, visible: Tensor, infrared: Tensor, semantic: Tensor):
        wanted = prepare_pseudo_labels(visible, infrared, semantic, labels)
        maps, fused = model(visible)
        return objective(*maps, fused, wanted, infrared[:, :1])

    if compiled:
        step = torch.compile(step, dynamic=False, options=OPTIONS)
    return lambda model, batch: step(model, batch["visible"], batch["infrared"], batch["semantic"])
