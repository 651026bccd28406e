"""What stands between e4m3 products that only sample: sums, norms and roundings, one pass each.

Fp8Matrix as it is: e4m3 holds 2^-9 to 448, a normalised row has values around 1, and what is beyond
448 becomes 448. So no row is read twice, to find its largest value first.

A bias that a product must add before its GELU goes into the product: it is written in the base
of `DIGITS`, each digit a column of the matrix, and the rows of x end with DIGITS themselves.

Dimension key:  B batch   S tokens   N rows   D width of a row   I input, O output width
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fast.fp8_quantise import E4M3, to_e4m3
from models.fast.pending_residual import PendingResidual, added_up

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

EPS = 1e-6  # of every norm in FLUX
DIGITS = (256.0, 16.0, 1.0, 1 / 16)  # each as exact in e4m3 as the next is large
DIGITS_WIDTH = 16  # bytes that a row grows by; zeros follow the digits
ALIGNMENT = 128  # bytes between rows, a multiple


def empty_rows(N: int, D: int, device: torch.device) -> Tensor:
    """Room for N rows of D values and the digits, e4m3 (N, D + DIGITS_WIDTH)."""
    width = D + DIGITS_WIDTH
    stride = -(-width // ALIGNMENT) * ALIGNMENT
    return torch.empty(N, stride, dtype=E4M3, device=device)[:, :width]


def with_bias(weight_OI: Tensor, unit: float, bias_O: Tensor) -> Tensor:
    """e4m3 weight, in units of `unit`, with the digits of a bias behind it: (O, I + 16).

    Exact to 2^-16 of the bias or 2^-14 of the unit; it must be less than 114688 units.
    """
    height, width = weight_OI.shape
    out = empty_rows(height, width, weight_OI.device)
    as_bytes = out.view(torch.uint8)
    as_bytes.zero_()
    as_bytes[:, :width] = weight_OI.view(torch.uint8)
    rest_O = bias_O.float() / unit
    for i, digit in enumerate(DIGITS):
        digit_O = to_e4m3(rest_O / digit)
        as_bytes[:, width + i] = digit_O.view(torch.uint8)
        rest_O = rest_O - digit * digit_O.float()
    return out


def add_norm_quantise(
    pending: PendingResidual, shift_BD: Tensor, scale_BD: Tensor
) -> tuple[Tensor, Tensor]:
    """The pending sum s, and norm(s) * (1 + scale) + shift in e4m3.

    Vectors of the time are (B, D), or (1, D) for all samples.
    Returns: s (B, S, D) in x's dtype; (B, S, D + 16) e4m3, the last of it DIGITS.
    """
    B, S, D = pending.x_BSD.shape
    out = empty_rows(B * S, D, pending.x_BSD.device).unflatten(0, (B, S))
    if pending.x_BSD.is_cuda:
        sums = torch.empty_like(pending.x_BSD)
        launch(pending, sums, out, shift_BD, scale_BD)
        return sums, out
    sums = added_up(PendingResidual(*(x if x is None else _float(x) for x in pending))).to(
        pending.x_BSD.dtype
    )
    h = F.layer_norm(sums.float(), (D,), eps=EPS)
    h = h * (1 + scale_BD.float()[:, None]) + shift_BD.float()[:, None]
    digits = h.new_zeros(B, S, DIGITS_WIDTH)
    digits[..., : len(DIGITS)] = h.new_tensor(DIGITS)
    out.copy_(torch.cat([to_e4m3(h).float(), digits], dim=2))
    return sums, out


def _float(x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return tuple(y.float() for y in x) if isinstance(x, tuple) else x.float()


def add_up(*parts: PendingResidual) -> Tensor:
    """The sums, one behind the other."""
    B, _, D = parts[0].x_BSD.shape
    if not parts[0].x_BSD.is_cuda:
        return added_up(*parts)
    sizes = [part.x_BSD.shape[1] for part in parts]
    out = parts[0].x_BSD.new_empty(B, sum(sizes), D)
    for part, of_part in zip(parts, out.split(sizes, dim=1)):
        launch(part, of_part)
    return out


def launch(
    pending: PendingResidual,
    sums: Tensor,
    out: Tensor | None = None,
    shift_BD: Tensor | None = None,
    scale_BD: Tensor | None = None,
) -> None:
    """The kernel of `add_norm_quantise`, or without `out` of `add_up`; writes `sums` and `out`."""
    (y,), bias, gate = pending.terms, pending.bias_D, pending.gate_BD
    x, y = pending.x_BSD.contiguous(), y.contiguous()
    B, S, D = x.shape
    shift, scale = (gate, gate) if out is None else (shift_BD, scale_BD)
    steps = [v.stride(0) if len(v) > 1 else 0 for v in (gate, shift, scale)]
    _add_norm_kernel[(S, B)](
        x,
        gate,
        y,
        y if bias is None else bias,
        shift,
        scale,
        sums,
        y if out is None else out,
        D,
        S,
        sums.stride(0),
        0 if out is None else out.stride(1),
        *steps,
        EPS=EPS,
        BIASED=bias is not None,
        ROUNDED=out is not None,
        DIGITS_WIDTH=DIGITS_WIDTH,
        BLOCK=triton.next_power_of_2(D),
        num_warps=8,
    )


def round_rows(x_BSD: Tensor, out_BSD: Tensor) -> None:
    """Write x to `out`, (B, S, D) e4m3; the rows of both may be parts of longer ones."""
    if x_BSD.is_cuda:
        return round_rows_by_kernel(x_BSD, out_BSD)
    out_BSD.copy_(to_e4m3(x_BSD))


def round_rows_by_kernel(x_BSD: Tensor, out_BSD: Tensor) -> None:
    """`round_rows` by the kernel."""
    B, S, D = x_BSD.shape
    assert x_BSD.stride(2) == out_BSD.stride(2) == 1
    _round_kernel[(S, B)](
        x_BSD,
        out_BSD,
        D,
        *x_BSD.stride()[:2],
        *out_BSD.stride()[:2],
        BLOCK=triton.next_power_of_2(D),
        num_warps=4,
    )


if triton is not None:

    @triton.jit
    def _e4m3(x):
        return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)

    @triton.jit
    def _add_norm_kernel(
        x,
        gate,
        y,
        bias,
        shift,
        scale,
        sums,
        out,
        width,
        S,
        sums_step,
        out_stride,
        gate_step,
        shift_step,
        scale_step,
        EPS: tl.constexpr,
        BIASED: tl.constexpr,
        ROUNDED: tl.constexpr,
        DIGITS_WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        row = sample * S + token
        i = tl.arange(0, BLOCK)
        inside = i < width
        term = tl.load(y + row * width + i, inside, 0).to(tl.float32)
        if BIASED:
            term += tl.load(bias + i, inside, 0).to(tl.float32)
        s = tl.load(x + row * width + i, inside, 0).to(tl.float32)
        s += tl.load(gate + sample * gate_step + i, inside, 0).to(tl.float32) * term
        s = s.to(sums.dtype.element_ty)  # the norm reads what the next block adds to
        tl.store(sums + sample * sums_step + token * width + i, s, inside)
        if ROUNDED:
            s = s.to(tl.float32)
            centred = tl.where(inside, s - tl.sum(s, 0) / width, 0)
            h = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + EPS)
            h *= 1 + tl.load(scale + sample * scale_step + i, inside, 0).to(tl.float32)
            h += tl.load(shift + sample * shift_step + i, inside, 0).to(tl.float32)
            tl.store(out + row * out_stride + i, _e4m3(h), inside)
            j = tl.arange(0, DIGITS_WIDTH)
            digit = tl.where(j < 4, tl.exp2(8.0 - 4.0 * j), 0.0)  # DIGITS
            tl.store(out + row * out_stride + width + j, _e4m3(digit))

    @triton.jit
    def _round_kernel(x, out, width, x_batch, x_token, out_batch, out_token, BLOCK: tl.constexpr):
        token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        i = tl.arange(0, BLOCK)
        inside = i < width
        value = tl.load(x + sample * x_batch + token * x_token + i, inside, 0).to(tl.float32)
        tl.store(out + sample * out_batch + token * out_token + i, _e4m3(value), inside)
