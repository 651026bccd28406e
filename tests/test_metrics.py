"""Metrics against closed forms, and what they refuse.

pytest tests/test_metrics.py
"""

import math
import urllib.error
from itertools import pairwise

import pytest
import torch
import torchvision

from utils import metrics
from utils.metrics import ConfusionMatrix

IMAGE_METRICS = [
    metrics.psnr,
    metrics.ssim,
    metrics.mae,
    metrics.pearson,
    metrics.rank_correlation,
    metrics.edge_sharpness,
]


def images(count=2, size=16, seed=0):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_every_metric_is_per_image_and_leaves_its_arguments_alone(metric):
    a, b = images(seed=0), images(seed=1)
    before = a.clone(), b.clone()
    together = metric(a, b)
    assert together.shape == (2,) and together.dtype == torch.float32
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone)
    assert together[0] != together[1]
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("metric", IMAGE_METRICS)
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x[:, 0], "expected two images of shape"),
        (lambda x: x.expand(-1, 3, -1, -1), "expected two images of shape"),
        (lambda x: x * 255, r"must be in \[0, 1\]"),
        (lambda x: x - 0.5, r"must be in \[0, 1\]"),
        (lambda x: x * float("nan"), r"must be in \[0, 1\]"),
    ],
)
def test_every_metric_refuses_other_shapes_and_ranges(metric, change, said):
    good = images()
    for a, b in ((change(good), good), (good, change(good))):
        with pytest.raises(ValueError, match=said):
            metric(a, b)


def test_psnr_and_mae_of_a_constant_offset_are_known():
    a = images() * 0.5
    torch.testing.assert_close(metrics.psnr(a + 0.1, a), torch.full((2,), 20.0))
    torch.testing.assert_close(metrics.mae(a + 0.1, a), torch.full((2,), 0.1))
    assert metrics.psnr(a, a).isinf().all()


@pytest.fixture
def random_alexnet(monkeypatch):
    """LPIPS with AlexNet's weights drawn, not fetched."""
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)


def test_lpips_sees_three_equal_channels_in_minus_one_to_one(random_alexnet):
    lpips, (a, b) = metrics.Lpips(), (images(size=64), images(size=64, seed=5))
    before, seen = (a.clone(), b.clone()), []
    lpips.metric.net.register_forward_pre_hook(lambda net, args: seen.append(args))
    assert torch.equal(lpips(a, a), torch.zeros(2))
    values = lpips(a, b)
    assert values.shape == (2,) and (values > 0).all()
    torch.testing.assert_close(values, lpips(b, a))
    torch.testing.assert_close(values[1:], lpips(a[1:], b[1:]))  # no memory of what was before
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    shown = lpips.metric.net(a.expand(-1, 3, -1, -1) * 2 - 1, b.expand(-1, 3, -1, -1) * 2 - 1)
    torch.testing.assert_close(values, shown.flatten())
    with pytest.raises(ValueError, match="LPIPS needs sides of 64"):
        lpips(images(size=32), images(size=32))


def test_lpips_without_weights_says_what_to_leave_out(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"AlexNet cannot be fetched .*no route.*--lpips"):
        metrics.Lpips()


def test_ssim_is_one_for_equal_images_and_low_for_noise():
    a = images(size=32)
    torch.testing.assert_close(metrics.ssim(a, a), torch.ones(2))
    assert (metrics.ssim(a, images(size=32, seed=5)) < 0.2).all()
    with pytest.raises(ValueError, match="sides of 11 or more"):
        metrics.ssim(images(size=8), images(size=8))


def test_pearson_ignores_gain_and_offset_and_keeps_the_sign():
    a = images()
    torch.testing.assert_close(metrics.pearson(0.5 * a + 0.2, a), torch.ones(2))
    torch.testing.assert_close(metrics.pearson(1 - a, a), -torch.ones(2))
    assert (metrics.pearson(a**4, a) < 0.95).all()


def test_rank_correlation_ignores_every_monotone_change():
    a = images()
    torch.testing.assert_close(metrics.rank_correlation(a**4, a), torch.ones(2))
    torch.testing.assert_close(metrics.rank_correlation(1 - a**4, a), -torch.ones(2))


def test_rank_correlation_shares_the_ranks_of_ties():
    # ranks 1.5 1.5 3 4 against 1 2 3.5 3.5: rho = 0.8333 by hand
    a = torch.tensor([0.1, 0.1, 0.5, 0.9]).view(1, 1, 2, 2)
    b = torch.tensor([0.0, 0.3, 0.7, 0.7]).view(1, 1, 2, 2)
    ra, rb = torch.tensor([1.5, 1.5, 3, 4]), torch.tensor([1, 2, 3.5, 3.5])
    expected = torch.corrcoef(torch.stack([ra, rb]))[0, 1]
    torch.testing.assert_close(metrics.rank_correlation(a, b)[0], expected)


def test_edge_sharpness_ignores_gain_and_offset_and_keeps_the_sign():
    a = images()
    torch.testing.assert_close(metrics.edge_sharpness(0.3 * a + 0.2, a), torch.ones(2))
    torch.testing.assert_close(metrics.edge_sharpness(1 - a, a), -torch.ones(2))


def test_edge_sharpness_of_a_ramp_is_the_slope_at_the_step():
    """A step spread over 4 pixels has a quarter of the slope; both have a known deviation."""
    step = torch.tensor([0.0] * 8 + [1.0] * 8).expand(1, 1, 16, 16)
    ramp = torch.tensor([0.0] * 6 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 6).expand(1, 1, 16, 16)
    expected = 0.25 * 0.5 / ramp.std(correction=0)
    # 15 of 225 differences are the step, the others of the tenth are flat and count nothing
    torch.testing.assert_close(metrics.edge_sharpness(ramp, step)[0], expected)


def test_edge_sharpness_leaves_out_what_is_not_an_edge():
    """Ripples of a sixteenth of the step cover half the image; the step is as steep without."""
    step = torch.tensor([0.0] * 8 + [0.8] * 8).expand(1, 1, 16, 16)
    ripples = torch.tensor([0.0, 0.05] * 4 + [0.0] * 8)
    assert metrics.edge_sharpness(step, step + ripples) > 0.95  # over all pixels it would be 0.7


def test_edge_sharpness_falls_with_blur_and_is_not_raised_by_noise():
    coarse = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    a = coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    blurred = [
        torch.nn.functional.avg_pool2d(a, n, 1, n // 2, count_include_pad=False) for n in (3, 5, 7)
    ]
    found = [metrics.edge_sharpness(x, a) for x in (a, *blurred)]
    assert all((more < less - 0.05).all() for less, more in pairwise(found))
    noisy = (blurred[1] + 0.2 * images(size=64, seed=3) - 0.1).clamp(0, 1)
    assert (metrics.edge_sharpness(noisy, a) < found[2] + 0.02).all()
    assert metrics.edge_sharpness(images(size=64, seed=4), a).abs().max() < 0.15
    with pytest.raises(ValueError, match="sides of 2 or more"):
        metrics.edge_sharpness(images(size=1), images(size=1))


@pytest.mark.parametrize(
    "metric", [metrics.pearson, metrics.rank_correlation, metrics.edge_sharpness]
)
def test_correlation_with_a_constant_image_is_zero(metric):
    assert torch.equal(metric(torch.full((2, 1, 16, 16), 0.3), images()), torch.zeros(2))
    assert torch.equal(metric(images(), torch.full((2, 1, 16, 16), 0.1)), torch.zeros(2))


def test_accuracy_and_miou_leave_out_the_unlabelled_and_the_absent():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([[[0, 0, 1, 3]]]), torch.tensor([[[0, 1, 1, 255]]]))
    matrix.update(torch.tensor([[[1, 1, 0, 2]]]), torch.tensor([[[1, 1, 0, 255]]]))
    result = matrix.result()
    assert result["accuracy"] == pytest.approx(5 / 6)
    assert result["miou"] == pytest.approx((2 / 3 + 3 / 4) / 2)  # classes 2 and 3 are absent


def test_a_confusion_matrix_without_labels_is_nan():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), 255))
    assert all(math.isnan(value) for value in matrix.result().values())


def test_a_confusion_matrix_refuses_shapes_and_ids():
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match="shapes differ"):
        matrix.update(torch.zeros(1, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"0\.\.1 or 255, got 0\.\.2"):
        matrix.update(torch.zeros(1, 2).long(), torch.tensor([[2, 0]]))
