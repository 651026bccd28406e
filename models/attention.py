"""Scaled dot-product attention with its own layout, and linear layers in their input's dtype.

torch 2.11 picks cuDNN's attention on Hopper. Its backward is built for one memory layout of the
output's gradient and is reused for another: FLUX's double blocks hand back a contiguous gradient,
its single blocks a slice of a wider tensor, and the second crashes (illegal memory access). So the
gradient is made contiguous here, which is also faster than falling back to flash.

Dimension key:  B batch   S, K tokens of queries and keys   h heads   d width of a head
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


def attend(q_BShd: Tensor, k_BKhd: Tensor, v_BKhd: Tensor) -> Tensor:
    """Attention over all keys: (B, S, h * d), in the queries' dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q_BShd, k_BKhd, v_BKhd))
    out_BShd = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return _ContiguousGradient.apply(out_BShd).flatten(2)


def rotate(x_BShd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotary positions on interleaved pairs (RoFormer, arXiv:2104.09864, Eq. 34); dtype is kept."""
    x = x_BShd.float()
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (odd, even): compiles to an index
    sign_d = torch.arange(x.shape[-1], device=x.device) % 2 * 2 - 1  # -1, +1, -1, ...
    out = x * cos_Sd[:, None] + swapped * (sin_Sd * sign_d)[:, None]
    return out.to(x_BShd.dtype)


class CastLinear(nn.Linear):
    """A linear layer whose fp32 weights are cast to the input's dtype: fp32 masters, bf16 compute.

    Casting the few weights, not the many activations, keeps an adapter of a bf16 model cheap.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class FluxAttention:
    """The processor of every FLUX attention: upstream's arithmetic, our layout.

    diffusers drops (with a warning) every entry of joint_attention_kwargs that the processor does
    not name, so `guidance` is named here: it travels to the patched blocks, others ignore it.
    """

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        guidance=None,
    ):
        """Upstream's names in the signature; ours from the next line on."""
        if attention_mask is not None:
            raise ValueError("FLUX.1-Fill is trained without an attention mask; got one")
        x_BSD, text = hidden_states, encoder_hidden_states
        q, k, v = (
            f(x_BSD).unflatten(-1, (-1, attn.head_dim)) for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if text is not None:
            tq, tk, tv = (
                f(text).unflatten(-1, (-1, attn.head_dim))
                for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            q = torch.cat([attn.norm_added_q(tq), q], dim=1)
            k = torch.cat([attn.norm_added_k(tk), k], dim=1)
            v = torch.cat([tv, v], dim=1)
        if image_rotary_emb is not None:
            q, k = rotate(q, *image_rotary_emb), rotate(k, *image_rotary_emb)
        out_BSD = attend(q, k, v)
        if text is None:
            return out_BSD
        text_out, image_out = out_BSD.split([text.shape[1], x_BSD.shape[1]], dim=1)
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        return image_out, attn.to_add_out(text_out.contiguous())
