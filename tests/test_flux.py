"""The patched FLUX against the original, and loading a FluxFillPipeline from disk.

pytest tests/test_flux.py
"""

from copy import deepcopy

import pytest
import torch
from diffusers import FluxFillPipeline

from models import attention
from models import flux as fluxes
from models.guidance import SemanticGuidance
from tests.test_lora import flux_inputs
from tests.tiny_models import INJECT, guide, stir, tiny_flux, write_flux_fill

MAPS = [torch.rand(2, n, 32, 32) for n in (1, 32, 8)]  # 2 x 2 places; 2 x 4 image tokens


def patched(separate=True):
    flux = tiny_flux()
    guidance = SemanticGuidance(flux.inner_dim, INJECT, separate)
    fluxes.patch_blocks(flux, guidance)
    return flux, guidance


def run(flux, guidance=None):
    kwargs = (
        {} if guidance is None else {"joint_attention_kwargs": {"guidance": guide(guidance, MAPS)}}
    )
    return flux(**flux_inputs(flux), **kwargs)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_the_patched_model_starts_bit_equal_to_the_original(separate, checkpointing):
    original = tiny_flux().train()
    flux, guidance = patched(separate)
    flux.train()
    if checkpointing:
        original.enable_gradient_checkpointing()
        flux.enable_gradient_checkpointing()
    assert torch.equal(run(flux, guidance), run(original))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_attention_is_upstreams_attention(dtype):
    original, (flux, _) = tiny_flux().to(dtype), patched()
    flux = flux.to(dtype)
    inputs = {
        k: v.to(dtype) if torch.is_tensor(v) and k not in ("img_ids", "txt_ids", "timestep") else v
        for k, v in flux_inputs(flux).items()
    }
    assert torch.equal(flux(**inputs)[0], original(**inputs)[0])


def test_attention_gets_a_contiguous_gradient_also_of_a_slice(monkeypatch):
    """cuDNN's backward on Hopper crashes otherwise, see models/attention.py."""
    seen, kernel = [], attention.F.scaled_dot_product_attention

    def spy(*heads):
        out = kernel(*heads)  # (B, h, S, d)
        out.register_hook(lambda g: seen.append(g.transpose(1, 2).is_contiguous()))
        return out

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    q, k, v = (torch.randn(2, 5, 2, 8, requires_grad=True) for _ in range(3))
    attention.attend(q, k, v).backward(torch.randn(2, 5, 80)[..., :16])
    assert seen == [True]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_the_gradient_reaches_every_guidance_parameter(separate, checkpointing):
    flux, guidance = patched(separate)
    flux.requires_grad_(False)
    stir(guidance)
    if checkpointing:
        flux.enable_gradient_checkpointing()
    flux.train()
    run(flux, guidance).square().mean().backward()
    silent = [n for n, p in guidance.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(p.grad is None for p in flux.parameters())


def test_checkpointing_changes_neither_output_nor_gradient():
    grads = []
    for checkpointing in (False, True):
        flux, guidance = patched()
        stir(guidance)
        flux.train()
        if checkpointing:
            flux.enable_gradient_checkpointing()
        run(flux, guidance).square().mean().backward()
        grads.append([p.grad for p in [*flux.parameters(), *guidance.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_guidance_is_dropped_nowhere_when_the_model_is_trained():
    flux, guidance = patched()
    stir(guidance)
    assert not torch.allclose(run(flux, guidance), run(flux), atol=1e-4)


def test_a_changed_upstream_signature_stops_the_patch():
    flux = tiny_flux()
    block = flux.transformer_blocks[0]
    block.forward = lambda hidden_states, temb: None
    with pytest.raises(RuntimeError, match="expected .*hidden_states"):
        fluxes.patch_blocks(flux, SemanticGuidance(32, INJECT))


def test_a_block_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="names block 7; the model has 2"):
        fluxes.patch_blocks(tiny_flux(), SemanticGuidance(32, {7: ["intensity"]}))


def test_other_instances_stay_as_they_were():
    bystander = tiny_flux()
    forwards = [deepcopy(type(b).forward) for b in bystander.transformer_blocks]
    patched()
    assert [type(b).forward for b in bystander.transformer_blocks] == forwards
    assert "forward" not in vars(bystander.transformer_blocks[0])


def test_a_pipeline_folder_loads_and_its_prompt_is_that_of_the_pipeline(tmp_path):
    folder = str(write_flux_fill(tmp_path))
    flux, vae = fluxes.load_flux(folder, torch.float32)
    assert torch.equal(run(flux), run(tiny_flux()))
    assert vae.config.latent_channels == 16
    prompt = fluxes.encode_prompt(folder, "a thermal photograph", 16)
    pipeline = FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        theirs, pooled, _ = pipeline.encode_prompt(
            "a thermal photograph", None, max_sequence_length=16
        )
    assert torch.equal(prompt.tokens_MC, theirs[0].float())
    assert torch.equal(prompt.pooled_C, pooled[0].float())
    other = fluxes.encode_prompt(folder, "a scene", 16)
    assert not torch.equal(prompt.tokens_MC, other.tokens_MC)


def test_a_prompt_that_clip_would_cut_is_refused(tmp_path):
    folder = str(write_flux_fill(tmp_path))
    with pytest.raises(ValueError, match="CLIP reads 77"):
        fluxes.encode_prompt(folder, "a " * 100, 16)


def test_weights_that_cannot_be_fetched_are_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="set model.flux_fill_id to a local folder") as caught:
        fluxes.load_flux(str(tmp_path / "missing"), torch.float32)
    assert "\n" not in str(caught.value)
