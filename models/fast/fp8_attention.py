"""Attention of e4m3 queries, keys and values, where fa3-fwd is installed; forward only.

Everything is rounded as it is: e4m3 holds 2^-9 to 448, q and k are normalised (no value is larger
than sqrt(d) times the norm's largest weight), v is a product of normalised rows, near 1.
Source: Shah et al. 2024 (arXiv:2407.08608, Sec. 3.3), the kernel that fa3-fwd is compiled from.

Dimension key:  B batch   S, K tokens of queries and keys   h heads   d width of a head
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fast.fp8_qk import Turned, fp8_qk_heads, turned_heads
from models.fast.fp8_quantise import to_e4m3

HOPPER = (9, 0)


def attend_fp8(q_BShd: Tensor, k_BKhd: Tensor, v_BKhd: Tensor) -> Tensor:
    """(B, S, h, d) bf16 of e4m3."""
    if not q_BShd.is_cuda:
        return _plain(q_BShd, k_BKhd, v_BKhd)
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(q_BShd, k_BKhd, v_BKhd)
    return out[0] if isinstance(out, tuple) else out


def _plain(q_BShd: Tensor, k_BKhd: Tensor, v_BKhd: Tensor) -> Tensor:
    q, k, v = (x.to(torch.bfloat16).transpose(1, 2) for x in (q_BShd, k_BKhd, v_BKhd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@torch.no_grad()
def gap(device: torch.device, width: int) -> float:
    """Relative difference to bf16 of all that is rounded, from the product of q and k on."""
    B, S, h = 2, 200, 3
    g = torch.Generator(device).manual_seed(0)
    y = torch.randn(B, S, 3 * h * width, generator=g, device=device).to(torch.bfloat16)
    of_qk, v = y.split([2 * h * width, h * width], dim=2)
    v, norm_d = v.unflatten(2, (h, width)).contiguous(), y.new_ones(width)
    angle = torch.rand(S, width // 2, generator=g, device=device).repeat_interleave(2, dim=1)
    args = angle.cos(), angle.sin(), [Turned(of_qk.contiguous(), norm_d, norm_d)]
    ours, plain = attend_fp8(*fp8_qk_heads(*args), to_e4m3(v)), _plain(*turned_heads(*args), v)
    return float((ours.float() - plain.float()).norm() / plain.float().norm())
