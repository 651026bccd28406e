"""A training step of stage 1 as one function: labels from the images, the network, the losses."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.pseudo_labels import LabelConfig, prepare_pseudo_labels
from losses.pretrain import MultiTaskPretrainLoss

# torch 2.11's common kernel for sums along rows and columns fails on these losses
OPTIONS = {"triton.mix_order_reduction": False}
# Relative difference of the loss, compiled and not: bf16's rounding makes 1e-4; a graph that torch
# 2.11 computes wrongly made 1.2e-2 after 350 steps, and nothing before it had learnt something.
TOLERANCE = 5e-3
COMPARE_EVERY = 500  # steps


def stage1_step(
    labels: LabelConfig,
    objective: MultiTaskPretrainLoss,
    compiled: bool = False,
    replayed: bool = False,
) -> Callable:
    """loss_fn(model, batch) -> (loss, parts to log), as `fit` wants it.

    Args:
        compiled: all of it is one graph for one shape, so that little of what lies between labels,
            maps and losses leaves the chip. The first step then takes a minute. Now and then
            the loss is also computed uncompiled (COMPARE_EVERY).
        replayed: a GPU replays the compiled step as one command, not a thousand kernels sent one by
            one. Gradients then live where the next step writes: not for accumulation.
    Raises (loss_fn): RuntimeError: compiled, the loss is another one.
    """

    def step(model: nn.Module, visible: Tensor, infrared: Tensor, semantic: Tensor):
        wanted = prepare_pseudo_labels(visible, infrared, semantic, labels)
        maps, fused = model(visible)
        intensity, material, context = maps
        return objective(intensity, material, context, fused, wanted, infrared[:, :1])

    plain, calls = step, itertools.count()
    if compiled:
        options: dict[str, Any] = OPTIONS | ({"triton.cudagraphs": True} if replayed else {})
        step = torch.compile(step, dynamic=False, options=options)

    def loss_fn(model: nn.Module, batch: Batch):
        images = batch["visible"], batch["infrared"], batch["semantic"]
        checked = compiled and next(calls) % COMPARE_EVERY == 0
        expected = _without_a_trace(plain, model, images) if checked else None
        loss, parts = step(model, *images)
        if expected is not None:
            _compare(loss.item(), expected.item())
        if replayed:  # the next replay writes over what this one returned
            loss, parts = loss.clone(), {name: part.clone() for name, part in parts.items()}
        return loss, parts

    return loss_fn


@torch.no_grad()
def _without_a_trace(step: Callable, model: nn.Module, images: tuple[Tensor, ...]) -> Tensor:
    """The loss of a step that leaves the model as it was, including BatchNorm's running means."""
    before = [buffer.clone() for buffer in model.buffers()]
    loss, _ = step(model, *images)
    for buffer, old in zip(model.buffers(), before):
        buffer.copy_(old)
    return loss


def _compare(loss: float, expected: float) -> None:
    if abs(loss - expected) > TOLERANCE * abs(expected):
        raise RuntimeError(
            f"compiled, this step has a loss of {loss:.6g}, uncompiled {expected:.6g}: torch "
            f"{torch.__version__} compiles it wrongly; train with compile=false"
        )
