"""Frozen bf16 products that do what follows them before they write: GELU, its slope, gated sums.

    linear_gelu     h = x W^T + b        and gelu(h)
    linear_slope    dh = (g W) gelu'(h)
    linear_gated    x + gate (h W^T + b)

Apart, what follows reads and writes again what a product has just written. On Hopper GPUs
quack-kernels (`pip install ".[hopper]"`) compiles it into the product; `choose` tries that at
the start, and the matrices that may use it are marked `fused`. Elsewhere, and for e4m3 matrices,
`gated_sum` and `gated_mlp` are the plain sums.

Dimension key:  B batch   S tokens   N = B S   I input width   O output width   D model
"""

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fast.fp8_quantise import gelu
from models.fast.frozen_matrix import Matrix, linear, mlp

HOPPER = (9, 0)
TOLERANCE = 1e-2  # relative, of bf16 results: the plain way rounds once more


def gated_sum(x_BSD: Tensor, gate_BD: Tensor, h_BSI: Tensor, m: Matrix) -> Tensor:
    """x + gate * (h W^T + b)."""
    if _fits(h_BSI, gate_BD, m):
        return _GatedLinear.apply(x_BSD, gate_BD, h_BSI, m.weight_OI, m.bias_O)
    return x_BSD + gate_BD[:, None] * linear(h_BSI, m)


def gated_mlp(x_BSD: Tensor, gate_BD: Tensor, h_BSD: Tensor, up: Matrix, down: Matrix) -> Tensor:
    """x + gate * down(gelu(up(h)))."""
    if _fits(h_BSD, gate_BD, up):
        return _GatedMlp.apply(
            x_BSD, gate_BD, h_BSD, up.weight_OI, up.bias_O, down.weight_OI, down.bias_O
        )
    return x_BSD + gate_BD[:, None] * mlp(h_BSD, up, down)


def _fits(h: Tensor, gate: Tensor, m: Matrix) -> bool:
    return m.fused and h.dtype == torch.bfloat16 and not gate.requires_grad


class _GatedLinear(torch.autograd.Function):
    """Keeps nothing but the gate: the matrix is frozen."""

    @staticmethod
    def forward(ctx, x_BSD, gate_BD, h_BSI, weight_DI, bias_D):
        ctx.save_for_backward(gate_BD, weight_DI)
        return linear_gated(x_BSD, gate_BD, h_BSI, weight_DI, bias_D)

    @staticmethod
    def backward(ctx, g_BSD):
        gate_BD, weight_DI = ctx.saved_tensors
        return g_BSD, None, (g_BSD * gate_BD[:, None]) @ weight_DI, None, None


class _GatedMlp(torch.autograd.Function):
    """Keeps what is before the GELU."""

    @staticmethod
    def forward(ctx, x_BSD, gate_BD, h_BSD, up_ID, up_bias_I, down_DI, down_bias_D):
        before_NI, after_NI = linear_gelu(h_BSD.flatten(0, 1), up_ID, up_bias_I)
        ctx.save_for_backward(gate_BD, before_NI, up_ID, down_DI)
        after_BSI = after_NI.unflatten(0, h_BSD.shape[:2])
        return linear_gated(x_BSD, gate_BD, after_BSI, down_DI, down_bias_D)

    @staticmethod
    def backward(ctx, g_BSD):
        gate_BD, before_NI, up_ID, down_DI = ctx.saved_tensors
        g_ND = (g_BSD * gate_BD[:, None]).flatten(0, 1)
        dh_ND = linear_slope(g_ND, down_DI, before_NI) @ up_ID
        return g_BSD, None, dh_ND.view_as(g_BSD), None, None, None, None


# ---- the products


@torch.library.custom_op("thermaflux::linear_gelu", mutates_args=())
def linear_gelu(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    """h and gelu(h), both (N, O)."""
    if not x_NI.is_cuda:
        before = F.linear(x_NI, weight_OI, bias_O)
        return before, gelu(before)
    from models.fast import gemm_epilogues

    done = gemm_epilogues.with_gelu(x_NI, weight_OI.t(), bias=bias_O[None], **gemm_epilogues.CHOSEN)
    return done["D"], done["after"]


@torch.library.custom_op("thermaflux::linear_slope", mutates_args=())
def linear_slope(g_NO: Tensor, weight_OI: Tensor, before_NI: Tensor) -> Tensor:
    """(N, I)."""
    if not g_NO.is_cuda:
        return torch.ops.aten.gelu_backward(g_NO @ weight_OI, before_NI, approximate="tanh")
    from models.fast import gemm_epilogues

    return gemm_epilogues.times_slope(g_NO, weight_OI, before_NI, **gemm_epilogues.CHOSEN)["D"]


@torch.library.custom_op("thermaflux::linear_gated", mutates_args=())
def linear_gated(
    x_BSO: Tensor, gate_BO: Tensor, h_BSI: Tensor, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """(B, S, O)."""
    if not x_BSO.is_cuda:
        return x_BSO + gate_BO[:, None] * F.linear(h_BSI, weight_OI, bias_O)
    from models.fast import gemm_epilogues

    B = len(x_BSO)
    bias_O = gate_BO.new_zeros(len(weight_OI)) if bias_O is None else bias_O
    done = gemm_epilogues.gated(
        h_BSI.contiguous(),
        weight_OI.t().expand(B, -1, -1),
        x_BSO.contiguous(),
        gate=gate_BO.contiguous(),
        bias=bias_O.expand(B, -1),
        **gemm_epilogues.CHOSEN,
    )
    return done["D"]


@linear_gelu.register_fake
def _(x_NI, weight_OI, bias_O):
    return tuple(x_NI.new_empty(len(x_NI), len(weight_OI)) for _ in range(2))


@linear_slope.register_fake
def _(g_NO, weight_OI, before_NI):
    return torch.empty_like(before_NI)


@linear_gated.register_fake
def _(x_BSO, gate_BO, h_BSI, weight_OI, bias_O):
    return torch.empty_like(x_BSO)


# ---- whether


def choose(device: torch.device) -> tuple[bool, str]:
    """Try the fused products on `device`: whether they can be used, and with what, or why not.

    A library that is missing, cannot compile or is wrong costs speed, not the run.
    """
    try:
        return True, f"quack-kernels {_try(device)}"
    except Exception as error:  # of a compiler: anything
        return False, (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def _try(device: torch.device) -> str:
    """The version of quack-kernels. Raises: why it cannot be used here."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        raise RuntimeError("no Hopper GPU or newer")
    try:
        found = version("quack-kernels")
    except PackageNotFoundError:
        raise RuntimeError('pip install ".[hopper]" puts them inside') from None
    B, S, D, width = 2, 128, 256, 512
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    x, h, g = normal(B, S, D), normal(B, S, width), normal(B * S, D)
    gate = normal(B, 3 * D).chunk(3, dim=1)[1]  # a part of a modulation, as in the blocks
    up, down, up_bias = normal(width, D) / D**0.5, normal(D, width) / width**0.5, normal(width)
    before = F.linear(x, up, up_bias).flatten(0, 1)
    for result, plain in (
        (linear_gelu(x.flatten(0, 1), up, up_bias)[1], gelu(before)),
        (
            linear_slope(g, down, before),
            torch.ops.aten.gelu_backward(g @ down, before, approximate="tanh"),
        ),
        (linear_gated(x, gate, h, down, None), x + gate[:, None] * F.linear(h, down)),
        (linear_gated(x, gate, h, down, g[0]), x + gate[:, None] * F.linear(h, down, g[0])),
    ):
        gap = float((result - plain).float().norm() / plain.float().norm())
        if not gap < TOLERANCE:
            raise RuntimeError(f"quack-kernels {found} differs from torch by {gap:.1e}")
    return found
