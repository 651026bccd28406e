"""Blocks that sample in e4m3 throughout: against the plain ones, their kernels, their refusal.

pytest tests/test_fp8_blocks.py
"""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from models.fast import (
    cublaslt_gemm,
    fp8_blocks,
    fp8_residual_norm,
    fused_matrices,
    sample_blocks,
    train_blocks,
)
from models.fast.fp8_attention import attend_fp8
from models.fast.fp8_quantise import E4M3, to_e4m3
from models.fast.pending_residual import PendingResidual, added_up
from models.sampler import SamplingConfig, sample
from tests.interpreted_fp8_residual_norm import compare_all
from tests.test_lora import flux_inputs
from tests.test_sample_blocks import distance, stir_zeros, trained_values, velocity
from tests.test_train_blocks import MAPS, adapted
from tests.tiny_models import guide, tiny_translator

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled kernels need a GPU")


def sampling_flux(flux, guidance):
    fused_matrices.freeze(flux, "cpu", "fp8", adapters=trained_values(flux))
    sample_blocks.install(flux, guidance, compiled=False)
    return flux


def in_infrared_panel(velocity, rows):
    """The velocity with zeros in the visible panel."""
    grid = velocity.unflatten(1, (rows, 2, -1)).clone()
    grid[:, :, 0] = 0
    return grid.flatten(1, 3)


# ---- the blocks


@pytest.mark.parametrize("rows", [0, 2])
def test_they_do_what_the_plain_blocks_do(rows):
    flux, guidance = adapted()
    for layer in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        for name, p in layer.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    plain = velocity(flux, guidance)
    if rows:
        plain = in_infrared_panel(plain, rows)
    ours = velocity(sampling_flux(deepcopy(flux), guidance), guidance, infrared_rows=rows)
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        for name, p in block.named_parameters():
            if name.endswith("bias") and "norm" not in name:
                torch.nn.init.zeros_(p)
    unbiased = velocity(sampling_flux(flux, guidance), guidance, infrared_rows=rows)
    assert distance(ours, plain) < 0.04
    assert distance(unbiased, plain) > 0.16  # so a bias that is lost would be seen


def test_every_sample_may_have_its_own_time():
    flux, guidance = adapted()
    ours = velocity(sampling_flux(deepcopy(flux), guidance), guidance)
    swapped = {"guidance": guide(guidance, [m.flip(0) for m in MAPS])}
    inputs = flux_inputs(flux)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"):
        inputs[name] = inputs[name].flip(0)
    with torch.no_grad():
        again = sampling_flux(flux, guidance)(**inputs, joint_attention_kwargs=swapped)[0]
    assert distance(again.flip(0), ours) < 1e-5


def test_the_sampler_uses_them_where_they_can_run(monkeypatch):
    plain = tiny_translator(base_dtype="fp8").eval()
    adapters = {n: p.detach().clone() for n, p in plain.named_parameters() if ".lora_" in n}
    asked = []
    monkeypatch.setattr(fp8_blocks, "choose", lambda *a: (not asked.append(a), "tried"))
    ours = tiny_translator(base_dtype="fp8", adapters=adapters).eval()
    assert asked == [(torch.device("cpu"), 32)]
    assert all(
        isinstance(s, fp8_blocks.Fp8Stream)
        for b in ours.flux.single_transformer_blocks
        for s in b.streams
    )
    for translator in (plain, ours):
        stir_zeros(translator.flux)
    visible, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 8, 64)
    cfg = SamplingConfig(steps=3)
    assert distance(sample(ours, visible, noise, cfg), sample(plain, visible, noise, cfg)) < 0.03


def test_a_block_holds_its_matrices_once_and_a_layer_has_one_unit():
    flux, _ = adapted()
    fused_matrices.freeze(flux, "cpu", "fp8", adapters=trained_values(flux))
    single = flux.single_transformer_blocks[0]
    scales = {name: single.frozen[name].scale for name in ("qkv", "up", "out", "down")}
    assert all(len(scale.unique()) == 1 for scale in scales.values())
    assert scales["out"][0] == scales["down"][0] != scales["up"][0]
    for block in (single, flux.transformer_blocks[0]):
        fp8_blocks.take(block)
        assert all("modulation" in name for name in block.frozen)


@pytest.mark.parametrize("factor, words", [(1e4, "cuts off up to"), (1e-3, "few digits")])
def test_values_that_e4m3_cannot_hold_are_said_once(factor, words, caplog):
    def run(runner):
        kwargs = {"guidance": guide(guidance, MAPS)}
        inputs = flux_inputs(runner.flux) | {"joint_attention_kwargs": kwargs}
        runner.velocity(inputs, 0, None)

    flux, guidance = adapted()
    run(sample_blocks.SampleRunner(sampling_flux(flux, guidance)))
    assert not caplog.text
    flux, guidance = adapted()
    runner = sample_blocks.SampleRunner(sampling_flux(flux, guidance))
    block = flux.single_transformer_blocks[0]
    (stream,) = block.streams
    block.streams = [stream._replace(up=stream.up._replace(unit=factor * stream.up.unit))]
    run(runner)
    assert words in caplog.text and caplog.text.count("sampling in e4m3") == 1
    caplog.clear()
    run(runner)
    assert not caplog.text


# ---- what they are made of


@pytest.mark.parametrize("largest", [1e-3, 1.0, 100.0])
def test_a_bias_is_exact_in_the_digits_behind_a_matrix(largest):
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 48, generator=g), largest * torch.randn(32, generator=g)
    unit = 0.01
    matrix = fp8_residual_norm.with_bias(to_e4m3(weight / unit), unit, bias)
    assert matrix.shape == (32, 64) and matrix.stride() == (128, 1)
    assert torch.equal(matrix[:, :48].float(), to_e4m3(weight / unit).float())
    assert not matrix[:, 52:].float().any()
    found = unit * matrix[:, 48:52].float() @ torch.tensor(fp8_residual_norm.DIGITS)
    assert (found - bias).abs().max() <= max(2**-16 * bias.abs().max(), 2**-14 * unit)


def test_a_bias_far_above_its_weights_is_not_lost():
    flux, _ = adapted()
    block = flux.single_transformer_blocks[0]
    torch.nn.init.normal_(block.proj_mlp.weight, std=1e-6)
    torch.nn.init.constant_(block.proj_mlp.bias, 3.0)
    fused_matrices.freeze(flux, "cpu", "fp8", adapters=trained_values(flux))
    (stream,) = fp8_blocks.take(block)
    x, out = fp8_residual_norm.empty_rows(5, 32, "cpu"), torch.empty(5, len(stream.up.weight_OI))
    x.copy_(
        torch.cat(
            [
                torch.zeros(5, 32),
                torch.tensor([*fp8_residual_norm.DIGITS, *[0.0] * 12]).expand(5, -1),
            ],
            dim=1,
        )
    )
    cublaslt_gemm.multiply(x, stream.up.weight_OI, stream.up.unit, out)
    assert torch.allclose(out, torch.tensor(3.0), rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
@pytest.mark.parametrize("with_gelu", [False, True])
def test_a_product_writes_a_part_of_a_wider_tensor(device, dtype, with_gelu):
    g = torch.Generator().manual_seed(0)
    x, weight = (to_e4m3(torch.randn(s, generator=g)).to(device) for s in ((2, 40, 80), (96, 80)))
    wide = torch.zeros(2, 70, 128, device=device).to(dtype)
    out = wide[:, 30:, 32:]
    cublaslt_gemm.multiply(x, weight, 3.0, out, with_gelu)
    expected = 3.0 * x.float().cpu() @ weight.float().cpu().t()
    expected = torch.nn.functional.gelu(expected, approximate="tanh") if with_gelu else expected
    assert distance(out.float().cpu(), expected) < (0.04 if dtype == E4M3 else 4e-3)
    assert not wide[:, :30].float().any() and not wide[..., :32].float().any()
    cublaslt_gemm.multiply(x, weight, 3e3, out)
    assert out.float().isfinite().all()
    if dtype == E4M3:
        assert out.float().max() == 448


def test_add_up_is_the_sum_that_is_due():
    parts = [
        PendingResidual(torch.randn(2, n, 6), torch.randn(1, 6), (torch.randn(2, n, 6),), bias)
        for n, bias in ((3, torch.randn(6)), (5, None))
    ]
    expected = [
        p[0] + p.gate_BD * (p.terms[0] + (0 if p.bias_D is None else p.bias_D)) for p in parts
    ]
    assert torch.equal(fp8_residual_norm.add_up(*parts), torch.cat(expected, dim=1))
    assert torch.equal(added_up(parts[0]), expected[0])


def test_the_kernels_give_what_plain_torch_does():
    pytest.importorskip("triton", reason="torch without CUDA comes without Triton")
    program = Path(__file__).parent / "interpreted_fp8_residual_norm.py"
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 6


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernels_give_what_plain_torch_does(dtype):
    for name, share in compare_all("cuda", dtype).items():
        assert share > 0.99, name


# ---- whether they are used


def test_they_are_refused_with_a_reason_where_they_cannot_run():
    assert fp8_blocks.choose("cpu", 128) == (False, "no Hopper GPU or newer")
    q, k, v = (to_e4m3(torch.randn(1, n, 2, 32)) for n in (5, 9, 9))
    out = attend_fp8(q, k, v)
    assert out.shape == (1, 5, 2, 32) and out.dtype == torch.bfloat16
    assert distance(out.flatten(2), train_blocks.attend(*(x.float() for x in (q, k, v)))) < 1e-2


@pytest.mark.parametrize("name", ["round_rows", "add_norm_quantise", "multiply", "attend_fp8"])
def test_the_trial_sees_one_wrong_value_in_sixteen(name, monkeypatch):
    """Of any of the functions, on the first device alone."""
    assert fp8_blocks.block_gap("cpu", 32) == 0
    right, runs = getattr(fp8_blocks, name), []
    monkeypatch.setattr(fp8_blocks, "to_device", lambda x, device: runs.append(device) or x)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        out = {
            "round_rows": lambda: args[1],
            "multiply": lambda: args[3],
            "add_norm_quantise": lambda: result[1],
            "attend_fp8": lambda: result,
        }[name]()
        if "cpu" not in runs:
            as_stored = out.view(torch.uint8) if out.dtype == E4M3 else out
            as_stored[..., 3::16] = 0
        return result

    monkeypatch.setattr(fp8_blocks, name, wrong)
    assert fp8_blocks.block_gap("elsewhere", 32) > fp8_blocks.BLOCK_TOLERANCE
