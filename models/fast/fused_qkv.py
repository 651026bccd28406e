"""From the product of q, k and v to what attention reads: adapters, norms and rotation in one pass.

    t = y + low up^T       q = rotate(t_q / rms(t_q) * norm_q)       k likewise       v = t_v

y is the frozen layers' product; low up^T what the adapters add to it. Streams (text, image) are
written one behind the other, so nothing is joined afterwards. A compiler needs several passes.

Dimension key:  B batch   M tokens of a stream, S of all   h heads   d width of a head   D = h d
                r rank of the adapters   P = 3, for q, k and v
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without it
    triton = None

EPS = 1e-6  # of every norm in FLUX
FORWARD, BACKWARD = (16, 2), (16, 2)  # tokens and warps of a program, which makes one head
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
    """q, k and v, each (B, S, h, d) contiguous, in y's dtype; gradients of y, low and up.

    cos and sin: fp32, contiguous; the two values of a pair are equal, as FLUX's are.
    """
    return _Heads.apply(cos_Sd, sin_Sd, *[x for stream in streams for x in stream])


def _streams(flat: Sequence[Tensor]) -> list[HeadStream]:
    """autograd and custom operators take tensors one by one: those of all streams, in order."""
    count = len(HeadStream._fields)
    return [HeadStream(*flat[i : i + count]) for i in range(0, len(flat), count)]


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
        out: list[Tensor | None] = []
        for g, stream in zip(found, _streams(flat)):
            of_low, of_up = _of_adapters(g, stream.low, stream.up)
            out += HeadStream(g, of_low, of_up, None, None)
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
    """`flat`: see `_streams`."""
    q, k, v = _joint(cos_Sd, flat)
    for stream, grid, sizes in _launches(cos_Sd, flat, *FORWARD):
        _forward_kernel[grid](*stream, cos_Sd, sin_Sd, q, k, v, **sizes)
    return q, k, v


@torch.library.custom_op("thermaflux::heads_backward", mutates_args=())
def heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, flat: list[Tensor]
) -> list[Tensor]:
    """The gradient of every stream's y, which is also that of what its adapters add."""
    found = [torch.empty_like(stream.y) for stream in _streams(flat)]
    for (stream, grid, sizes), g in zip(_launches(cos_Sd, flat, *BACKWARD), found):
        _backward_kernel[grid](*stream, cos_Sd, sin_Sd, dq, dk, dv, g, **sizes)
    return found


@heads_forward.register_fake
def _(cos_Sd, sin_Sd, flat):
    return _joint(cos_Sd, flat)


@heads_backward.register_fake
def _(dq, dk, dv, cos_Sd, sin_Sd, flat):
    return [torch.empty_like(stream.y) for stream in _streams(flat)]


def _joint(cos_Sd: Tensor, flat: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    stream = _streams(flat)[0]
    y, d = stream.y, stream.norm_q.shape[0]
    shape = y.shape[0], cos_Sd.shape[0], y.shape[2] // (3 * d), d
    q, k, v = (y.new_empty(shape) for _ in range(3))
    return q, k, v


class _Launch(NamedTuple):
    """Of the kernel, for one stream."""

    stream: HeadStream
    grid: tuple[int, int, int]
    sizes: dict[str, Any]


def _launches(cos_Sd: Tensor, flat: list[Tensor], tokens: int, warps: int) -> Iterator[_Launch]:
    first = 0
    for stream in _streams(flat):
        y, up, d = stream.y, stream.up, stream.norm_q.shape[0]
        B, M = y.shape[:2]
        h, r = y.shape[2] // (3 * d), up.shape[-1] if up.numel() else 0
        sizes = dict(
            M=M,
            S=cos_Sd.shape[0],
            first=first,
            h=h,
            EPS=EPS,
            R=r,
            RANK=max(16, triton.next_power_of_2(r)),
            WIDTH=d,
            TOKENS=tokens,
            PACKED=y.dtype == torch.bfloat16,
            num_warps=warps,
        )
        yield _Launch(stream, (triton.cdiv(M, tokens), h, B), sizes)
        first += M


if triton is not None:

    @triton.jit
    def _pairs(M, S, first, h, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
        """Of this program: rows of y, (TOKENS, WIDTH / 2) places of pairs in a row of y,
        rows of q, and which there are."""
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        sample = tl.program_id(2).to(tl.int64)
        head, pair = tl.program_id(1), tl.arange(0, WIDTH // 2)[None, :]
        row = (sample * M + token)[:, None]
        joint = (sample * S + first + token)[:, None] * h + head
        return row, head * (WIDTH // 2) + pair, joint, (token < M)[:, None]

    @triton.jit
    def _load(x, at, inside, PACKED: tl.constexpr):
        """Even and odd values of pairs, fp32; two bf16 are read as one number of 32 bits."""
        if PACKED:
            both = tl.load(x.to(tl.pointer_type(tl.int32)) + at, inside, 0)
            even, odd = both << 16, both & -65536
            even, odd = even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
        else:
            even = tl.load(x + 2 * at, inside, 0).to(tl.float32)
            odd = tl.load(x + 2 * at + 1, inside, 0).to(tl.float32)
        return even, odd

    @triton.jit
    def _store(x, at, even, odd, inside, PACKED: tl.constexpr):
        if PACKED:
            low = even.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
            high = odd.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
            tl.store(x.to(tl.pointer_type(tl.int32)) + at, low | high, inside)
        else:
            tl.store(x + 2 * at, even, inside)
            tl.store(x + 2 * at + 1, odd, inside)

    @triton.jit
    def _adapted(
        y,
        low,
        up,
        row,
        column,
        inside,
        h,
        part: tl.constexpr,
        R: tl.constexpr,
        RANK: tl.constexpr,
        WIDTH: tl.constexpr,
        PACKED: tl.constexpr,
    ):
        """t of one head, even and odd."""
        column += part * h * (WIDTH // 2)
        even, odd = _load(y, row * (3 * h * (WIDTH // 2)) + column, inside, PACKED)
        if R > 0:
            rank = tl.arange(0, RANK)
            there = (rank < R)[:, None]
            a = tl.load(
                low + row * (3 * R) + part * R + rank[None, :], inside & (rank < R)[None, :], 0
            )
            at = 2 * column * R + rank[:, None]
            even += tl.dot(a, tl.load(up + at, there, 0), input_precision="ieee")
            odd += tl.dot(a, tl.load(up + at + R, there, 0), input_precision="ieee")
        return even, odd

    @triton.jit
    def _scale(even, odd, EPS: tl.constexpr, WIDTH: tl.constexpr):
        """1 / root mean square of a head: (TOKENS, 1)."""
        return tl.rsqrt(tl.sum(even * even + odd * odd, 1) / WIDTH + EPS)[:, None]

    @triton.jit
    def _weights(norm, WIDTH: tl.constexpr):
        pair = tl.arange(0, WIDTH // 2)
        even, odd = tl.load(norm + 2 * pair), tl.load(norm + 2 * pair + 1)
        return even.to(tl.float32)[None, :], odd.to(tl.float32)[None, :]

    @triton.jit
    def _turned(even, odd, norm, c, s, EPS: tl.constexpr, WIDTH: tl.constexpr):
        """Normalised and rotated."""
        weight_even, weight_odd = _weights(norm, WIDTH)
        scale = _scale(even, odd, EPS, WIDTH)
        even, odd = even * scale * weight_even, odd * scale * weight_odd
        return even * c - odd * s, odd * c + even * s

    @triton.jit
    def _turned_back(g_even, g_odd, even, odd, norm, c, s, EPS: tl.constexpr, WIDTH: tl.constexpr):
        """Gradient of t, given that of `_turned`."""
        weight_even, weight_odd = _weights(norm, WIDTH)
        scale = _scale(even, odd, EPS, WIDTH)
        a_even = (g_even * c + g_odd * s) * weight_even
        a_odd = (g_odd * c - g_even * s) * weight_odd
        even, odd = even * scale, odd * scale
        along = (tl.sum(even * a_even + odd * a_odd, 1) / WIDTH)[:, None]
        return scale * (a_even - even * along), scale * (a_odd - odd * along)

    @triton.jit
    def _angles(cos, sin, M, first, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
        """cos and sin of every pair: (TOKENS, WIDTH / 2)."""
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        at = (first + token)[:, None] * WIDTH + 2 * tl.arange(0, WIDTH // 2)[None, :]
        inside = (token < M)[:, None]
        return tl.load(cos + at, inside, 0), tl.load(sin + at, inside, 0)

    @triton.jit
    def _in_row(row, WIDTH: tl.constexpr):
        """Places of the pairs of q's rows."""
        return row * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]

    @triton.jit
    def _forward_kernel(
        y,
        low,
        up,
        norm_q,
        norm_k,
        cos,
        sin,
        q,
        k,
        v,
        M,
        S,
        first,
        h,
        EPS: tl.constexpr,
        R: tl.constexpr,
        RANK: tl.constexpr,
        WIDTH: tl.constexpr,
        TOKENS: tl.constexpr,
        PACKED: tl.constexpr,
    ):
        c, s = _angles(cos, sin, M, first, WIDTH, TOKENS)
        row, column, joint, inside = _pairs(M, S, first, h, WIDTH, TOKENS)
        joint = _in_row(joint, WIDTH)
        even, odd = _adapted(y, low, up, row, column, inside, h, 0, R, RANK, WIDTH, PACKED)
        even, odd = _turned(even, odd, norm_q, c, s, EPS, WIDTH)
        _store(q, joint, even, odd, inside, PACKED)
        even, odd = _adapted(y, low, up, row, column, inside, h, 1, R, RANK, WIDTH, PACKED)
        even, odd = _turned(even, odd, norm_k, c, s, EPS, WIDTH)
        _store(k, joint, even, odd, inside, PACKED)
        even, odd = _adapted(y, low, up, row, column, inside, h, 2, R, RANK, WIDTH, PACKED)
        _store(v, joint, even, odd, inside, PACKED)

    @triton.jit
    def _backward_kernel(
        y,
        low,
        up,
        norm_q,
        norm_k,
        cos,
        sin,
        dq,
        dk,
        dv,
        out,
        M,
        S,
        first,
        h,
        EPS: tl.constexpr,
        R: tl.constexpr,
        RANK: tl.constexpr,
        WIDTH: tl.constexpr,
        TOKENS: tl.constexpr,
        PACKED: tl.constexpr,
    ):
        c, s = _angles(cos, sin, M, first, WIDTH, TOKENS)
        D = h * (WIDTH // 2)  # pairs of q in a row
        row, column, joint, inside = _pairs(M, S, first, h, WIDTH, TOKENS)
        at, joint = row * (3 * D) + column, _in_row(joint, WIDTH)
        even, odd = _adapted(y, low, up, row, column, inside, h, 0, R, RANK, WIDTH, PACKED)
        g_even, g_odd = _load(dq, joint, inside, PACKED)
        even, odd = _turned_back(g_even, g_odd, even, odd, norm_q, c, s, EPS, WIDTH)
        _store(out, at, even, odd, inside, PACKED)
        even, odd = _adapted(y, low, up, row, column, inside, h, 1, R, RANK, WIDTH, PACKED)
        g_even, g_odd = _load(dk, joint, inside, PACKED)
        even, odd = _turned_back(g_even, g_odd, even, odd, norm_k, c, s, EPS, WIDTH)
        _store(out, at + D, even, odd, inside, PACKED)
        g_even, g_odd = _load(dv, joint, inside, PACKED)
        _store(out, at + 2 * D, g_even, g_odd, inside, PACKED)
