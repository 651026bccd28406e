"""Run the kernels of models/fast/upsample_concat.py without a GPU; compare with interpolation.

    TRITON_INTERPRET=1 python tests/interpreted_upsample_concat.py

A program of its own: the interpreter must be chosen before Triton is imported.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.fast.upsample_concat import _DoubleBeside

SHAPES = [((2, 5, 3, 4), 2), ((1, 70, 1, 1), 1), ((1, 2, 2, 19), 66)]


def plain(x, other):
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.cat([doubled, other], dim=1)


def compare(
    shape: tuple[int, ...], beside: int, device: str = "cpu", dtype=torch.float32, tolerance=1e-6
) -> float:
    """Largest relative difference of the output and of both gradients."""
    torch.manual_seed(0)
    B, _, h, w = shape
    x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
    other = torch.randn(B, beside, 2 * h, 2 * w, device=device).to(dtype)
    weight = torch.randn(B, shape[1] + beside, 2 * h, 2 * w, device=device)
    x.requires_grad_(), other.requires_grad_()
    found = []
    for function, kind in ((_DoubleBeside.apply, dtype), (plain, torch.float32)):
        out = function(x.to(kind), other.to(kind))
        found.append([out, *torch.autograd.grad((out * weight).sum(), (x, other))])
    worst = 0.0
    for ours, theirs in zip(*found):
        assert ours.shape == theirs.shape
        worst = max(worst, ((ours.float() - theirs).norm() / theirs.norm()).item())
    assert worst < tolerance, f"{shape} beside {beside}: {worst}"
    return worst


if __name__ == "__main__":
    for case in SHAPES:
        print(case, compare(*case))
