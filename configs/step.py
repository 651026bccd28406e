"""A training step of stage 1 as one function: labels from the images, the network, the losses."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.pseudo_labels import LabelConfig, prepare_pseudo_labels
from losses.pretrain import MultiTaskPretrainLoss

# torch 2.11's common kernel for sums along rows and columns fails on these losses
OPTIONS = {"triton.mix_order_reduction": False}


def stage1_step(labels: LabelConfig, objective: MultiTaskPretrainLoss, compiled: bool = False,
                replayed: bool = False) -> Callable:  # fmt: skip
    """loss_fn(model, batch) -> (loss, parts to log), as `fit` wants it.

    Args:
        compiled: all of it is one graph for one shape, so that little of what lies between labels,
            maps and losses leaves the chip. The first step then takes a minute.
        replayed: a GPU replays the compiled step as one command, not a thousand kernels sent one by
            one. Gradients then live where the next step writes: not for accumulation.
    """

    def step(model: nn.Module, visible: Tensor, infrared: Tensor, semantic: Tensor):
        wanted = prepare_pseudo_labels(visible, infrared, semantic, labels)
        maps, fused = model(visible)
        return objective(*maps, fused, wanted, infrared[:, :1])

    if compiled:
        options = OPTIONS | ({"triton.cudagraphs": True} if replayed else {})
        step = torch.compile(step, dynamic=False, options=options)

    def loss_fn(model: nn.Module, batch: dict):
        loss, parts = step(model, batch["visible"], batch["infrared"], batch["semantic"])
        if replayed:  # the next replay writes over what this one returned
            loss, parts = loss.clone(), {name: part.clone() for name, part in parts.items()}
        return loss, parts

    return loss_fn
