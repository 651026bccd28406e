"""Run models/fast/fused_qkv.py's kernels without a GPU and compare them with the plain arithmetic.

    TRITON_INTERPRET=1 python tests/interpreted_fused_qkv.py

A program of its own: the interpreter must be chosen before Triton is imported.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.attention import rotate
from models.fast import fused_qkv


def plain(cos, sin, streams):
    """q, k, v by torch's own operations."""
    parts = []
    for s in streams:
        q, k, v = s.y.chunk(3, dim=-1)
        if s.up.numel():
            q, k, v = (y + a @ b.t() for y, a, b in zip((q, k, v), s.low.chunk(3, dim=-1), s.up))
        q, k, v = (y.unflatten(-1, (-1, len(s.norm_q))) for y in (q, k, v))
        q, k = (F.rms_norm(y, n.shape, n, fused_qkv.EPS) for y, n in ((q, s.norm_q), (k, s.norm_k)))
        parts.append((q, k, v))
    q, k, v = (torch.cat(same, dim=1) for same in zip(*parts))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def compare(
    tokens: list[int],
    rank: int,
    adapted: list[bool],
    device: str = "cpu",
    dtype=torch.float32,
    shape=(2, 2, 32),
    tolerance=1e-5,
) -> float:
    """Largest relative difference of outputs and gradients."""
    torch.manual_seed(0)
    B, h, d = shape

    def normal(*size, grad=True):
        return torch.randn(*size, device=device).to(dtype).requires_grad_(grad)

    streams = [
        fused_qkv.HeadStream(
            normal(B, M, 3 * h * d),
            normal(B, M, 3 * rank) if has else torch.empty(0, device=device, dtype=dtype),
            normal(3, h * d, rank) if has else torch.empty(0, device=device, dtype=dtype),
            normal(d, grad=False),
            normal(d, grad=False),
        )
        for M, has in zip(tokens, adapted)
    ]
    angle = torch.rand(sum(tokens), d // 2, device=device).repeat_interleave(2, dim=1) * 6
    cos, sin = angle.cos(), angle.sin()
    wanted = [x for s in streams for x in s[:3] if x.numel()]
    weights = [torch.randn(B, sum(tokens), h, d, device=device).to(dtype) for _ in range(3)]

    def run(function, cos, sin, streams):
        out = function(cos, sin, streams)
        loss = sum((a.float() * b.float()).sum() for a, b in zip(out, weights))
        return [*out, *torch.autograd.grad(loss, wanted)]

    worst = 0.0
    for ours, theirs in zip(run(fused_qkv.heads, cos, sin, streams), run(plain, cos, sin, streams)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
    assert worst < tolerance, f"tokens {tokens}, rank {rank}, adapted {adapted}: {worst}"
    return worst


if __name__ == "__main__":
    for case in (
        ([40], 4, [True]),
        ([5, 35], 16, [False, True]),
        ([33], 0, [False]),
        ([32, 3], 20, [True, True]),
    ):
        print(*case, compare(*case))
    # the interpreter's product of two bf16 matrices is wrong: without adapters
    print("bf16", compare([35, 5], 0, [False, False], dtype=torch.bfloat16, tolerance=1e-2))
