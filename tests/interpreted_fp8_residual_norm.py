"""Run the kernels between e4m3 products without a GPU and compare them with plain torch.

    TRITON_INTERPRET=1 python tests/interpreted_fp8_residual_norm.py

A program of its own: the interpreter must be chosen before Triton is imported.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.fast import fp8_residual_norm
from models.fast.fp8_qk import Turned, kernel_heads, turned_heads
from models.fast.fp8_quantise import E4M3, to_e4m3
from models.fast.pending_residual import PendingResidual


def same(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """Share of equal values of e4m3."""
    assert ours.dtype == plain.dtype == E4M3 and ours.shape == plain.shape
    assert ours.float().isfinite().all()
    return (ours.float() == plain.float()).float().mean().item()


@torch.no_grad()
def compare_heads(tokens: list[int], device: str = "cpu", dtype=torch.float32) -> float:
    torch.manual_seed(0)
    B, h, d = 2, 2, 32
    streams = [
        Turned(
            torch.randn(B, M, 2 * h * d, device=device).to(dtype),
            *(300 * torch.rand(2, d, device=device)).to(dtype),
        )
        for M in tokens
    ]
    angle = torch.rand(sum(tokens), d // 2, device=device).repeat_interleave(2, dim=1) * 6
    turned = angle.cos(), angle.sin()
    exact = [Turned(*(x.float() for x in s)) for s in streams]
    plain = [to_e4m3(x) for x in turned_heads(*turned, exact)]
    assert all((x.float() == 448).any() for x in plain)  # something is cut off
    return min(same(*pair) for pair in zip(kernel_heads(*turned, streams), plain))


@torch.no_grad()
def compare_settle(samples: int, device: str = "cpu", dtype=torch.float32, biased=True) -> float:
    """`samples`: how many rows the vectors of the time have, 1 or 2."""
    torch.manual_seed(1)
    B, S, D = 2, 5, 48

    def normal(*size, scale=1.0):
        return (scale * torch.randn(size)).to(dtype)

    pending = PendingResidual(
        normal(B, S, D),
        normal(samples, D),
        (normal(B, S, D),),
        normal(D, scale=9.0) if biased else None,
    )
    shift, scale = normal(samples, D, scale=200.0), normal(samples, D)
    sums, out = fp8_residual_norm.add_norm_quantise(pending, shift, scale)

    def moved(x):
        return (
            x
            if x is None
            else tuple(y.to(device) for y in x)
            if isinstance(x, tuple)
            else (x.to(device))
        )

    ours = PendingResidual(*(moved(x) for x in pending))
    found_out = fp8_residual_norm.empty_rows(B * S, D, device).unflatten(0, (B, S))
    found, wide = torch.empty_like(ours[0]), torch.zeros(B, 2 * S, D, device=device, dtype=dtype)
    fp8_residual_norm.launch(ours, found, found_out, shift.to(device), scale.to(device))
    fp8_residual_norm.launch(ours, wide[:, S:])
    assert torch.equal(wide[:, S:], found) and not wide[:, :S].any()
    assert (found.cpu().float() - sums.float()).norm() < 3e-3 * sums.float().norm()
    assert torch.equal(found_out.cpu().float()[..., D:], out.float()[..., D:])
    return same(found_out.cpu(), out)


def compare_rounding(device: str = "cpu", dtype=torch.float32) -> float:
    torch.manual_seed(2)
    x = (300 * torch.randn(2, 9, 48, device=device)).to(dtype)[:, 3:8]
    wide = torch.zeros(2, 5, 80, device=device).to(E4M3)
    fp8_residual_norm.round_rows_by_kernel(x, wide[..., 16:64])
    assert not wide[..., :16].float().any() and not wide[..., 64:].float().any()
    return same(wide[..., 16:64], to_e4m3(x))


def compare_all(device: str = "cpu", dtype=torch.float32) -> dict[str, float]:
    return {
        "one stream": compare_heads([40], device, dtype),
        "two streams": compare_heads([5, 35], device, dtype),
        "add_norm_quantise": compare_settle(1, device, dtype),
        "add_norm_quantise, a time for each": compare_settle(2, device, dtype),
        "add_norm_quantise, no bias": compare_settle(1, device, dtype, biased=False),
        "rounding": compare_rounding(device, dtype),
    }


if __name__ == "__main__":
    for name, share in compare_all().items():
        # the interpreter loses the carry where a value is rounded up to a power of 2
        assert share > 0.9, (name, share)
        print(name, share)
