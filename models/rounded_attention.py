"""Attention of e4m3 queries, keys and values, where fa3-fwd is installed; forward only.

Everything is rounded as it is: e4m3 holds 2^-9 to 448, q and k are normalised (no value is larger
than sqrt(d) times the norm's largest weight), v is a product of normalised rows, near 1.
Source: Shah et al. 2024 (arXiv:2407.08608, Sec. 3.3), the kernel that fa3-fwd is compiled from.

Dimension key:  B batch   S, K tokens of queries and keys   h heads   d width of a head
"""

import logging
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn import functional as F

from models.heads import heads_forward, rounded_heads

log = logging.getLogger(__name__)
HOPPER = (9, 0)
TOLERANCE = 0.1  # relative, beside attention in bf16; of normal values the rounding makes 0.05
enabled = False  # see `choose`
said = ""  # by the last `choose`


@torch.library.custom_op("thermaflux::attend_rounded", mutates_args=())
def attend_rounded(q_BShd: Tensor, k_BKhd: Tensor, v_BKhd: Tensor) -> Tensor:
    """(B, S, h, d) bf16 of e4m3."""
    if not q_BShd.is_cuda:
        return _plain(q_BShd, k_BKhd, v_BKhd)
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(q_BShd, k_BKhd, v_BKhd)
    return out[0] if isinstance(out, tuple) else out


@attend_rounded.register_fake
def _(q_BShd, k_BKhd, v_BKhd):
    return torch.empty_like(q_BShd, dtype=torch.bfloat16)


def _plain(q_BShd: Tensor, k_BKhd: Tensor, v_BKhd: Tensor) -> Tensor:
    q, k, v = (x.to(torch.bfloat16).transpose(1, 2) for x in (q_BShd, k_BKhd, v_BKhd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def choose(device: torch.device, width: int) -> bool:
    """Try e4m3 attention of heads `width` wide on `device`; from now on use it, or not.

    Returns which, and says it: a package that is missing or wrong costs speed, not the run.
    """
    global enabled, said
    try:
        said, enabled = f"sampling's attention: e4m3 (fa3-fwd {_try(device, width)})", True
    except Exception as error:  # of an extension module: anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        said, enabled = f"sampling's attention: bf16 ({reason})", False
    log.info(said)
    return enabled


@torch.no_grad()
def _try(device: torch.device, width: int) -> str:
    """The version of fa3-fwd. Raises: why it cannot be used here."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        raise RuntimeError("not a Hopper GPU")
    try:
        import fa3_fwd_interface  # noqa: F401
    except ModuleNotFoundError:
        raise RuntimeError('pip install ".[hopper]" has e4m3') from None
    gap, found = _gap(device, width), version("fa3-fwd")
    if not gap < TOLERANCE:
        raise RuntimeError(f"e4m3 with fa3-fwd {found} differs from bf16 by {gap:.1e}")
    return found


def _gap(device: torch.device, width: int) -> float:
    """Relative difference to bf16 of all that is rounded, from the product of q, k and v on."""
    B, S, h = 2, 200, 3
    g = torch.Generator(device).manual_seed(0)
    y = torch.randn(B, S, 3 * h * width, generator=g, device=device).to(torch.bfloat16)
    angle = torch.rand(S, width // 2, generator=g, device=device).repeat_interleave(2, dim=1)
    norm_d, none = y.new_ones(width), y.new_empty(0)
    args = angle.cos(), angle.sin(), [y, none, none, norm_d, norm_d]
    ours, plain = attend_rounded(*rounded_heads(*args)), _plain(*heads_forward(*args))
    return float((ours.float() - plain.float()).norm() / plain.float().norm())
