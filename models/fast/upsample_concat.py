"""Bilinear doubling of a map, written beside another map of the doubled size in one pass.

In one dimension out[2i] = 3/4 x[i] + 1/4 x[i-1] and out[2i+1] = 3/4 x[i] + 1/4 x[i+1], so the
gradient of x[i] is a sum over out[2i-1 .. 2i+2] with weights 1/4, 3/4, 3/4, 1/4. At an edge the
missing neighbour is the edge itself. torch's gradient on a GPU is scattered with atomic additions
(slow, and not the same in every run), and compilers compute every element's index and weights.

Dimension key:  B batch   C channels of the map   S of the other   h, w positions, doubled to 2h, 2w
"""

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

POSITIONS, CHANNELS = 16, 64  # of a program; positions of one row


def double_beside(x: Tensor, other: Tensor) -> Tensor:
    """(B, C, h, w) doubled, then `other` (B, S, 2h, 2w), as channels: (B, C + S, 2h, 2w)."""
    if triton is None or not x.is_cuda:
        doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.cat([doubled, other], dim=1)
    return _DoubleBeside.apply(x, other)


class _DoubleBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, other):
        ctx.channels = x.shape[1]
        return double_forward(x, other)

    @staticmethod
    def backward(ctx, g):
        return double_backward(g, ctx.channels), g[:, ctx.channels :]


@torch.library.custom_op("thermaflux::double_forward", mutates_args=())
def double_forward(x: Tensor, other: Tensor) -> Tensor:
    """`double_beside` on a GPU; channels last."""
    out = _beside(x, other)
    x = x.contiguous(memory_format=torch.channels_last)
    B, C, h, w = x.shape
    grid = B * h, triton.cdiv(w, POSITIONS), triton.cdiv(C, CHANNELS)
    _forward_kernel[grid](x, out, h, w, C, out.shape[1], POSITIONS=POSITIONS, CHANNELS=CHANNELS)
    out[:, C:] = other
    return out


@torch.library.custom_op("thermaflux::double_backward", mutates_args=())
def double_backward(g: Tensor, channels: int) -> Tensor:
    """The gradient of x (B, C, h, w), given that of all channels (B, C + S, 2h, 2w)."""
    g = g.contiguous(memory_format=torch.channels_last)
    out = _half(g, channels)
    B, C, h, w = out.shape
    grid = B * h, triton.cdiv(w, POSITIONS), triton.cdiv(C, CHANNELS)
    _backward_kernel[grid](g, out, h, w, C, g.shape[1], POSITIONS=POSITIONS, CHANNELS=CHANNELS)
    return out


@double_forward.register_fake
def _beside(x, other):
    B, C, h, w = x.shape
    shape = B, C + other.shape[1], 2 * h, 2 * w
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@double_backward.register_fake
def _half(g, channels):
    shape = g.shape[0], channels, g.shape[2] // 2, g.shape[3] // 2
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)


if triton is not None:

    @triton.jit
    def _place(h, w, C, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
        """Of this program: sample, row, its positions, its channels, and which there are."""
        sample, i = tl.program_id(0) // h, tl.program_id(0) % h
        j = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
        c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        return sample.to(tl.int64), i, j, c, (j < w) & (c < C)

    @triton.jit
    def _row(x, at, C, before, j, after, c, inside):
        """A row's positions with their neighbours: three (POSITIONS, CHANNELS) fp32."""
        return (
            tl.load(x + (at + before) * C + c, inside, 0).to(tl.float32),
            tl.load(x + (at + j) * C + c, inside, 0).to(tl.float32),
            tl.load(x + (at + after) * C + c, inside, 0).to(tl.float32),
        )

    @triton.jit
    def _pair(before, middle, after, out, at, D, j, c, inside):
        """The two pixels of each position in one row of the output."""
        kind = out.dtype.element_ty
        place = (at + 2 * j) * D + c
        tl.store(out + place, (0.75 * middle + 0.25 * before).to(kind), inside)
        tl.store(out + place + D, (0.75 * middle + 0.25 * after).to(kind), inside)

    @triton.jit
    def _forward_kernel(x, out, h, w, C, D, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
        sample, i, j, c, inside = _place(h, w, C, POSITIONS, CHANNELS)
        before, after = tl.maximum(j - 1, 0), tl.minimum(j + 1, w - 1)
        top = (sample * h + tl.maximum(i - 1, 0)) * w
        middle = (sample * h + i) * w
        bottom = (sample * h + tl.minimum(i + 1, h - 1)) * w
        b0, m0, a0 = _row(x, top, C, before, j, after, c, inside)
        b1, m1, a1 = _row(x, middle, C, before, j, after, c, inside)
        b2, m2, a2 = _row(x, bottom, C, before, j, after, c, inside)
        at = (sample * 2 * h + 2 * i) * 2 * w
        _pair(
            0.75 * b1 + 0.25 * b0,
            0.75 * m1 + 0.25 * m0,
            0.75 * a1 + 0.25 * a0,
            out,
            at,
            D,
            j,
            c,
            inside,
        )
        _pair(
            0.75 * b1 + 0.25 * b2,
            0.75 * m1 + 0.25 * m2,
            0.75 * a1 + 0.25 * a2,
            out,
            at + 2 * w,
            D,
            j,
            c,
            inside,
        )

    @triton.jit
    def _gathered(g, at, w, D, j, c, inside):
        """What one row of the output's gradient gives to each position: fp32."""
        first, last = tl.maximum(2 * j - 1, 0), tl.minimum(2 * j + 2, 2 * w - 1)
        far = tl.load(g + (at + first) * D + c, inside, 0).to(tl.float32)
        near = tl.load(g + (at + 2 * j) * D + c, inside, 0).to(tl.float32)
        near += tl.load(g + (at + 2 * j + 1) * D + c, inside, 0).to(tl.float32)
        far += tl.load(g + (at + last) * D + c, inside, 0).to(tl.float32)
        return 0.75 * near + 0.25 * far

    @triton.jit
    def _backward_kernel(g, out, h, w, C, D, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
        sample, i, j, c, inside = _place(h, w, C, POSITIONS, CHANNELS)
        top = sample * 2 * h
        first, last = tl.maximum(2 * i - 1, 0), tl.minimum(2 * i + 2, 2 * h - 1)
        far = _gathered(g, (top + first) * 2 * w, w, D, j, c, inside)
        near = _gathered(g, (top + 2 * i) * 2 * w, w, D, j, c, inside)
        near += _gathered(g, (top + 2 * i + 1) * 2 * w, w, D, j, c, inside)
        far += _gathered(g, (top + last) * 2 * w, w, D, j, c, inside)
        value = (0.75 * near + 0.25 * far).to(out.dtype.element_ty)
        tl.store(out + ((sample * h + i) * w + j) * C + c, value, inside)
