"""What a run would do: its configuration, sizes, one batch and the memory of one step."""

import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils import config, dist
from utils.loop import FitConfig
from utils.optimizer import make_optimizer


def dry_run(
    cfg: FitConfig,
    model: nn.Module,
    data: dict,
    batch: Mapping[str, Any],
    loss: Callable[[], Tensor],
) -> None:
    """Print it all from rank 0, after one forward and backward pass; nothing is written.

    Args:
        data: plain facts about the data set.
        loss: runs one forward pass on `batch`; a scalar.
    """
    # made for its checks alone: a dry run refuses what the run would
    make_optimizer(cfg, {n: p for n, p in model.named_parameters() if p.requires_grad})
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autocast(device.type, torch.bfloat16, cfg.training.mixed_precision == "bf16"):
        value = loss()
    value.backward()
    lines = ["", "configuration", config.to_yaml(cfg), "parameters"]
    for name, module in model.named_children():
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
        lines.append(f"  {name:<14} trained {trained:>14,}   frozen {frozen:>14,}")
    lines += ["", "data", *(f"  {name}: {fact}" for name, fact in data.items())]
    lines += ["", "one batch", *(f"  {name:<14} {_describe(x)}" for name, x in batch.items())]
    lines += ["", f"one step: loss {value.item():.4g}, {_memory(device)}"]
    dist.print0("\n".join(lines))


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} of {len(value)}, first {value[0]!r}"
    low, high = value.min().item(), value.max().item()
    return f"{tuple(value.shape)} {str(value.dtype)[6:]} from {low:.4g} to {high:.4g}"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak {peak / 2**30:.2f} GiB of the process's memory"
