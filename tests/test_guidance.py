"""Guidance tokens and cross-attention: positions, zero start, both modes.

pytest tests/test_guidance.py
"""

import pytest
import torch

from models.guidance import MAP_CHANNELS, SemanticCrossAttention, SemanticGuidance, panel_rotary
from tests.tiny_models import INJECT, guide, stir

H, W = 64, 96
MAPS = [torch.rand(2, n, H, W) for n in MAP_CHANNELS.values()]
X = torch.randn(2, 2 * (H // 16) * (W // 16), 32)


@pytest.mark.parametrize("separate", [True, False])
def test_it_adds_exactly_nothing_at_the_start(separate):
    guidance = SemanticGuidance(32, INJECT, separate)
    assert torch.equal(guidance.add(1, X, guide(guidance, MAPS)), X)


@pytest.mark.parametrize("separate", [True, False])
def test_every_map_changes_the_output_once_trained(separate):
    guidance = SemanticGuidance(32, INJECT, separate)
    stir(guidance)
    before = guidance.add(1, X, guide(guidance, MAPS))
    for i in range(3):
        changed = [m.flip(-1) if i == j else m for j, m in enumerate(MAPS)]
        assert not torch.allclose(guidance.add(1, X, guide(guidance, changed)), before)


def test_a_token_looks_first_at_its_own_place_from_both_panels():
    rows, columns = H // 16, W // 16
    found = guide(SemanticGuidance(32, INJECT), MAPS)
    attention = SemanticCrossAttention(32, heads=1)
    with torch.no_grad():
        attention.to_q.weight.zero_()
        attention.to_k.weight.zero_()
        attention.to_v.bias.zero_()
        attention.to_v.weight.copy_(torch.eye(64))
        attention.to_out = torch.nn.Identity()
    # tokens that say where they are: one-hot of the place (24 places in 64 channels)
    places = torch.eye(64)[: rows * columns][None].expand(2, -1, -1)
    looked_at = attention(X, places, found).argmax(-1).view(2, rows, 2 * columns)
    expected = torch.arange(rows * columns).view(rows, columns)
    assert torch.equal(looked_at[0, :, :columns], expected)
    assert torch.equal(looked_at[0, :, columns:], expected)


def test_rotary_products_depend_on_the_distance_alone():
    def product(a, b):
        (ca, sa), (cb, sb) = (panel_rotary(torch.tensor([r]), torch.tensor([c])) for r, c in (a, b))
        return (ca * cb + sa * sb).sum()

    torch.testing.assert_close(product((0, 0), (2, 1)), product((5, 7), (7, 8)))
    assert product((3, 3), (3, 3)) > product((3, 3), (3, 4)) > product((3, 3), (3, 8))


def test_unknown_maps_are_refused():
    with pytest.raises(ValueError, match="block 3 names"):
        SemanticGuidance(32, {3: ["depth"]})
    with pytest.raises(ValueError, match="no maps"):
        SemanticGuidance(32, {3: []})
