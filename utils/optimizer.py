"""AdamW over what is trained, and its learning rate from step to step."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn


@dataclass(kw_only=True)
class AdamWParams:
    lr: float = 1e-4
    weight_decay: float = 1e-4  # of tensors with two or more dimensions
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(kw_only=True)
class OptimizerConfig:
    type: Literal["adamw"] = "adamw"
    params: AdamWParams = field(default_factory=AdamWParams)


def make_optimizer(cfg: Any, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; biases, norms and scales (fewer than two dimensions) do not decay.

    Raises:
        ValueError: nothing to train, training.lr_min above the learning rate, a value out of range.
    """
    params, lr_min = cfg.optimizer.params, cfg.training.lr_min
    if not trained:
        raise ValueError("no parameter of the model requires grad: there is nothing to train")
    if params.lr < 0:
        raise ValueError(f"optimizer.params.lr must not be negative, got {params.lr}")
    if cfg.training.schedule == "cosine" and lr_min > params.lr:
        raise ValueError(f"training.lr_min {lr_min} is above optimizer.params.lr {params.lr}")
    if not (0 <= params.weight_decay < math.inf and 0 < params.eps < math.inf):
        raise ValueError(
            "optimizer.params needs weight_decay >= 0 and eps > 0, both finite, got "
            f"{params.weight_decay} and {params.eps}"
        )
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=params.lr,
        betas=tuple(params.betas),
        eps=params.eps,
        fused=trained[0].is_cuda,
    )


def learning_rate(cfg: Any, step: int, steps: int, seconds: float = 0.0) -> float:
    """Linear warm-up to optimizer.params.lr, then a cosine to training.lr_min, or constant.

    The cosine's place is the share of the steps that is done or, where it is larger, the share of
    training.max_seconds (`seconds` of it are over): it ends with whatever ends the run.
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
