"""From the product of q, k and v to what attention reads: adapters, norms and rotation in one pass.

    t = y + low up^T       q = rotate(t_q / rms(t_q) * norm_q)       k likewise       v = t_v

y is the frozen layers' product; low up^T what the adapters add to it. Streams (text, image) are
written one behind the other, so nothing is joined afterwards. A compiler makes eight passes of it.

Dimension key:  B batch   M tokens of a stream, S of all   h heads   d width of a head   D = h d
                r rank of the adapters   P = 3, for q, k and v
"""

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

EPS = 1e-6
TOKENS = 32  # of a program
WIDTHS = (16, 32, 64, 128, 256)  # of a head that the kernels are written for


class HeadStream(NamedTuple):
    y: Tensor  # (B, M, P D), contiguous
    low: Tensor  # (B, M, P r), contiguous; (0,) where nothing is adapted
    up: Tensor  # (P, D, r), contiguous; (0,) where nothing is adapted
    norm_q: Tensor  # (d,), not trained
    norm_k: Tensor  # (d,), not trained


def can_fuse(y: Tensor, width: int) -> bool:
    """Whether `heads` has a kernel for this device and width of a head."""
    return triton is not None and y.is_cuda and width in WIDTHS


def heads(cos_Sd: Tensor, sin_Sd: Tensor, streams: list[HeadStream]) -> tuple[Tensor, ...]:
    """q, k and v, each (B, S, h, d) contiguous, in y's dtype; gradients of y, low and up."""
    return _Heads.apply(cos_Sd, sin_Sd, *[x for stream in streams for x in stream])


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos_Sd, sin_Sd, *flat):
        ctx.save_for_backward(cos_Sd, sin_Sd, *flat)
        return heads_forward(cos_Sd, sin_Sd, list(flat))

    @staticmethod
    def backward(ctx, *gradients):
        cos_Sd, sin_Sd, *flat = ctx.saved_tensors
        contiguous = [g.contiguous() for g in gradients]
        found = heads_backward(*contiguous, cos_Sd, sin_Sd, flat)
        out = []
        for g, low, up in zip(found, flat[1::5], flat[2::5]):
            out += [g, *_of_adapters(g, low, up), None, None]
        return None, None, *out


def _of_adapters(g: Tensor, low: Tensor, up: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of low and up."""
    if not low.numel():
        return None, None
    P, D, r = up.shape
    g_PND = g.view(-1, P, D).transpose(0, 1)
    low_PNr = low.view(-1, P, r).transpose(0, 1)
    of_low = torch.bmm(g_PND, up).transpose(0, 1).reshape(low.shape)
    return of_low, torch.bmm(g_PND.transpose(1, 2), low_PNr)


@torch.library.custom_op("thermaflux::heads_forward", mutates_args=())
def heads_forward(
    cos_Sd: Tensor, sin_Sd: Tensor, flat: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """`flat`: the tensors of all streams, one behind the other."""
    q, k, v = _joint(cos_Sd, flat)
    for args, grid, sizes in _launches(cos_Sd, flat):
        _forward_kernel[grid](*args, cos_Sd, sin_Sd, q, k, v, **sizes)
    return q, k, v


@torch.library.custom_op("thermaflux::heads_backward", mutates_args=())
def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, flat: list[Tensor]
) -> list[Tensor]:
    """The gradient of every stream's y, which is also that of what its adapters add."""
    found = [torch.empty_like(y) for y in flat[::5]]
    for (args, grid, sizes), g in zip(_launches(cos_Sd, flat), found):
        _backward_kernel[grid](*args, cos_Sd, sin_Sd, dq, dk, dv, g, **sizes)
    return found


@heads_forward.register_fake
def _(cos_Sd, sin_Sd, flat):
    return _joint(cos_Sd, flat)


@heads_backward.register_fake
def _(dq, dk, dv, cos_Sd, sin_Sd, flat):
    return [torch.empty_like(y) for y in flat[::5]]


def _joint(cos_Sd: Tensor, flat: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    y, d = flat[0], flat[3].shape[0]
    shape = y.shape[0], cos_Sd.shape[0], y.shape[2] // (3 * d), d
    return tuple(y.new_empty(shape) for _ in range(3))


def _launches(cos_Sd: Tensor, flat: list[Tensor]):
    """Arguments, grid and sizes of the kernel for every stream."""
    first = 0
    for i in range(0, len(flat), 5):
        y, low, up, norm_q, norm_k = flat[i : i + 5]
        B, M, d = y.shape[0], y.shape[1], norm_q.shape[0]
        h, r = y.shape[2] // (3 * d), up.shape[-1] if up.numel() else 0
        sizes = dict(M=M, S=cos_Sd.shape[0], first=first, h=h, EPS=EPS, R=r,
                     RANK=max(16, triton.next_power_of_2(r)), WIDTH=d, TOKENS=TOKENS)  # fmt: skip
        yield (y, low, up, norm_q, norm_k), (triton.cdiv(M, TOKENS), h, B), sizes
        first += M


if triton is not None:

    @triton.jit
    def _place(M, S, first, h, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
        """Of this program: rows of y, offsets (TOKENS, WIDTH) in q and in cos, what is there."""
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
        inside = (token < M)[:, None]
        j = tl.arange(0, WIDTH)[None, :]
        row = (sample * M + token)[:, None]
        joint = ((sample * S + first + token)[:, None] * h + head) * WIDTH + j
        angle = (first + token)[:, None] * WIDTH + j
        return row, joint, angle, inside

    @triton.jit
    def _adapted(y, low, up, row, inside, h, part: tl.constexpr, R: tl.constexpr,
                 RANK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
        """t of one head: (TOKENS, WIDTH) fp32."""
        column = (part * h + tl.program_id(1)) * WIDTH + tl.arange(0, WIDTH)[None, :]
        t = tl.load(y + row * (3 * h * WIDTH) + column, inside, 0).to(tl.float32)
        if R > 0:
            rank = tl.arange(0, RANK)
            a = tl.load(low + row * (3 * R) + part * R + rank[None, :],
                        inside & (rank < R)[None, :], 0)  # fmt: skip
            b = tl.load(up + column * R + rank[:, None], (rank < R)[:, None], 0)
            t += tl.dot(a, b, input_precision="ieee")
        return t

    @triton.jit
    def _halves(x, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
        return tl.split(x.reshape(TOKENS, WIDTH // 2, 2))

    @triton.jit
    def _turned(t, norm, cos, sin, EPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
        """Normalised and rotated."""
        scale = tl.rsqrt(tl.sum(t * t, 1) / WIDTH + EPS)
        weight = tl.load(norm + tl.arange(0, WIDTH)).to(tl.float32)
        even, odd = _halves(t * scale[:, None] * weight[None, :], TOKENS, WIDTH)
        cos_even, cos_odd = _halves(cos, TOKENS, WIDTH)
        sin_even, sin_odd = _halves(sin, TOKENS, WIDTH)
        turned = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
        return turned.reshape(TOKENS, WIDTH)

    @triton.jit
    def _turned_back(g, t, norm, cos, sin, EPS: tl.constexpr, TOKENS: tl.constexpr,
                     WIDTH: tl.constexpr):  # fmt: skip
        """Gradient of t, given that of `_turned`."""
        even, odd = _halves(g, TOKENS, WIDTH)
        cos_even, cos_odd = _halves(cos, TOKENS, WIDTH)
        sin_even, sin_odd = _halves(sin, TOKENS, WIDTH)
        back = tl.join(even * cos_even + odd * sin_odd, odd * cos_odd - even * sin_even)
        weight = tl.load(norm + tl.arange(0, WIDTH)).to(tl.float32)
        a = back.reshape(TOKENS, WIDTH) * weight[None, :]
        scale = tl.rsqrt(tl.sum(t * t, 1) / WIDTH + EPS)[:, None]
        unit = t * scale
        return scale * (a - unit * (tl.sum(unit * a, 1) / WIDTH)[:, None])

    @triton.jit
    def _forward_kernel(y, low, up, norm_q, norm_k, cos, sin, q, k, v, M, S, first, h,
                        EPS: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
                        WIDTH: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
        row, joint, angle, inside = _place(M, S, first, h, WIDTH, TOKENS)
        c, s = tl.load(cos + angle, inside, 0), tl.load(sin + angle, inside, 0)
        t = _adapted(y, low, up, row, inside, h, 0, R, RANK, WIDTH)
        tl.store(q + joint, _turned(t, norm_q, c, s, EPS, TOKENS, WIDTH), inside)
        t = _adapted(y, low, up, row, inside, h, 1, R, RANK, WIDTH)
        tl.store(k + joint, _turned(t, norm_k, c, s, EPS, TOKENS, WIDTH), inside)
        tl.store(v + joint, _adapted(y, low, up, row, inside, h, 2, R, RANK, WIDTH), inside)

    @triton.jit
    def _backward_kernel(y, low, up, norm_q, norm_k, cos, sin, dq, dk, dv, out, M, S, first, h,
                         EPS: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
                         WIDTH: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
        row, joint, angle, inside = _place(M, S, first, h, WIDTH, TOKENS)
        c, s = tl.load(cos + angle, inside, 0), tl.load(sin + angle, inside, 0)
        D = h * WIDTH
        out += row * (3 * D) + tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
        t = _adapted(y, low, up, row, inside, h, 0, R, RANK, WIDTH)
        g = tl.load(dq + joint, inside, 0).to(tl.float32)
        tl.store(out, _turned_back(g, t, norm_q, c, s, EPS, TOKENS, WIDTH), inside)
        t = _adapted(y, low, up, row, inside, h, 1, R, RANK, WIDTH)
        g = tl.load(dk + joint, inside, 0).to(tl.float32)
        tl.store(out + D, _turned_back(g, t, norm_k, c, s, EPS, TOKENS, WIDTH), inside)
        tl.store(out + 2 * D, tl.load(dv + joint, inside, 0), inside)
