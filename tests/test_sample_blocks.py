"""The blocks that only sample against those that train: velocities, adapters, times.

pytest tests/test_sample_blocks.py
"""

from copy import deepcopy

import pytest
import torch

from models.fast import fp8_blocks, fused_matrices, sample_blocks, train_blocks
from models.lora import lora_layers
from models.sampler import SamplingConfig, sample
from tests.test_lora import flux_inputs
from tests.test_train_blocks import ALL_LAYERS, MAPS, adapted
from tests.tiny_models import guide, stir, tiny_translator


def trained_values(flux):
    return {f"flux.{n}": p.detach().clone() for n, p in flux.named_parameters() if ".lora_" in n}


def sampling_flux(flux, guidance, compiled=False):
    adapters = trained_values(flux)
    fused_matrices.freeze(flux, "cpu", "fp8", adapters=adapters)
    sample_blocks.install(flux, guidance, compiled)
    left = [name for name in (*adapters, *lora_layers(flux)) if "transformer_blocks" in name]
    assert not left  # all taken out, all folded
    return flux


def stir_zeros(flux):
    """What is zero in a random FLUX: its last layer, and what its blocks do with the time."""
    stir(flux.proj_out)
    generator = torch.Generator().manual_seed(0)
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        for name, matrix in block.frozen.items():
            if "modulation" in name:
                matrix.weight.normal_(std=0.1, generator=generator)


def without_adapters(flux, guidance):
    for layer in lora_layers(flux).values():
        torch.nn.init.zeros_(layer.lora_B.weight)
    return flux, guidance


@torch.no_grad()
def velocity(flux, guidance, **more):
    kwargs = {"guidance": guide(guidance, MAPS)}
    return flux(**flux_inputs(flux), joint_attention_kwargs=kwargs, **more)[0]


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_without_adapters_they_are_the_fp8_blocks_that_train(rows, compiled, monkeypatch):
    monkeypatch.setattr(train_blocks, "BACKEND", "aot_eager")
    flux, guidance = without_adapters(*adapted())
    ours = velocity(sampling_flux(deepcopy(flux), guidance, compiled), guidance, infrared_rows=rows)
    fused_matrices.freeze(flux, "cpu", "fp8")
    train_blocks.install(flux, guidance, compiled=False)
    assert distance(ours, velocity(flux, guidance, infrared_rows=rows)) < 0.04


@pytest.mark.parametrize("targets", [None, ALL_LAYERS])
def test_folded_adapters_do_what_separate_ones_do(targets):
    flux, guidance = adapted(targets)
    plain = velocity(flux, guidance)
    bare = velocity(*without_adapters(deepcopy(flux), guidance))
    assert distance(velocity(sampling_flux(flux, guidance), guidance), plain) < 0.1
    assert distance(bare, plain) > 0.4


def test_modulations_of_all_times_are_those_of_each():
    flux, guidance = adapted()
    sampling_flux(flux, guidance)
    inputs = flux_inputs(flux)
    t, scale = inputs["timestep"][:1], float(inputs["guidance"][0])
    same = {
        **inputs,
        "timestep": t.expand(2),
        "pooled_projections": inputs["pooled_projections"][:1].expand(2, -1),
    }
    times = torch.stack([t[0] / 2, t[0], t[0] / 3])
    ready = sample_blocks.modulations_at(flux, times, scale, same["pooled_projections"][0])
    kwargs = {"guidance": guide(guidance, MAPS)}
    with torch.no_grad():
        alone = flux(**same, joint_attention_kwargs=kwargs)[0]
        given = flux(**same, joint_attention_kwargs=kwargs, modulations=ready[1])[0]
        other = flux(**same, joint_attention_kwargs=kwargs, modulations=ready[0])[0]
    assert distance(given, alone) < 1e-5 < distance(other, alone)


def test_the_sampler_gives_each_step_the_modulations_of_its_time(monkeypatch):
    torch.manual_seed(0)
    plain = tiny_translator(base_dtype="fp8").eval()
    adapters = {n: p.detach().clone() for n, p in plain.named_parameters() if ".lora_" in n}
    monkeypatch.setattr(fp8_blocks, "choose", lambda *a: (True, "tried"))
    torch.manual_seed(0)
    ours = tiny_translator(base_dtype="fp8", adapters=adapters).eval()
    assert isinstance(ours.runner, sample_blocks.SampleRunner)
    for translator in (plain, ours):
        stir_zeros(translator.flux)
    visible, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 8, 64)
    cfg = SamplingConfig(steps=3)
    expected = sample(plain, visible, noise, cfg)
    right = sample(ours, visible, noise, cfg)
    assert distance(right, expected) < 0.03
    at_once = ours.runner.prepare
    monkeypatch.setattr(ours.runner, "prepare", lambda times, *a: [None] * len(times))
    assert distance(sample(ours, visible, noise, cfg), right) < 1e-5  # computed in each step
    monkeypatch.setattr(ours.runner, "prepare", lambda *a: at_once(*a)[::-1])
    assert distance(sample(ours, visible, noise, cfg), right) > 1e-4


@pytest.mark.parametrize("change", ["missing", "another rank"])
def test_an_adapter_that_does_not_fit_is_named(change):
    flux, _ = adapted()
    adapters = trained_values(flux)
    name = next(iter(adapters))
    value = adapters.pop(name)
    if change == "another rank":
        adapters[name] = torch.cat([value, value])
    with pytest.raises(ValueError, match="transformer_blocks.*lora_.* must be"):
        fused_matrices.freeze(flux, "cpu", "fp8", adapters=adapters)
