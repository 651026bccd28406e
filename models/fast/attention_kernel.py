"""Which attention kernel torch uses on this machine: cuDNN's where it is right and faster.

python -m models.fast.attention_kernel BATCH TOKENS HEADS WIDTH      the probe alone
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import attend

TOLERANCE = 2e-2  # relative difference of two bf16 kernels' gradients
PATIENCE = 300  # seconds for the probe, most of them for starting CUDA


def choose_kernel(
    device: torch.device, batch: int, tokens: int, heads: int, width: int
) -> tuple[str, str]:
    """Probe cuDNN's attention at the run's shape; from then on torch uses it, or flash attention.

    The probe runs in a process of its own: a crash of the kernel would take ours along.

    Args:
        batch, tokens, heads, width: of the run's queries; width in channels of one head.

    Returns: the kernel's name, and what the probe found.
    """
    if device.type != "cuda":
        return "torch", "no CUDA device"
    if torch.are_deterministic_algorithms_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradient adds up in any order
        return "flash, deterministic", "run.deterministic; cuDNN's gradient adds up in any order"
    probe = [
        sys.executable,
        "-m",
        "models.fast.attention_kernel",
        *map(str, (batch, tokens, heads, width)),
    ]
    root = Path(__file__).parent.parent.parent
    try:
        done = subprocess.run(probe, cwd=root, capture_output=True, text=True, timeout=PATIENCE)
        works, found = done.returncode == 0, (done.stdout + done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        works, found = False, [f"no answer in {PATIENCE} s"]
    torch.backends.cuda.enable_cudnn_sdp(works)
    return "cudnn" if works else "flash", found[-1] if found else "the probe printed nothing"


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
    found = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items())
    found = f"{found}, gradients differ by {gap:.1e}"
    if not gap < TOLERANCE or seconds["cudnn"] > seconds["flash"]:
        raise RuntimeError(found)
    return found


if __name__ == "__main__":
    print(_probe(*map(int, sys.argv[1:])))
