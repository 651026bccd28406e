"""FLUX's blocks for sampling with everything that is multiplied in e4m3: products and attention.

The arithmetic is that of models/fast/train_blocks.py without adapters. What is faster:
    attention reads e4m3 (models/fast/fp8_attention.py)
    a product applies GELU and rounds what it writes (models/fast/cublaslt_gemm.py)
    residual sum, norm and rounding are one pass (models/fast/fp8_residual_norm.py)
    a single block's attention and MLP are rounded side by side, for one product of both
Nothing is compiled by torch. It needs a Hopper GPU and an extra package; `choose` tries it.

Dimension key:  B batch   N image, M text, S all tokens   D model   F inside the MLP   I, O widths
"""

import logging
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.fast import train_blocks
from models.fast.cublaslt_gemm import multiply
from models.fast.fp8_attention import HOPPER, attend_fp8, gap
from models.fast.fp8_qk import Turned, fp8_qk_heads
from models.fast.fp8_quantise import E4M3
from models.fast.fp8_residual_norm import add_norm_quantise, round_rows, with_bias
from models.fast.frozen_matrix import Frozen, Matrix
from models.fast.pending_residual import PendingResidual
from models.fast.train_blocks import Stream, Wanted

log = logging.getLogger(__name__)
TOLERANCE = 0.1  # relative, of attention beside bf16; of normal values the rounding makes 0.05
BLOCK_TOLERANCE = 0.05  # of a block beside the same rounding in plain torch
MUCH = 1e-5  # share of a tensor's values cut off at 448 that is worth a word: a channel has 3e-4
SMALL = 0.01  # root mean square at which e4m3's steps of 2^-9 make twice the usual rounding error


class Fp8Matrix(NamedTuple):
    """A matrix of e4m3 with one unit for all of it."""

    weight_OI: Tensor
    unit: float
    bias_O: Tensor | None = None  # added by what reads the product


class Fp8Stream(NamedTuple):
    """What a single block, or one stream of a double block, computes with."""

    modulation: Matrix
    qk: Fp8Matrix  # biases of these three are in the matrix
    v: Fp8Matrix
    up: Fp8Matrix
    down: Fp8Matrix  # of a single block: `out` and `down`, one beside the other
    norm_q_d: Tensor
    norm_k_d: Tensor
    out: Fp8Matrix | None = None  # of a double block


class Fit(NamedTuple):
    """How well one tensor fits e4m3, as two scalars on the device."""

    cut_off: Tensor  # share of its values beyond 448
    size: Tensor  # root mean square


# ---- the arithmetic


def double_block(
    x: PendingResidual,
    text: PendingResidual,
    modulations: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    w_image: Fp8Stream,
    w_text: Fp8Stream,
    fits: list[Fit] | None = None,
) -> tuple[PendingResidual, PendingResidual]:
    """One double block: (image, text) -> (image, text).

    fits: gains how well each tensor of the block fits e4m3.
    """
    x_mod, text_mod = (m.chunk(6, dim=1) for m in modulations)
    x_BND, x8 = _add_norm_quantise(x, *x_mod[:2], fits)
    text_BMD, text8 = _add_norm_quantise(text, *text_mod[:2], fits)
    out_BSD = _attend(rotary, (text_BMD, text8, w_text), (x_BND, x8, w_image), fits=fits)
    text_out, x_out = out_BSD.split([text_BMD.shape[1], x_BND.shape[1]], dim=1)
    return _after_attention(x_BND, x_out, x_mod, w_image, fits), _after_attention(
        text_BMD, text_out, text_mod, w_text, fits
    )


def single_block(
    x: PendingResidual,
    modulation: Tensor,
    rotary: tuple[Tensor, Tensor],
    w: Fp8Stream,
    wanted: Wanted | None = None,
    fits: list[Fit] | None = None,
) -> PendingResidual:
    """One single block, on text and image tokens joined; fewer tokens if `wanted`."""
    shift, scale, gate = modulation.chunk(3, dim=1)
    x_BSD, x8 = _add_norm_quantise(x, shift, scale, fits)
    out_BSD = _attend(rotary, (x_BSD, x8, w), wanted=wanted, fits=fits)
    if wanted is not None:
        x_BSD, x8 = (
            train_blocks.only(x_BSD, wanted),
            train_blocks.only(x8.view(torch.uint8), wanted).view(E4M3),
        )
    D = x_BSD.shape[2]
    inner = x8.new_empty(*x8.shape[:2], D + len(w.up.weight_OI))
    round_rows(out_BSD, inner[..., :D])
    multiply(x8, w.up.weight_OI, w.up.unit, inner[..., D:], with_gelu=True)
    _measure(fits, inner[..., :D], inner[..., D:])
    return PendingResidual(x_BSD, gate, (_product(inner, w.down, x_BSD.dtype),), w.down.bias_O)


def _add_norm_quantise(
    x: PendingResidual, shift_BD: Tensor, scale_BD: Tensor, fits: list[Fit] | None
) -> tuple[Tensor, Tensor]:
    x_BSD, x8 = add_norm_quantise(x, shift_BD, scale_BD)
    _measure(fits, x8[..., : x_BSD.shape[2]])
    return x_BSD, x8


def _product(x8: Tensor, w: Fp8Matrix, dtype: torch.dtype) -> Tensor:
    """(B, S, I) -> (B, S, O), without the bias."""
    out = x8.new_empty(*x8.shape[:2], len(w.weight_OI), dtype=dtype)
    multiply(x8, w.weight_OI, w.unit, out)
    return out


def _attend(
    rotary: tuple[Tensor, Tensor],
    *streams: tuple[Tensor, Tensor, Fp8Stream],
    wanted: Wanted | None = None,
    fits: list[Fit] | None = None,
) -> Tensor:
    """Attention among the tokens of all streams joined: (B, S, D)."""
    sizes = [x8.shape[1] for _, x8, _ in streams]
    B, _, D = streams[0][0].shape
    v = streams[0][1].new_empty(B, sum(sizes), D)
    for (_, x8, w), part in zip(streams, v.split(sizes, dim=1)):
        multiply(x8, w.v.weight_OI, w.v.unit, part)
    _measure(fits, v)
    q, k = fp8_qk_heads(
        *rotary,
        [Turned(_product(x8, w.qk, x.dtype), w.norm_q_d, w.norm_k_d) for x, x8, w in streams],
    )
    q = q if wanted is None else train_blocks.only(q.view(torch.uint8), wanted).view(E4M3)
    return attend_fp8(q, k, v.unflatten(2, q.shape[2:])).flatten(2)


def _after_attention(
    x: Tensor,
    out: Tensor,
    modulation: tuple[Tensor, ...],
    w: Fp8Stream,
    fits: list[Fit] | None,
) -> PendingResidual:
    """The rest of one stream of a double block."""
    _, _, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    out8 = torch.empty(x.shape, dtype=E4M3, device=x.device)
    round_rows(out, out8)
    y = _product(out8, w.out, x.dtype)
    x, x8 = _add_norm_quantise(
        PendingResidual(x, gate, (y,), w.out.bias_O), shift_mlp, scale_mlp, fits
    )
    inner = x8.new_empty(*x8.shape[:2], len(w.up.weight_OI))
    multiply(x8, w.up.weight_OI, w.up.unit, inner, with_gelu=True)
    _measure(fits, out8, inner)
    return PendingResidual(x, gate_mlp, (_product(inner, w.down, x.dtype),), w.down.bias_O)


# ---- what does not fit e4m3


def warn_of_poor_fits(fits: list[Fit]) -> None:
    """Say so if values are too large for e4m3 (cut off), or too small (few digits).

    Nothing else would tell, but for the image.
    """
    cut, size = (torch.stack(x).float().cpu() for x in zip(*fits))
    worst, least = float(cut.max()), float(size[size > 0].min()) if (size > 0).any() else 1.0
    what = [f"cuts off up to {worst:.2%} of a block's values at 448"] if worst > MUCH else []
    if least < SMALL:
        what.append(f"holds values around {least:.1e} with few digits")
    if what:
        log.warning(
            f"sampling in e4m3 {' and '.join(what)}; without the package fa3-fwd rows have"
            " their own units, and sampling takes a fifth longer"
        )


def _measure(fits: list[Fit] | None, *parts: Tensor) -> None:
    if fits is None:
        return
    for x8 in parts:
        cut = ((x8.view(torch.uint8) & 127) == 126).float().mean()  # 448, of either sign
        fits.append(Fit(cut, x8.float().square().mean().sqrt()))


# ---- the matrices


def take(block: nn.Module) -> list[Fp8Stream]:
    """The streams of a block that `fused_matrices.freeze` has rounded with one unit a layer.

    Its own matrices are given up, but for those of the modulations.
    """
    streams = [fp8_stream(stream) for stream in train_blocks.streams_of(block)]
    for name in [n for n in block.frozen if "modulation" not in n]:
        del block.frozen[name]
    return streams


def fp8_stream(s: Stream) -> Fp8Stream:
    qkv, up = _with_bias_inside(s.qkv), _with_bias_inside(s.up)
    qk, v = (
        Fp8Matrix(w, qkv.unit) for w in qkv.weight_OI.tensor_split([2 * len(s.qkv.bias_O) // 3])
    )
    out, down = (Fp8Matrix(m.weight_OI, float(m.scale_O[0]), m.bias_O) for m in (s.out, s.down))
    if out.bias_O is None:  # parts of one layer, so with one unit
        assert out.unit == down.unit, (out.unit, down.unit)
        both = [w.weight_OI.view(torch.uint8) for w in (out, down)]
        down = down._replace(weight_OI=torch.cat(both, dim=1).view(E4M3))
        return Fp8Stream(s.modulation, qk, v, up, down, s.norm_q_d, s.norm_k_d)
    return Fp8Stream(s.modulation, qk, v, up, down, s.norm_q_d, s.norm_k_d, out)


def _with_bias_inside(m: Matrix) -> Fp8Matrix:
    unit = float(m.scale_O[0])
    return Fp8Matrix(with_bias(m.weight_OI, unit, m.bias_O), unit)


# ---- whether they can be used


def choose(device: torch.device | str, width: int) -> tuple[bool, str]:
    """Whether a model with heads `width` wide can sample on `device` with these blocks, and why.

    A package that is missing, or wrong, costs speed and not the run.
    """
    try:
        return True, f"fa3-fwd {_try(torch.device(device), width)}"
    except Exception as error:  # of an extension module: anything
        return False, (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def _try(device: torch.device, width: int) -> str:
    """The version of fa3-fwd. Raises: why these blocks cannot be used here."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        raise RuntimeError("no Hopper GPU or newer")
    try:
        import fa3_fwd_interface  # noqa: F401
    except ModuleNotFoundError:
        raise RuntimeError('pip install ".[hopper]" has e4m3') from None
    found = version("fa3-fwd")
    if not (of_attention := gap(device, width)) < TOLERANCE:
        raise RuntimeError(f"e4m3 with fa3-fwd {found} differs from bf16 by {of_attention:.1e}")
    if not (of_block := block_gap(device, width)) < BLOCK_TOLERANCE:
        raise RuntimeError(f"a block in e4m3 differs from plain torch's by {of_block:.1e}")
    return found


@torch.no_grad()
def block_gap(device: torch.device | str, width: int) -> float:
    """Largest relative difference of a double and a single block to the same on the CPU."""
    B, N, M, D, F = 2, 192, 64, 2 * width, 8 * width
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g).to(torch.bfloat16)

    def frozen(high: int, wide: int, bias: bool = True) -> Matrix:
        weight = normal(high, wide) / wide**0.5
        return Frozen(weight, normal(high) if bias else None, fp8=True, largest=0.5).matrix()

    def stream(single: bool = False) -> Fp8Stream:
        sizes = {"qkv": (3 * D, D), "out": (D, D), "up": (F, D), "down": (D, F)}
        of = {n: frozen(*s, bias=not (single and n == "out")) for n, s in sizes.items()}
        norms = dict(norm_q_d=normal(width), norm_k_d=normal(width))
        return fp8_stream(Stream(frozen(1, D), **of, **norms, adapters={}))

    x, text, of_time = normal(B, N, D), normal(B, M, D), normal(2, 15 * D)
    angle = (6 * torch.rand(M + N, width // 2, generator=g)).repeat_interleave(2, dim=1)
    rotary, streams = (angle.cos(), angle.sin()), (stream(), stream(), stream(single=True))

    def run(device) -> list[Tensor]:
        of_image, of_text, joint = (to_device(s, device) for s in streams)
        x_, text_, time, rotary_ = to_device((x, text, of_time, rotary), device)
        both_streams = [PendingResidual(y, time[:1, :D], (y,)) for y in (x_, text_)]
        pair = time[:1, : 6 * D], time[1:, : 6 * D]
        double = double_block(*both_streams, pair, rotary_, of_image, of_text)
        both = PendingResidual(
            torch.cat([text_, x_], 1), time[:1, :D], (torch.cat([text_, x_], 1),)
        )
        single = single_block(both, time[:1, 12 * D :], rotary_, joint)
        wanted = single_block(both, time[:1, 12 * D :], rotary_, joint, Wanted(M, 8))
        return [y.cpu().float() for part in (*double, single, wanted) for y in (part[0], *part[2])]

    pairs = zip(run(device), run("cpu"))
    return max(float((ours - plain).norm() / plain.norm()) for ours, plain in pairs)


def to_device(x, device: torch.device | str):
    """Tensors of a tuple, perhaps of tuples, on `device`."""
    if isinstance(x, Tensor):
        return x.to(device)
    if not isinstance(x, tuple):
        return x
    moved = [to_device(y, device) for y in x]
    return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
