"""From the product of q and k to what attention reads in e4m3: norms, rotation, rounding.

As models/fast/fused_qkv.py without adapters; values need nothing of the kind, their product is
rounded as it is written. Streams (text, image) are written one behind the other.

Dimension key:  B batch   M tokens of a stream, S of all   h heads   d width of a head
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import rotate
from models.fast import fused_qkv
from models.fast.fp8_quantise import E4M3, to_e4m3
from models.fast.fused_qkv import EPS, can_fuse

TOKENS, WARPS = 4, 1  # of a program, which makes one head


class Turned(NamedTuple):
    """One stream's product of q and k, and their norms."""

    y: Tensor  # (B, M, 2 h d), contiguous
    norm_q: Tensor  # (d,)
    norm_k: Tensor  # (d,)


def fp8_qk_heads(cos_Sd: Tensor, sin_Sd: Tensor, streams: list[Turned]) -> tuple[Tensor, Tensor]:
    """q and k, each (B, S, h, d) e4m3. cos and sin: as in `heads`."""
    y, norm_q, _ = streams[0]
    if not can_fuse(y, len(norm_q)):
        q, k = (to_e4m3(x) for x in turned_heads(cos_Sd, sin_Sd, streams))
        return q, k
    return kernel_heads(cos_Sd, sin_Sd, streams)


def turned_heads(cos_Sd: Tensor, sin_Sd: Tensor, streams: list[Turned]) -> list[Tensor]:
    """q and k, not rounded, by torch's own operations."""
    of_streams = [
        [
            F.rms_norm(x.unflatten(-1, (-1, len(n))), n.shape, n, EPS)
            for x, n in zip(y.chunk(2, dim=-1), norms)
        ]
        for y, *norms in streams
    ]
    joined = [torch.cat(parts, dim=1) for parts in zip(*of_streams)]
    return [rotate(x, cos_Sd, sin_Sd) for x in joined]


def kernel_heads(cos_Sd: Tensor, sin_Sd: Tensor, streams: list[Turned]) -> tuple[Tensor, Tensor]:
    """`fp8_qk_heads` by the kernel."""
    y, norm_q, _ = streams[0]
    S, d = cos_Sd.shape
    h = y.shape[2] // (2 * d)
    q, k = (y.new_empty(len(y), S, h, d, dtype=E4M3) for _ in range(2))
    first = 0
    for y, norm_q, norm_k in streams:
        B, M, _ = y.shape
        _fp8_qk_kernel[(-(-M // TOKENS), h, B)](
            y,
            norm_q,
            norm_k,
            cos_Sd,
            sin_Sd,
            q,
            k,
            M,
            S,
            first,
            h,
            EPS=EPS,
            WIDTH=d,
            TOKENS=TOKENS,
            PACKED=y.dtype == torch.bfloat16,
            num_warps=WARPS,
        )
        first += M
    return q, k


if fused_qkv.triton is not None:
    import triton
    import triton.language as tl

    from models.fast.fused_qkv import _angles, _load, _pairs
    from models.fast.fused_qkv import _turned as _turn

    @triton.jit
    def _store_heads(x, row, even, odd, inside, WIDTH: tl.constexpr):
        # not two packed in 16 bits: Triton 3.6 gets those wrong (LOG.md)
        both = tl.minimum(tl.maximum(tl.interleave(even, odd), -448.0), 448.0)
        at = row * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(x + at, both.to(tl.float8e4nv), inside)

    @triton.jit
    def _fp8_qk_kernel(
        y,
        norm_q,
        norm_k,
        cos,
        sin,
        q,
        k,
        M,
        S,
        first,
        h,
        EPS: tl.constexpr,
        WIDTH: tl.constexpr,
        TOKENS: tl.constexpr,
        PACKED: tl.constexpr,
    ):
        c, s = _angles(cos, sin, M, first, WIDTH, TOKENS)
        D = h * (WIDTH // 2)  # pairs of q in a row
        row, column, joint, inside = _pairs(M, S, first, h, WIDTH, TOKENS)
        at = row * (2 * D) + column
        even, odd = _load(y, at, inside, PACKED)
        even, odd = _turn(even, odd, norm_q, c, s, EPS, WIDTH)
        _store_heads(q, joint, even, odd, inside, WIDTH)
        even, odd = _load(y, at + D, inside, PACKED)
        even, odd = _turn(even, odd, norm_k, c, s, EPS, WIDTH)
        _store_heads(k, joint, even, odd, inside, WIDTH)
