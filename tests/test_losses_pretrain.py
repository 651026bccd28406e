"""The objective of stage 1: closed forms, missing labels, physics on and off, gradients.

pytest tests/test_losses_pretrain.py
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from losses.physics import FLAT, material_separation_loss, physics_consistency_loss
from losses.pretrain import (
    MultiTaskPretrainLoss,
    PretrainLossConfig,
    class_weights,
    material_cross_entropy,
    mean_squared_error,
    reconstruction_loss,
)
from models.decomposition import DecompositionConfig
from models.stage1 import Stage1
from utils.correlation import pearson


class Labels(NamedTuple):
    intensity: Tensor
    material: Tensor
    context: Tensor


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def labels(B=2, H=5, W=6, material=None):
    if material is None:
        material = (random(B, H, W, seed=1) * 32).long()
    return Labels(random(B, 1, H, W, seed=2), material, random(B, 8, H, W, seed=3))


def outputs(B=2, H=5, W=6):
    """intensity, material logits, context, fused"""
    return [
        random(B, 1, H, W, seed=4),
        random(B, 32, H, W, seed=5) * 4,
        random(B, 8, H, W, seed=6),
        random(B, 3, H, W, seed=7),
    ]


def loss_of(out, labels, infrared=None, **changes):
    infrared = random(*out[0].shape, seed=8) if infrared is None else infrared
    return MultiTaskPretrainLoss(PretrainLossConfig(**changes))(*out, labels, infrared)


def test_total_is_the_weighted_sum_of_its_parts():
    total, parts = loss_of(outputs(), labels())
    weights = dict(
        intensity=1.0,
        material=0.5,
        context=0.3,
        physics=0.5,
        reconstruction=0.2,
        consistency=0.05,
        separation=0.01,
    )
    assert set(parts) == {*weights, "material_ce", "labelled"}
    torch.testing.assert_close(total, sum(w * parts[name] for name, w in weights.items()))
    assert not any(x.requires_grad for x in parts.values())


def test_terms_have_their_closed_forms():
    out, target, infrared = outputs(), labels(), random(2, 1, 5, 6, seed=8)
    _, parts = loss_of(out, target, infrared)
    torch.testing.assert_close(parts["intensity"], ((out[0] - target.intensity) ** 2).mean())
    torch.testing.assert_close(parts["context"], ((out[2] - target.context) ** 2).mean())
    torch.testing.assert_close(parts["physics"], ((out[3] - infrared) ** 2).mean())
    ce = torch.nn.functional.cross_entropy(out[1], target.material)
    torch.testing.assert_close(parts["material"], ce)
    d = (out[3] - infrared.expand(2, 3, 5, 6)).numpy()
    expected = abs(d).mean() + abs(np.diff(d, axis=2)).mean() + abs(np.diff(d, axis=3)).mean()
    torch.testing.assert_close(parts["reconstruction"], torch.tensor(expected))


def test_equal_logits_cost_ln_32():
    _, parts = loss_of([outputs()[0], torch.zeros(2, 32, 5, 6), *outputs()[2:]], labels())
    assert abs(parts["material_ce"] - math.log(32)) < 1e-5


def test_physics_off_leaves_every_other_bit():
    on, off = outputs(), [*outputs()[:3], None]
    leaves_on = [x.requires_grad_() for x in on[:3]]
    leaves_off = [x.requires_grad_() for x in off[:3]]
    total_on, parts_on = loss_of(on, labels(), physics=0.0, reconstruction=0.0)
    total_off, parts_off = loss_of(off, labels())
    assert set(parts_on) - set(parts_off) == {"physics", "reconstruction"}
    assert all(torch.equal(parts_on[name], x) for name, x in parts_off.items())
    assert torch.equal(total_on, total_off)
    total_on.backward()
    total_off.backward()
    for a, b in zip(leaves_on, leaves_off):
        assert torch.equal(a.grad, b.grad)


def test_unlabelled_pixels_do_not_count():
    target = labels()
    material = target.material.clone()
    material[:, :2] = 255
    logits = outputs()[1]
    got = material_cross_entropy(logits, material)
    expected = material_cross_entropy(logits[:, :, 2:], target.material[:, 2:])
    torch.testing.assert_close(got.plain_B, expected.plain_B)
    assert got.labelled_B.all()


def test_no_labels_at_all_cost_nothing_and_keep_the_graph():
    out = outputs()
    out[1].requires_grad_()
    unknown = torch.full((2, 5, 6), 255)
    total, parts = loss_of(out, labels(material=unknown))
    assert parts["material"] == 0 and parts["labelled"] == 0
    assert math.isnan(parts["material_ce"])  # nothing to report is not a perfect score
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(out[1].grad).all()
    ce = material_cross_entropy(out[1].detach().requires_grad_(), unknown)
    assert ce.weighted_B.requires_grad  # distributed training needs every parameter in every graph


def test_cross_entropy_of_a_batch_is_the_mean_of_its_halves():
    """Whatever the number of labelled pixels and samples: so ranks and accumulation agree."""
    out, material = outputs(B=4), labels(B=4).material.clone()
    material[0, :3] = 255
    material[2] = 255
    whole = loss_of(out, labels(B=4, material=material))[1]["material"]
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        target = Labels(*(x[half] for x in labels(B=4, material=material)))
        halves.append(loss_of([x[half] for x in out], target)[1]["material"])
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_logged_cross_entropy_is_over_labelled_samples():
    out, material = outputs(), labels().material.clone()
    material[1] = 255
    _, parts = loss_of(out, labels(material=material))
    ce = material_cross_entropy(out[1], material)
    assert ce.labelled_B.tolist() == [True, False]
    torch.testing.assert_close(parts["material_ce"], ce.plain_B[0])
    torch.testing.assert_close(parts["material"], ce.plain_B[0] / 2)
    assert parts["labelled"] == 0.5


def test_class_weights_make_a_weighted_mean():
    logits, material = outputs()[1], labels().material.clone()
    material[0, 0] = 255
    weights = random(32, seed=9) + 0.1
    got = material_cross_entropy(logits, material, weights)
    for which, expected_weights in ((got.weighted_B, weights), (got.plain_B, None)):
        expected = torch.nn.functional.cross_entropy(
            logits[:1], material[:1], expected_weights, ignore_index=255
        )
        torch.testing.assert_close(which[0], expected)


def test_balance_weighs_rare_materials_more_and_is_logged_without():
    frequency = torch.bincount(labels().material.flatten(), minlength=32)
    frequency[5] = 0
    torch.testing.assert_close(class_weights(frequency, 0.0), torch.ones(32))
    equal = class_weights(frequency, 1.0)
    totals = (equal * frequency)[frequency > 0]
    torch.testing.assert_close(totals, totals[:1].expand_as(totals))
    assert equal[5] == equal[frequency > 0].max()
    torch.testing.assert_close((equal * frequency).sum() / frequency.sum(), torch.tensor(1.0))

    everywhere = torch.ones(32).index_fill(0, torch.tensor([3]), 50.0)
    cfg = PretrainLossConfig(balance=0.5)
    out, target = outputs(), labels()
    _, parts = MultiTaskPretrainLoss(cfg, everywhere)(*out, target, random(2, 1, 5, 6))
    ce = material_cross_entropy(out[1], target.material, class_weights(everywhere, 0.5))
    torch.testing.assert_close(parts["material"], ce.weighted_B.mean())
    torch.testing.assert_close(parts["material_ce"], ce.plain_B.mean())
    assert parts["material"] != parts["material_ce"]


def test_pearson_is_numpys():
    a, b = random(3, 1, 8, 9, seed=1), random(3, 1, 8, 9, seed=2)
    b = b + a
    expected = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a, b)]
    torch.testing.assert_close(
        pearson(a, b, FLAT), torch.tensor(expected).float(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("scale, expected", [(0.5, 0.0), (-0.5, 2.0)])
def test_consistency_sees_order_not_level(scale, expected):
    a = random(3, 1, 8, 9)
    assert abs(physics_consistency_loss(a, 0.3 + scale * a) - expected) < 1e-3


def test_a_flat_image_has_no_correlation_and_finite_gradients():
    flat = torch.full((2, 1, 8, 9), 0.5, requires_grad=True)
    loss = physics_consistency_loss(flat, random(2, 1, 8, 9))
    loss.backward()
    assert loss == 1 and torch.isfinite(flat.grad).all() and flat.grad.norm() > 0
    assert physics_consistency_loss(random(2, 1, 8, 9), torch.zeros(2, 1, 8, 9)) == 1


def test_separation_is_zero_when_materials_explain_intensity_and_one_when_not():
    material = torch.arange(4).repeat(3, 2)[None]  # (1, 3, 8)
    p = torch.nn.functional.one_hot(material, 32).permute(0, 3, 1, 2).float()
    assert material_separation_loss(material[:, None] / 4, p) < 1e-4
    halves = torch.zeros(1, 1, 3, 8)
    halves[..., 4:] = 1  # each material is as often cold as hot
    assert material_separation_loss(halves, p) == 1
    assert material_separation_loss(torch.full((1, 1, 3, 8), 0.3), p) == 1


def test_separation_is_the_correlation_ratio():
    intensity, material = random(1, 1, 9, 9), (random(1, 9, 9, seed=1) * 5).long()
    p = torch.nn.functional.one_hot(material, 32).permute(0, 3, 1, 2).float()
    within = sum(
        (intensity[0, 0][material[0] == m] - intensity[0, 0][material[0] == m].mean())
        .square()
        .sum()
        for m in range(5)
    )
    expected = within / (intensity - intensity.mean()).square().sum()
    got = material_separation_loss(intensity, p)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_single_row_has_no_vertical_gradient():
    assert reconstruction_loss(torch.ones(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)) == 1
    assert reconstruction_loss(torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)) == 1


@pytest.mark.parametrize(
    "loss", [mean_squared_error, reconstruction_loss, partial(pearson, flat=FLAT)]
)
def test_every_loss_refuses_shapes_that_would_broadcast(loss):
    with pytest.raises(ValueError, match="shapes differ"):
        loss(torch.rand(2, 1, 5, 6), torch.rand(2, 5, 6))
    with pytest.raises(ValueError, match="shapes differ"):
        loss(torch.rand(2, 3, 5, 6), torch.rand(2, 1, 5, 6))


@pytest.mark.parametrize("which", range(4))
def test_the_objective_refuses_outputs_of_another_size(which):
    out = outputs()
    out[which] = out[which][..., :1]
    with pytest.raises(ValueError):
        loss_of(out, labels())


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 5, 6), (1, 1, 5, 6)])
def test_the_objective_refuses_infrared_of_another_shape(shape):
    with pytest.raises(ValueError):
        loss_of(outputs(), labels(), infrared=torch.rand(shape))


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (1, 5, 6), (2, 5, 1)])
def test_cross_entropy_refuses_labels_of_another_shape(shape):
    with pytest.raises(ValueError, match="labels"):
        material_cross_entropy(torch.rand(2, 32, 5, 6), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (2, 4, 1, 6), (2, 4, 5, 1), (2, 5, 6)])
def test_separation_refuses_probabilities_of_another_shape(shape):
    with pytest.raises(ValueError, match="probabilities"):
        material_separation_loss(torch.rand(2, 1, 5, 6), torch.rand(shape))


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_makes_no_sense_is_refused(weight):
    with pytest.raises(ValueError, match=r"loss\.context"):
        MultiTaskPretrainLoss(PretrainLossConfig(context=weight))


def test_the_loss_is_fp32_for_bf16_outputs():
    out = [x.bfloat16() for x in outputs()]
    total, parts = loss_of(out, labels())
    assert {x.dtype for x in (total, *parts.values())} == {torch.float32}
    exact, _ = loss_of([x.float() for x in out], labels())
    torch.testing.assert_close(total, exact)


def forward(physics):
    """A small network with its maps (which keep their gradients) and fused image."""
    torch.manual_seed(0)
    net = Stage1(DecompositionConfig(backbone="resnet18", width=8), physics=physics)
    maps, fused = net(random(2, 3, 40, 48))
    for x in maps:
        x.retain_grad()
    return net, maps, fused


@pytest.mark.parametrize("physics", [True, False])
def test_the_total_reaches_every_map_and_every_parameter(physics):
    net, maps, fused = forward(physics)
    loss_of([*maps, fused], labels(H=40, W=48))[0].backward()
    for name, x in [*maps._asdict().items(), *net.named_parameters()]:
        grad = x.grad
        assert grad is not None and torch.isfinite(grad).all() and grad.norm() > 0, name
    assert len(maps.intensity.grad.flatten()) == (maps.intensity.grad != 0).sum()


TERMS = {  # the outputs (intensity, material, context, fused) that each term teaches
    "intensity": [0],
    "material": [1],
    "context": [2],
    "physics": [3],
    "reconstruction": [3],
    "consistency": [0],
    "separation": [0, 1],
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_teaches_its_outputs_and_no_others(term):
    out = [x.requires_grad_() for x in outputs()]
    total, _ = loss_of(out, labels(), **{name: float(name == term) for name in TERMS})
    total.backward()
    taught = [i for i, x in enumerate(out) if x.grad is not None and x.grad.abs().sum() > 0]
    assert taught == TERMS[term]


@pytest.mark.parametrize("term", ["physics", "reconstruction"])
def test_physics_alone_reaches_every_map_and_the_scalars(term):
    """The failure of a peer: its physics ran without gradient."""
    net, maps, fused = forward(physics=True)
    weights = {name: float(name == term) for name in TERMS}
    loss_of([*maps, fused], labels(H=40, W=48), **weights)[0].backward()
    scalars = [net.fusion.power, net.fusion.alpha, net.fusion.beta]
    for x in (*maps, *scalars):
        assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    first = net.decomposition.encoder.conv1.weight.grad
    assert torch.isfinite(first).all() and first.norm() > 0


def test_the_objective_can_be_learnt():
    """Overfits one batch, to below a third of where it began."""
    torch.manual_seed(0)
    net = Stage1(DecompositionConfig(backbone="resnet18", width=16, decoder="skips"))
    visible, infrared = random(2, 3, 32, 32), random(2, 1, 4, 4, seed=1)
    infrared = torch.nn.functional.interpolate(infrared, 32, mode="bilinear")
    material = (infrared[:, 0] * 32).long().clamp(0, 31)
    target = Labels(infrared, material, random(2, 8, 1, 1, seed=3).expand(-1, -1, 32, 32))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        maps, fused = net(visible)
        total, _ = loss_of([*maps, fused], target, infrared)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] / 3
