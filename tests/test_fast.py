"""The fast blocks against the plain ones: outputs, gradients, adapters' file, 8-bit rounding.

    pytest tests/test_fast.py
"""

from copy import deepcopy

import pytest
import torch

from models import fast, fp8
from models import flux as fluxes
from models.guidance import SemanticGuidance
from models.lora import LORA_FILE, LoraConfig, add_lora, load_lora, save_lora
from tests.test_lora import flux_inputs
from tests.tiny_models import INJECT, stir, tiny_flux

MAPS = [torch.rand(2, n, 32, 32, generator=torch.Generator().manual_seed(4)) for n in (1, 32, 8)]
ALL_LAYERS = ["to_q", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj", "add_k_proj"]


def adapted(targets=None, dropout=0.0):
    """A tiny guided FLUX with adapters, nothing of it zero, its base frozen."""
    flux = tiny_flux().requires_grad_(False)
    guidance = SemanticGuidance(flux.inner_dim, INJECT)
    cfg = LoraConfig(r=2, lora_dropout=dropout)
    if targets:
        cfg.target_modules = targets
    add_lora(flux, cfg)
    for p in flux.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(5))
    stir(guidance, 6)
    fluxes.patch_blocks(flux, guidance)
    return flux, guidance


def speed_up(flux, guidance, dtype="bf16", compiled=False, recompute_every=0):
    fast.freeze(flux, "cpu", dtype)
    fast.install(flux, guidance, compiled, recompute_every)
    return flux, guidance


def step(flux, guidance):
    """Output and the gradient of every trained parameter, by name."""
    out = flux(**flux_inputs(flux), joint_attention_kwargs={"guidance": guidance(*MAPS)})[0]
    out.square().mean().backward()
    named = [*flux.named_parameters(), *guidance.named_parameters()]
    return out.detach(), {n: p.grad for n, p in named if p.requires_grad}


def assert_close(a, b, tolerance):
    assert a[1].keys() == b[1].keys()
    for x, y in [(a[0], b[0]), *((a[1][n], b[1][n]) for n in a[1])]:
        assert (x - y).norm() <= tolerance * x.norm()


@pytest.mark.parametrize("targets", [None, ALL_LAYERS])
@pytest.mark.parametrize("recompute_every", [0, 1, 2])
def test_fast_blocks_equal_the_plain_ones_and_so_do_their_gradients(targets, recompute_every):
    plain, quick = step(*adapted(targets)), speed_up(*adapted(targets), "fp32", False, recompute_every)
    assert_close(plain, step(*quick), 1e-3)


@pytest.mark.parametrize("dtype, tolerance", [("fp8", 0.2), ("fp8-small", 0.2)])
def test_fp8_is_close_to_bf16(dtype, tolerance):
    plain, quick = step(*adapted()), speed_up(*adapted(), dtype)
    assert_close(plain, step(*quick), tolerance)


def test_compiled_blocks_are_one_graph_and_equal_the_plain_ones(monkeypatch):
    monkeypatch.setattr(fast, "BACKEND", "aot_eager")  # traces as inductor does, in no time
    for dtype in ("fp32", "fp8"):
        eager = step(*speed_up(*adapted(), dtype))
        compiled = step(*speed_up(*adapted(), dtype, compiled=True))
        assert_close(eager, compiled, 1e-3)
