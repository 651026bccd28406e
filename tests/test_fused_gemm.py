"""Products that do what follows them: against the plain sums, their gradients, and the fallback.

pytest tests/test_fused_gemm.py
"""

import pytest
import torch

from models.fast import frozen_matrix, fused_gemm
from models.fast.fused_gemm import gated_mlp, gated_sum
from tests.test_train_blocks import adapted, assert_close, speed_up, step

B, S, D, WIDTH = 2, 5, 8, 24


@pytest.fixture
def fused(monkeypatch):
    """As where the library is, on the plain arithmetic that the products fall back to on a CPU."""
    monkeypatch.setattr(fused_gemm, "_fits", lambda h, gate, m: not gate.requires_grad)


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(B, S, D), gate=(B, D), out=(B, S, WIDTH), h=(B, S, D))
    made = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return {n: made[n].requires_grad_(n != "gate") for n in made}


def matrices():
    generator = torch.Generator().manual_seed(1)
    shapes = dict(out=(D, WIDTH), up=(WIDTH, D), down=(D, WIDTH))
    weights = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return {
        n: frozen_matrix.Frozen(w, None if n == "out" else w[:, 0] * 3).matrix()
        for n, w in weights.items()
    }


def block(x, gate, out, h):
    m = matrices()
    return gated_mlp(gated_sum(x, gate, out, m["out"]), gate, h, m["up"], m["down"])


def result_and_gradients():
    given = inputs()
    result = block(**given)
    trained = [t for t in given.values() if t.requires_grad]
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    return result, *torch.autograd.grad((result * weights).sum(), trained)


def test_fused_products_and_their_gradients_are_the_plain_ones(fused, monkeypatch):
    called = []
    real = fused_gemm.linear_slope
    monkeypatch.setattr(fused_gemm, "linear_slope", lambda *a: called.append(1) or real(*a))
    found = result_and_gradients()
    assert called
    monkeypatch.setattr(fused_gemm, "_fits", lambda *a: False)
    for a, b in zip(found, result_and_gradients()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_trained_gate_gets_its_gradient(fused):
    given = inputs()
    given["gate"].requires_grad_(True)
    assert torch.autograd.grad(block(**given).sum(), given["gate"])[0].abs().min() > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute_every", [0, 1])
def test_the_fast_blocks_are_the_same_with_fused_products(
    compiled, recompute_every, fused, monkeypatch
):
    monkeypatch.setattr("models.fast.train_blocks.BACKEND", "aot_eager")
    found = step(*speed_up(*adapted(), "fp32", compiled, recompute_every))
    monkeypatch.setattr(fused_gemm, "_fits", lambda *a: False)
    assert_close(step(*speed_up(*adapted(), "fp32")), found, 1e-3)


def test_only_bf16_matrices_that_are_marked_are_fused():
    h, gate = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    weight = torch.randn(32, 16)
    plain, rounded, marked = (
        frozen_matrix.Frozen(weight, None, fp8=fp8, fused=fused).matrix()
        for fp8, fused in ((False, False), (True, False), (False, True))
    )
    assert not fused_gemm._fits(h, gate, plain) and not fused_gemm._fits(h, gate, rounded)
    assert fused_gemm._fits(h, gate, marked)
    assert not fused_gemm._fits(h.float(), gate, marked)
    assert not fused_gemm._fits(h, gate.requires_grad_(), marked)


def test_without_the_library_there_is_a_reason():
    assert fused_gemm.choose(torch.device("cpu")) == (False, "no Hopper GPU or newer")


def on_a_hopper_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= fused_gemm.HOPPER


@pytest.mark.skipif(not on_a_hopper_gpu(), reason="needs a Hopper GPU")
def test_on_a_hopper_gpu_wrong_products_are_noticed(monkeypatch):
    pytest.importorskip("quack", reason="needs quack-kernels")
    assert fused_gemm.choose(torch.device("cuda"))[0]
    real = fused_gemm.linear_gated
    monkeypatch.setattr(fused_gemm, "linear_gated", lambda *a: 1.05 * real(*a))
    works, reason = fused_gemm.choose(torch.device("cuda"))
    assert not works and "differs from torch" in reason
