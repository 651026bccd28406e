"""Frozen matrices in bf16 or 8-bit floats, with the gradient of their input and of nothing else.

    y = x W^T        x and W rounded to e4m3, one scale a row of each
    dx = g W         g * scale(W) rounded to e4m3, one scale a row

Backward uses the very bytes of forward, transposed: W's scales lie along the summed dimension there,
so they go into g before it is rounded. The transposed copy may be kept (faster) or made when needed.
Only matrices are rounded; accumulation, biases, norms, attention and adapters are not.
Source: Micikevicius et al. 2022 (arXiv:2209.05433), e4m3; row-wise scales as torch._scaled_mm has them.

Dimension key:  N rows (tokens)   I input width   O output width
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # widths the hardware's product takes
CAPABILITY = (8, 9)  # the first GPUs that multiply e4m3


class Matrix(NamedTuple):
    """The tensors of one frozen linear layer."""

    weight_OI: Tensor  # bf16 or fp32, or e4m3 in units of `scale_O`
    bias_O: Tensor | None
    scale_O: Tensor | None = None  # fp32; None: the weight is not rounded
    transposed_IO: Tensor | None = None  # e4m3; a copy in the layout that backward reads
    native: bool = False  # e4m3 products run in hardware; else they are emulated


class Frozen(nn.Module):
    """Holds one frozen matrix (perhaps several layers' rows, one below the other).

    The bytes of e4m3 are kept as uint8, which every collective, checkpoint and `.to()` leaves alone.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, fp8: bool = False,
                 transposed: bool = False):  # fmt: skip
        super().__init__()
        scale = copy = None
        if fp8:
            rounded, scale = quantise(weight_OI)
            weight_OI, scale = rounded.view(torch.uint8), scale.flatten()
            copy = weight_OI.t().contiguous() if transposed else None
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("transposed", copy, persistent=False)

    def matrix(self) -> Matrix:
        """What the functions of this file take; views, so it costs nothing."""
        if self.scale is None:
            return Matrix(self.weight, self.bias)
        copy = None if self.transposed is None else self.transposed.view(E4M3)
        native = multiplies_e4m3(self.weight.device)
        return Matrix(self.weight.view(E4M3), self.bias, self.scale, copy, native)


def quantise(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 (N, I) and its scales (N, 1) fp32: x is about their product."""
    scale_N1 = x_NI.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x_NI.float() / scale_N1).to(E4M3), scale_N1


def linear(x: Tensor, m: Matrix) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    if m.scale_O is None:
        return F.linear(x, m.weight_OI, m.bias_O)
    return _Product.apply(x.flatten(0, -2), *m).unflatten(0, x.shape[:-1])


def linear_of_few(x: Tensor, m: Matrix) -> Tensor:
    """`linear` for a handful of rows without gradient: x itself is not rounded."""
    if m.scale_O is None:
        return F.linear(x, m.weight_OI, m.bias_O)
    weight = (m.weight_OI.float() * m.scale_O[:, None]).to(x.dtype)
    return F.linear(x, weight, m.bias_O)


class _Product(torch.autograd.Function):
    """x W^T + b for a frozen, rounded W; keeps only W."""

    @staticmethod
    def forward(ctx, x_NI, weight_OI, bias_O, scale_O, transposed_IO, native):
        ctx.native = native
        ctx.save_for_backward(weight_OI, scale_O, transposed_IO)
        x8, scale_N1 = quantise(x_NI)
        return _scaled(x8, weight_OI, scale_N1, scale_O, bias_O, x_NI.dtype, native)

    @staticmethod
    def backward(ctx, g_NO):
        weight_OI, scale_O, transposed_IO = ctx.saved_tensors
        if transposed_IO is None:
            transposed_IO = weight_OI.view(torch.uint8).t().contiguous().view(E4M3)
        g8, scale_N1 = quantise(g_NO.float() * scale_O)
        ones_I = torch.ones(len(transposed_IO), device=g_NO.device)
        dx = _scaled(g8, transposed_IO, scale_N1, ones_I, None, g_NO.dtype, ctx.native)
        return dx, None, None, None, None, None


def _scaled(a_NI: Tensor, b_OI: Tensor, a_scale_N1: Tensor, b_scale_O: Tensor,
            bias_O: Tensor | None, dtype: torch.dtype, native: bool) -> Tensor:  # fmt: skip
    """a b^T with its scales, (N, O). Where the hardware cannot, the same rounding in `dtype`."""
    if native:
        return torch._scaled_mm(a_NI, b_OI.t(), scale_a=a_scale_N1, scale_b=b_scale_O[None],
                                bias=bias_O, out_dtype=dtype, use_fast_accum=True)  # fmt: skip
    y = (a_NI.to(dtype) @ b_OI.to(dtype).t()).float() * a_scale_N1 * b_scale_O
    return (y if bias_O is None else y + bias_O).to(dtype)


@cache
def multiplies_e4m3(device: torch.device) -> bool:
    """True where e4m3 products run in hardware; elsewhere they are emulated, and nothing is gained."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
