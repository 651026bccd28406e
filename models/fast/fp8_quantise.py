"""Rounding to e4m3 in one pass over each row, alone and with the GELU, forward and backward.

A row of the MLP is 12288 wide, one of q, k and v 9216: a compiler that loops over it reads it and
computes the GELU twice, once for the row's largest value and once to round. Here a row stays in
registers. Not on a GPU, the same is done in plain torch. GELU is the tanh form, written as
x * sigmoid(2 u): less to compute.
Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415, Sec. 2).

Dimension key:  N rows (tokens)   I width of a row
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST = 1e-12  # of a row's largest value, so that a row of zeros has a scale
SLOPE, CUBE = 1.5957691216057308, 0.044715  # 2 u = SLOPE * (x + CUBE * x^3)
PARTS = 3  # of a row, each a power of 2 wide: 12288 is 3 * 4096


def quantise(x_NI: Tensor, largest: float | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 (N, I) and its scales (N, 1) fp32: x is about their product.

    largest: what all rows leave room for, and are cut to; else each row's own largest value.
    """
    if largest is not None:
        x_NI = x_NI.clamp(-largest, largest)
        largest_N1 = torch.full((len(x_NI), 1), largest, device=x_NI.device)
    else:
        largest_N1 = x_NI.abs().amax(-1, keepdim=True).float()
    scale_N1 = largest_N1.clamp(min=SMALLEST) / LARGEST
    return (x_NI.float() * (1 / scale_N1)).to(E4M3), scale_N1


def to_e4m3(x: Tensor) -> Tensor:
    """x in e4m3, as it is: it holds 2^-9 to 448, and what is beyond 448 becomes 448."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3)


def gelu(x: Tensor) -> Tensor:
    """torch's gelu(approximate="tanh"), in x's dtype."""
    y = x.float()
    return (y * torch.sigmoid(SLOPE * (y + CUBE * y * y * y))).to(x.dtype)


@torch.library.custom_op("thermaflux::gelu_quantise", mutates_args=())
def gelu_quantise(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """quantise(gelu(x)); x contiguous."""
    if not x_NI.is_cuda:
        return quantise(gelu(x_NI.float()))
    out, scale_N1 = _outputs(x_NI)
    _gelu_kernel[(len(x_NI),)](x_NI, out, scale_N1, x_NI.shape[1], BLOCK=_block(x_NI), num_warps=8)
    return out, scale_N1


@torch.library.custom_op("thermaflux::gelu_backward_quantise", mutates_args=())
def gelu_backward_quantise(g_NI: Tensor, x_NI: Tensor, by_I: Tensor) -> tuple[Tensor, Tensor]:
    """quantise(g * gelu'(x) * by); g and x contiguous."""
    if not x_NI.is_cuda:
        x = x_NI.float()
        s = torch.sigmoid(SLOPE * (x + CUBE * x**3))
        slope = s + x * s * (1 - s) * SLOPE * (1 + 3 * CUBE * x * x)
        return quantise(g_NI.float() * slope * by_I)
    out, scale_N1 = _outputs(x_NI)
    _gelu_backward_kernel[(len(x_NI),)](
        g_NI, x_NI, by_I, out, scale_N1, x_NI.shape[1], BLOCK=_block(x_NI), num_warps=8
    )
    return out, scale_N1


@torch.library.custom_op("thermaflux::wide_quantise", mutates_args=())
def wide_quantise(x_NI: Tensor, by_I: Tensor) -> tuple[Tensor, Tensor]:
    """quantise(x * by) of rows too wide for a compiler to keep; x contiguous, by fp32."""
    if not x_NI.is_cuda:
        return quantise(x_NI.float() * by_I)
    out, scale_N1 = _outputs(x_NI)
    _wide_kernel[(len(x_NI),)](
        x_NI, by_I, out, scale_N1, x_NI.shape[1], BLOCK=_block(x_NI), num_warps=8
    )
    return out, scale_N1


@gelu_quantise.register_fake
def _(x_NI):
    return _outputs(x_NI)


@wide_quantise.register_fake
def _(x_NI, by_I):
    return _outputs(x_NI)


@gelu_backward_quantise.register_fake
def _(g_NI, x_NI, by_I):
    return _outputs(x_NI)


def _outputs(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(x_NI.shape, dtype=E4M3, device=x_NI.device)
    return out, torch.empty(len(x_NI), 1, dtype=torch.float32, device=x_NI.device)


def _block(x_NI: Tensor) -> int:
    return triton.next_power_of_2(triton.cdiv(x_NI.shape[1], PARTS))


if triton is not None:

    @triton.jit
    def _sigmoid(x):
        """Of 2 u, for x before the GELU."""
        return 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))

    @triton.jit
    def _gelu_kernel(x_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK) + BLOCK
        k = j + BLOCK
        x_ptr += row * width
        a = tl.load(x_ptr + i, i < width, 0).to(tl.float32)
        b = tl.load(x_ptr + j, j < width, 0).to(tl.float32)
        c = tl.load(x_ptr + k, k < width, 0).to(tl.float32)
        a, b, c = a * _sigmoid(a), b * _sigmoid(b), c * _sigmoid(c)
        _round(a, b, c, i, j, k, row, out_ptr, scale_ptr, width)

    @triton.jit
    def _gelu_backward_kernel(g_ptr, x_ptr, by_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK) + BLOCK
        k = j + BLOCK
        a = _product(g_ptr, x_ptr, by_ptr, row, i, width)
        b = _product(g_ptr, x_ptr, by_ptr, row, j, width)
        c = _product(g_ptr, x_ptr, by_ptr, row, k, width)
        _round(a, b, c, i, j, k, row, out_ptr, scale_ptr, width)

    @triton.jit
    def _wide_kernel(x_ptr, by_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK) + BLOCK
        k = j + BLOCK
        x_ptr += row * width
        a = tl.load(x_ptr + i, i < width, 0).to(tl.float32) * tl.load(by_ptr + i, i < width, 0)
        b = tl.load(x_ptr + j, j < width, 0).to(tl.float32) * tl.load(by_ptr + j, j < width, 0)
        c = tl.load(x_ptr + k, k < width, 0).to(tl.float32) * tl.load(by_ptr + k, k < width, 0)
        _round(a, b, c, i, j, k, row, out_ptr, scale_ptr, width)

    @triton.jit
    def _product(g_ptr, x_ptr, by_ptr, row, i, width):
        """g * gelu'(x) * by of one part of a row."""
        x = tl.load(x_ptr + row * width + i, i < width, 0).to(tl.float32)
        g = tl.load(g_ptr + row * width + i, i < width, 0).to(tl.float32)
        s = _sigmoid(x)
        slope = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
        return g * slope * tl.load(by_ptr + i, i < width, 0)

    @triton.jit
    def _round(a, b, c, i, j, k, row, out_ptr, scale_ptr, width):
        largest = tl.max(tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.abs(c)), 0)
        scale = tl.maximum(largest, 1e-12) / 448.0
        tl.store(scale_ptr + row, scale)
        inverse = 1 / scale
        out_ptr += row * width
        tl.store(out_ptr + i, (a * inverse).to(tl.float8e4nv), i < width)
        tl.store(out_ptr + j, (b * inverse).to(tl.float8e4nv), j < width)
        tl.store(out_ptr + k, (c * inverse).to(tl.float8e4nv), k < width)
