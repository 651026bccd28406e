"""AdamW for the trained parameters, and the learning rate of each step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from utils.problems import Checked, refuse

if TYPE_CHECKING:
    from utils.loop import FitConfig


@dataclass(kw_only=True)
class AdamWParams(Checked):
    lr: float = 1e-4
    weight_decay: float = 1e-4  # only for tensors with two or more dimensions
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def problems(self) -> Iterator[str]:
        if self.lr < 0:
            yield f"optimizer.params.lr must not be negative, got {self.lr}"
        if not (0 <= self.weight_decay < math.inf and 0 < self.eps < math.inf):
            yield (
                "optimizer.params needs weight_decay >= 0 and eps > 0, both finite, got "
                f"{self.weight_decay} and {self.eps}"
            )


@dataclass(kw_only=True)
class OptimizerConfig:
    type: Literal["adamw"] = "adamw"
    params: AdamWParams = field(default_factory=AdamWParams)
    # learn parts of the model slower or faster: start of a parameter's name -> factor on lr
    lr_scale: dict[str, float] = field(default_factory=dict)


def schedule_problems(cfg: "FitConfig") -> Iterator[str]:
    """A sentence if the cosine schedule would rise."""
    lr, lr_min = cfg.optimizer.params.lr, cfg.training.lr_min
    if cfg.training.schedule == "cosine" and lr_min > lr:
        yield f"training.lr_min {lr_min} is above optimizer.params.lr {lr}"


def make_optimizer(cfg: "FitConfig", trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; biases, norms and scales (fewer than two dimensions) do not decay.

    Args: trained: parameters by name.
    Raises:
        ValueError: nothing to train, training.lr_min above the learning rate, a value out of range,
            an entry of lr_scale that names no parameter.
    """
    params = cfg.optimizer.params
    if not trained:
        raise ValueError("no parameter of the model requires grad: there is nothing to train")
    refuse([*params.problems(), *schedule_problems(cfg)])
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    # matrices first: a checkpoint identifies parameters by their position in this order
    for name, p in sorted(trained.items(), key=lambda item: item[1].ndim < 2):
        key = _lr_scale(cfg.optimizer.lr_scale, name), params.weight_decay * (p.ndim >= 2)
        groups.setdefault(key, []).append(p)
    for start, factor in cfg.optimizer.lr_scale.items():
        if factor < 0 or not any(name.startswith(start) for name in trained):
            raise ValueError(
                f"optimizer.lr_scale.{start} is {factor}: it needs a factor of 0 or more, and a"
                f" trained parameter with that prefix, such as {next(iter(trained))}"
            )
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "scale": s} for (s, decay), p in groups.items()],
        lr=params.lr,
        betas=(params.betas[0], params.betas[1]),
        eps=params.eps,
        fused=next(iter(trained.values())).is_cuda,
    )


def _lr_scale(scales: dict[str, float], name: str) -> float:
    """The factor of the longest entry that the name starts with."""
    fits = [start for start in scales if name.startswith(start)]
    return scales[max(fits, key=len)] if fits else 1.0


def learning_rate(cfg: "FitConfig", step: int, steps: int, seconds: float = 0.0) -> float:
    """Linear warm-up to optimizer.params.lr, then a cosine to training.lr_min, or constant.

    The cosine follows the share of the steps done or, if it is larger, the share of
    training.max_seconds used (`seconds`): it ends with whatever ends the run.
    """
    training, peak = cfg.training, cfg.optimizer.params.lr
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return peak
    done = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    if training.max_seconds:
        done = min(1.0, max(done, seconds / training.max_seconds))
    return training.lr_min + (peak - training.lr_min) * 0.5 * (1 + math.cos(math.pi * done))
