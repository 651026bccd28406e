"""The codecs, packing, mask and positions, against diffusers' own Fill pipeline.

pytest tests/test_codec.py
"""

import pytest
import torch
from diffusers import FluxFillPipeline

from models import codec
from models.backbones import fill


def test_the_cosine_basis_is_orthonormal():
    basis = codec.DctCodec().basis.flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), atol=1e-5, rtol=0)


def test_smooth_images_survive_the_cosine_codec():
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    diptych = fill.compose_diptych(ramp, ramp.flip(-1))
    dct = codec.DctCodec()
    assert dct.encode(diptych).shape == (1, 16, 8, 16)
    back = fill.infrared_panel(dct.decode(dct.encode(diptych)))
    assert (back - ramp.flip(-1)).abs().max() < 0.01


def test_real_infrared_survives_the_cosine_codec(real_data):
    import numpy as np
    from PIL import Image

    errors = []
    for path in sorted((real_data / "msrs" / "infrared").iterdir())[:8]:
        image = Image.open(path).convert("L").resize((256, 256), Image.Resampling.LANCZOS)
        infrared = torch.from_numpy(np.array(image) / 255).float().expand(1, 3, -1, -1)
        dct = codec.DctCodec()
        latents = dct.encode(fill.compose_diptych(infrared, infrared))
        back = fill.infrared_panel(dct.decode(latents))
        errors.append((back - infrared[:, :1]).square().mean())
    assert -10 * torch.stack(errors).mean().log10() > 32


def test_packing_is_diffusers_packing_and_inverts():
    latents = torch.randn(2, 16, 6, 12)
    tokens = codec.pack(latents)
    assert torch.equal(tokens, FluxFillPipeline._pack_latents(latents, 2, 16, 6, 12))
    assert torch.equal(codec.unpack(tokens, 6, 12), latents)


def test_mask_and_positions_are_those_of_the_fill_pipeline():
    mask = torch.zeros(1, 1, 32, 96)
    mask[..., 48:] = 1
    cells = mask[:, 0].view(1, 4, 8, 12, 8).permute(0, 2, 4, 1, 3).reshape(1, 64, 4, 12)
    theirs = FluxFillPipeline._pack_latents(cells, 1, 64, 4, 12)
    assert torch.equal(fill.pack_mask(32, 48), theirs)
    ids = FluxFillPipeline._prepare_latent_image_ids(1, 2, 6, "cpu", torch.float32)
    assert torch.equal(fill.token_positions(32, 48), ids)


def test_the_infrared_panel_is_the_right_half_for_any_width():
    for W in (16, 48, 80):
        inside = fill.in_infrared_panel(32, W)
        assert torch.equal(inside, fill.pack_mask(32, W)[0].bool().all(-1))
        assert inside.float().mean() == 0.5


def test_odd_sizes_and_unequal_panels_are_refused():
    with pytest.raises(ValueError, match="multiples of 16, got 40x48"):
        fill.compose_diptych(torch.zeros(1, 3, 40, 48), torch.zeros(1, 3, 40, 48))
    with pytest.raises(ValueError, match="need two"):
        fill.compose_diptych(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32))
