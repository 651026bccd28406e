"""The fusion: its formula, its gradients, and the weight it learns for each material.

    pytest tests/test_fusion.py
"""

import pytest
import torch

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


def test_black_intensity_has_finite_gradients():
    fusion = PhysicsInspiredFusion()
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
