"""The fusion: its formula, its gradients, and the weight it learns for each material.

pytest tests/test_fusion.py
"""

import numpy as np
import pytest
import torch

from data.radiometry import band_radiance, to_unit
from data.synthetic import render_scene
from models.fusion import PhysicsInspiredFusion


def inputs(B=2, H=6, W=7):
    g = torch.Generator().manual_seed(0)
    intensity = torch.rand(B, 1, H, W, generator=g)
    material = torch.randn(B, 32, H, W, generator=g).softmax(1)
    return intensity, material, torch.randn(B, 8, H, W, generator=g)


def test_fusion_is_the_rendering_equation():
    fusion = PhysicsInspiredFusion()
    intensity, material, context = inputs()
    a, b = 1 / (1 + torch.exp(torch.tensor([-0.7, -0.3])))
    expected = a * intensity**2.5 * fusion.weight(material) + b * fusion.term(context)
    torch.testing.assert_close(fusion(intensity, material, context), expected)
    assert expected.shape == (2, 3, 6, 7)


def test_only_the_contexts_term_differs_between_channels():
    fusion = PhysicsInspiredFusion()
    intensity, material, context = inputs()
    warm = fusion(intensity, material, context) - fusion(torch.zeros(2, 1, 6, 7), material, context)
    torch.testing.assert_close(warm, warm[:, :1].expand(-1, 3, -1, -1), atol=1e-6, rtol=1e-5)
    assert warm.min() > 0


@pytest.mark.parametrize("level", [1e-5, 0.5, 0.99])
def test_gradient_reaches_every_input_and_every_parameter(level):
    fusion = PhysicsInspiredFusion()
    intensity, material, context = inputs()
    leaves = [x.requires_grad_() for x in (torch.full_like(intensity, level), material, context)]
    (fusion(*leaves) - 0.3).square().mean().backward()
    for x in [*leaves, *fusion.parameters()]:
        assert torch.isfinite(x.grad).all() and x.grad.norm() > 0


def test_no_pixel_of_any_input_is_without_gradient():
    """Also outside of [0, 1]: the output is not clamped."""
    fusion = PhysicsInspiredFusion()
    intensity, material, context = (x.requires_grad_() for x in inputs())
    out = fusion(intensity, material, context * 9)
    assert out.min() < 0 or out.max() > 1
    (out.sum()).backward()
    assert all((x.grad != 0).all() for x in (intensity, material, context))


@pytest.mark.parametrize("power", [0.5, 2.5])
def test_black_intensity_has_finite_gradients(power):
    """The derivative of a root at 0 is infinite, and nothing keeps the power above 1."""
    fusion = PhysicsInspiredFusion()
    torch.nn.init.constant_(fusion.power, power)
    intensity, material, context = inputs()
    intensity = torch.zeros_like(intensity).requires_grad_()
    fusion(intensity, material, context).sum().backward()
    assert torch.isfinite(intensity.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters())


def test_material_weights_are_those_of_pure_materials():
    fusion = PhysicsInspiredFusion(num_materials=5)
    weights = fusion.material_weights()
    assert weights.shape == (5,) and weights.min() > 0 and weights.max() < 1
    pure = torch.zeros(1, 5, 1, 1)
    pure[0, 3] = 1
    black, white = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    context = torch.zeros(1, 8, 1, 1)
    gain = fusion(white, pure, context) - fusion(black, pure, context)
    torch.testing.assert_close(gain[0, 0, 0, 0], fusion.alpha.sigmoid() * weights[3])


def test_scalars_are_those_of_the_formula():
    scalars = PhysicsInspiredFusion().scalars()
    assert scalars["power"] == 2.5
    assert 0.66 < scalars["alpha"] < 0.67 and 0.57 < scalars["beta"] < 0.58
    assert not any(x.requires_grad for x in scalars.values())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_shapes_that_would_broadcast_are_refused(which):
    wrong = list(inputs())
    wrong[which] = wrong[which][:1]
    if which == 0:
        wrong[0] = inputs()[0][:, :, :1]
    with pytest.raises(ValueError, match="intensity, material, context"):
        PhysicsInspiredFusion()(*wrong)


def true_factors(first, scenes=8, size=48):
    """(emission, materials, context with environment and emissivity), infrared of whole scenes."""
    rendered = [render_scene(0, first + i, size) for i in range(scenes)]
    maps = {
        name: torch.from_numpy(np.stack([getattr(scene, name) for scene in rendered]))
        for name in ("temperature_k", "emissivity", "environment", "material", "infrared")
    }
    emission = torch.from_numpy(to_unit(band_radiance(maps["temperature_k"].double().numpy())))
    material = torch.nn.functional.one_hot(maps["material"].long(), 32).permute(0, 3, 1, 2).float()
    context = torch.zeros(scenes, 8, size, size)
    context[:, 0], context[:, 1] = maps["environment"], maps["emissivity"]
    inputs = emission.float().clamp(0, 1)[:, None], material, context
    return inputs, maps["infrared"][:, None].expand(-1, 3, -1, -1)


def test_fusion_of_the_true_factors_gives_the_true_infrared():
    """Only the fusion is fitted, to a few thousand pixels; scenes it has not seen reach 30 dB."""
    inputs, infrared = true_factors(first=0)
    some = torch.randperm(infrared[:, 0].numel(), generator=torch.Generator().manual_seed(0))[:3000]
    *inputs, infrared = (
        x.transpose(0, 1).flatten(1)[None, :, some, None] for x in (*inputs, infrared)
    )
    torch.manual_seed(0)
    fusion = PhysicsInspiredFusion()
    optimizer = torch.optim.Adam(fusion.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        loss = (fusion(*inputs) - infrared).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    inputs, infrared = true_factors(first=8, scenes=4)
    with torch.no_grad():
        error = (fusion(*inputs) - infrared).square().mean()
    assert -10 * error.log10() >= 30
