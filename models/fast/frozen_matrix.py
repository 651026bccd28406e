"""Frozen matrices in bf16 or 8-bit floats, with the gradient of their input and of nothing else.

    y = x W^T        x and W rounded to e4m3, one scale a row of each
    dx = g W         g * scale(W) rounded to e4m3, one scale a row

Backward uses the very bytes of forward, transposed: W's scales lie along the summed dimension
there, so they go into g before it is rounded. The transposed copy may be kept (faster) or made when
needed.
Only matrices are rounded; accumulation, biases, norms, attention and adapters are not.
Source: Micikevicius et al. 2022 (arXiv:2209.05433), e4m3; row-wise scales as in torch._scaled_mm.

Dimension key:  N rows (tokens)   I input width   O output width
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fast.fp8_quantise import (
    E4M3,
    gelu,
    gelu_backward_quantise,
    gelu_quantise,
    quantise,
    wide_quantise,
)

CAPABILITY = (8, 9)  # the first GPUs that multiply e4m3
COMPILED_ROW = 4096  # a compiler keeps rows up to this one on the chip while it rounds them


class Matrix(NamedTuple):
    """The tensors of one frozen linear layer."""

    weight_OI: Tensor  # bf16 or fp32, or e4m3 in units of `scale_O`
    bias_O: Tensor | None
    scale_O: Tensor | None = None  # fp32; None: the weight is not rounded
    transposed_IO: Tensor | None = None  # e4m3; a copy in the layout that backward reads
    native: bool = False  # e4m3 products run in hardware; else they are emulated
    fused: bool = False  # bf16 products may do what follows them (models/fast/fused_gemm.py)


class Frozen(nn.Module):
    """Holds one frozen matrix (perhaps several layers' rows, one below the other).

    The bytes of e4m3 are kept as uint8, which collectives, checkpoints and `.to()` leave alone.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        fp8: bool = False,
        transposed: bool = False,
        largest: float | None = None,
        fused: bool = False,
    ):
        """
        Args:
            transposed: keep a copy in the layout that the backward pass reads.
            largest: one unit for the whole matrix, with room for this value; else one a row.
            fused: see Matrix.
        """
        super().__init__()
        self.fused = fused
        scale = copy = None
        if fp8:
            rounded, scale = quantise(weight_OI, largest)
            weight_OI, scale = rounded.view(torch.uint8), scale.flatten()
            copy = weight_OI.t().contiguous() if transposed else None
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("transposed", copy, persistent=False)

    def matrix(self) -> Matrix:
        """What the functions of this file take; views, so it costs nothing."""
        if self.scale is None:
            return Matrix(self.weight, self.bias, fused=self.fused)
        copy = None if self.transposed is None else self.transposed.view(E4M3)
        native = multiplies_e4m3(self.weight.device)
        return Matrix(self.weight.view(E4M3), self.bias, self.scale, copy, native)


def linear(x: Tensor, m: Matrix) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    if m.scale_O is None:
        return F.linear(x, m.weight_OI, m.bias_O)
    return _Product.apply(x.flatten(0, -2), *m).unflatten(0, x.shape[:-1])


def mlp(x: Tensor, up: Matrix, down: Matrix) -> Tensor:
    """down(gelu(up(x))), x (..., I) -> (..., O) in x's dtype."""
    if up.scale_O is None:
        return linear(gelu(linear(x, up)), down)
    return _Mlp.apply(x.flatten(0, -2), *up, *down).unflatten(0, x.shape[:-1])


def linear_of_few(x: Tensor, m: Matrix) -> Tensor:
    """`linear` for a handful of rows without gradient: x itself is not rounded."""
    if m.scale_O is None:
        return F.linear(x, m.weight_OI, m.bias_O)
    weight = (m.weight_OI.float() * m.scale_O[:, None]).to(x.dtype)
    return F.linear(x, weight, m.bias_O)


class _Saved(NamedTuple):
    """What the backward pass reads of a Matrix."""

    weight_OI: Tensor
    scale_O: Tensor
    transposed_IO: Tensor | None

    @classmethod
    def of(cls, m: Matrix) -> "_Saved":
        return cls(m.weight_OI, m.scale_O, m.transposed_IO)


# autograd's functions take tensors one by one: matrices go in and out unpacked


class _Product(torch.autograd.Function):
    """x W^T + b for a frozen, rounded W; keeps only W."""

    @staticmethod
    def forward(ctx, x_NI, *matrix):
        m = Matrix(*matrix)
        ctx.native = m.native
        ctx.save_for_backward(*_Saved.of(m))
        return _product(*quantise(x_NI), m, x_NI.dtype)

    @staticmethod
    def backward(ctx, g_NO):
        m = _Saved(*ctx.saved_tensors)
        wide, scale_O = g_NO.shape[1] > COMPILED_ROW, m.scale_O
        g8 = wide_quantise(g_NO.contiguous(), scale_O) if wide else quantise(g_NO.float() * scale_O)
        return _back(*g8, m, g_NO.dtype, ctx.native), *[None] * len(Matrix._fields)


class _Mlp(torch.autograd.Function):
    """Two frozen, rounded matrices and the GELU between them; keeps what is before the GELU."""

    @staticmethod
    def forward(ctx, x_NI, *matrices):
        count = len(Matrix._fields)
        up, down = Matrix(*matrices[:count]), Matrix(*matrices[count:])
        ctx.native = up.native
        before = _product(*quantise(x_NI), up, x_NI.dtype)
        ctx.save_for_backward(before, *_Saved.of(up), *_Saved.of(down))
        return _product(*gelu_quantise(before), down, x_NI.dtype)

    @staticmethod
    def backward(ctx, g_NO):
        before, *saved = ctx.saved_tensors
        count, kind = len(_Saved._fields), (g_NO.dtype, ctx.native)
        up, down = _Saved(*saved[:count]), _Saved(*saved[count:])
        dh = _back(*quantise(g_NO.float() * down.scale_O), down, *kind)
        dx = _back(*gelu_backward_quantise(dh, before, up.scale_O), up, *kind)
        return dx, *[None] * (2 * len(Matrix._fields))


def _product(x8_NI: Tensor, scale_N1: Tensor, m: Matrix, dtype: torch.dtype) -> Tensor:
    """x W^T + b (N, O)."""
    return _scaled(x8_NI, m.weight_OI, scale_N1, m.scale_O, m.bias_O, dtype, m.native)


def _back(g8_NO: Tensor, scale_N1: Tensor, m: _Saved, dtype: torch.dtype, native: bool) -> Tensor:
    """g W (N, I); W's own scales are in g already."""
    transposed_IO = m.transposed_IO
    if transposed_IO is None:
        transposed_IO = m.weight_OI.view(torch.uint8).t().contiguous().view(E4M3)
    ones_I = torch.ones(len(transposed_IO), device=g8_NO.device)
    return _scaled(g8_NO, transposed_IO, scale_N1, ones_I, None, dtype, native)


def _scaled(
    a_NI: Tensor,
    b_OI: Tensor,
    a_scale_N1: Tensor,
    b_scale_O: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    native: bool,
) -> Tensor:
    """a b^T with its scales, (N, O). Where the hardware cannot, the same rounding in `dtype`."""
    if native:
        return torch._scaled_mm(
            a_NI,
            b_OI.t(),
            scale_a=a_scale_N1,
            scale_b=b_scale_O[None],
            bias=bias_O,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    y = (a_NI.to(dtype) @ b_OI.to(dtype).t()).float() * a_scale_N1 * b_scale_O
    y = y if bias_O is None else y + bias_O
    # not `.to(dtype)` of fp32 itself: torch 2.11, compiling, then loses the gradient of a Function
    return y if dtype == torch.float32 else y.to(dtype)


@cache
def multiplies_e4m3(device: torch.device) -> bool:
    """True where e4m3 products run in hardware; elsewhere they are emulated at no gain."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
