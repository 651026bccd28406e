"""Scaled dot-product attention with a layout of our own, and linear layers that follow their input.

torch 2.11 picks cuDNN's attention on Hopper. Its backward is built for one memory layout of the
output's gradient and is reused for another: FLUX's double blocks hand back a contiguous gradient,
its single blocks a slice of a wider tensor, and the second crashes (illegal memory access). So the
gradient is made contiguous here, which is also faster than falling back to flash.

Dimension key:  B batch   S, K tokens of queries and keys   h heads   d width of a head
"""

import logging
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)
TOLERANCE = 2e-2  # relative difference of two bf16 kernels' gradients
PATIENCE = 300  # seconds for the probe, most of them for starting CUDA


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


def choose_kernel(device: torch.device, batch: int, tokens: int, heads: int, width: int) -> str:
    """Probe cuDNN's attention at the run's shape; from now on use it, or flash. Returns which.

    The probe runs in a process of its own: a crash of the kernel would take ours along.
    The choice is logged, because a slow kernel chosen in silence is a loss nobody looks for.
    """
    if device.type != "cuda":
        return "cpu"
    if torch.are_deterministic_algorithms_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradient adds up in any order
        return "flash, deterministic"
    probe = [sys.executable, "-m", "models.attention", *map(str, (batch, tokens, heads, width))]
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(probe, cwd=root, capture_output=True, text=True, timeout=PATIENCE)
        works, said = done.returncode == 0, (done.stdout + done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        works, said = False, [f"no answer in {PATIENCE} s"]
    torch.backends.cuda.enable_cudnn_sdp(works)
    kernel = "cudnn" if works else "flash"
    log.info("attention kernel: %s (%s)", kernel, said[-1] if said else "the probe said nothing")
    return kernel


def _probe(batch: int, tokens: int, heads: int, width: int) -> str:
    """Run both kernels forward and backward, with both layouts of the gradient that FLUX has.

    Raises: RuntimeError: cuDNN's gradient differs from flash's, or it is slower.
    """
    shape, wide = (batch, tokens, heads, width), (batch, tokens, 5 * heads * width)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    whole = torch.randn(wide, device="cuda", dtype=torch.bfloat16)
    sliced = whole[..., : heads * width]
    grads, seconds = {}, {}
    backends = dict(cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION)
    for name, backend in backends.items():
        with sdpa_kernel(backend):
            for g in (sliced.contiguous(), sliced, sliced):
                torch.cuda.synchronize()
                start = time.perf_counter()
                grads[name] = torch.autograd.grad(attend(q, k, v), (q, k, v), g)
                torch.cuda.synchronize()
                seconds[name] = time.perf_counter() - start
    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(grads["cudnn"], grads["flash"]))
    said = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items())
    said = f"{said}, gradients differ by {gap:.1e}"
    if not gap < TOLERANCE or seconds["cudnn"] > seconds["flash"]:
        raise RuntimeError(said)
    return said


if __name__ == "__main__":
    print(_probe(*map(int, sys.argv[1:])))
