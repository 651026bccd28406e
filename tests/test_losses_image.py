"""The image loss of the mean, the game of the samples, and which samples are which.

pytest tests/test_losses_image.py
"""

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from losses import flow
from losses.adversarial import FEATURES, discriminator_loss, generator_loss
from losses.image import gradient_error, image_loss, structural_similarity

G = torch.Generator().manual_seed(0)
A, B = torch.rand(3, 1, 24, 32, generator=G), torch.rand(3, 1, 24, 32, generator=G)


def test_structural_similarity_agrees_with_another_implementation():
    ours = structural_similarity(A, 0.7 * A + 0.3 * B)
    for i in range(3):
        pair = A[i : i + 1], 0.7 * A[i : i + 1] + 0.3 * B[i : i + 1]
        # theirs pads by reflection; over windows that lie inside, both are the same
        _, theirs = structural_similarity_index_measure(
            *pair, data_range=1.0, return_full_image=True
        )
        torch.testing.assert_close(ours[i], theirs[..., 5:-5, 5:-5].mean(), atol=1e-4, rtol=0)


def test_the_image_loss_is_zero_for_equal_images_and_prefers_the_sharper_of_two():
    assert image_loss(A, A).abs().max() < 1e-6
    edge = torch.zeros(1, 1, 24, 32)
    edge[..., 16:] = 1
    soft = torch.nn.functional.avg_pool2d(edge, (1, 9), 1, (0, 4), count_include_pad=False)
    softer = torch.nn.functional.avg_pool2d(edge, (1, 15), 1, (0, 7), count_include_pad=False)
    assert 0 < image_loss(soft, edge) < image_loss(softer, edge)
    with pytest.raises(ValueError, match="shapes differ"):
        image_loss(A, A[:1])


def test_a_constant_offset_has_no_gradient_error():
    assert gradient_error(torch.full((2, 1, 16, 16), 0.3)).tolist() == [0, 0]
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    # a slope of 1 a pixel: differences of 1, 2 and 4 pixels at the three sizes
    assert gradient_error(ramp).item() == pytest.approx((1 + 2 + 4) / 3)


def test_the_hinge_stops_where_both_sides_are_sure():
    sure, unsure = torch.full((2, 1, 3, 3), 2.0), torch.zeros(2, 1, 3, 3)
    assert discriminator_loss(sure, -sure).tolist() == [0, 0]
    assert discriminator_loss(unsure, unsure).tolist() == [2, 2]
    assert generator_loss(sure, torch.tensor([0.0, 1.0])).tolist() == [-2, FEATURES - 2]


def test_the_share_of_means_is_exact_and_a_function_of_the_draw():
    for share in (0.0, 0.25, 0.5, 1.0):
        found = flow.predicts_mean(list(range(100, 140)), share)
        assert sum(found) == 40 * share
        assert found[7] == flow.predicts_mean([107], share)[0]


def test_the_weight_turns_a_velocity_error_into_that_of_the_clean_image():
    t = torch.tensor([1.0, 0.5, 0.05])
    weight = flow.clean_image_weight(t)
    assert weight[:2].tolist() == [1, 1]  # up to max(t^2, 0.02): as a velocity is weighted
    assert weight[2].item() == pytest.approx(0.05**2 / 0.02)
