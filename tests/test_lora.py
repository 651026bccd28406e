"""LoRA: zero start, naming, and the file a stock FluxFillPipeline reads.

pytest tests/test_lora.py
"""

import pytest
import torch
from diffusers import FluxFillPipeline

from models.lora import LORA_FILE, LoraConfig, add_lora, lora_layers, save_lora
from tests.tiny_models import stir, tiny_flux, write_flux_fill


def flux_inputs(flux, tokens=8, text=4, batch=2):
    g = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(batch, tokens, 384, generator=g),
        encoder_hidden_states=torch.randn(batch, text, 32, generator=g),
        pooled_projections=torch.randn(batch, 32, generator=g),
        timestep=torch.tensor([0.2, 0.7])[:batch],
        guidance=torch.ones(batch),
        img_ids=torch.arange(3 * tokens).view(-1, 3).float(),
        txt_ids=torch.zeros(text, 3),
        return_dict=False,
    )


def test_the_adapted_model_starts_equal_to_the_original():
    flux = tiny_flux()
    before = flux(**flux_inputs(flux))[0]
    names = add_lora(flux, LoraConfig(r=2))
    assert len(names) == 2 * 4 + 2 * 3  # single blocks have no to_out
    assert torch.equal(flux(**flux_inputs(flux))[0], before)


def test_a_broken_regular_expression_is_named():
    with pytest.raises(ValueError, match=r"target_modules='\(' is not a regular expression"):
        add_lora(tiny_flux(), LoraConfig(target_modules="("))


def test_targets_may_be_one_regular_expression():
    names = add_lora(tiny_flux(), LoraConfig(target_modules=r"single_.*\.proj_mlp"))
    assert names == ["single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.1.proj_mlp"]


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="matches none"):
        add_lora(tiny_flux(), LoraConfig(target_modules=["to_qq"]))
    with pytest.raises(ValueError, match="out of range"):
        add_lora(tiny_flux(), LoraConfig(r=-1))


def test_a_stock_pipeline_loads_the_file_and_gives_equal_outputs(tmp_path):
    folder = write_flux_fill(tmp_path)
    ours, cfg = tiny_flux(), LoraConfig(r=2, lora_alpha=6)
    add_lora(ours, cfg)
    for layer in lora_layers(ours).values():
        stir(layer.lora_A, 1)
        stir(layer.lora_B, 2)
    save_lora(ours.state_dict(), cfg, tmp_path / LORA_FILE, {"made_by": "a test"})
    pipeline = FluxFillPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    theirs = pipeline.transformer
    read = theirs.peft_config["default_0"]
    assert (read.r, read.lora_alpha) == (2, 2)  # from the header; 6 / 2 is folded into B
    inputs = flux_inputs(ours)
    plain = tiny_flux()(**inputs)[0]
    mine = ours(**inputs)[0]
    assert not torch.allclose(mine, plain, atol=1e-4)
    torch.testing.assert_close(theirs(**inputs)[0], mine, atol=1e-5, rtol=1e-4)
