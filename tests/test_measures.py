"""Metrics against second implementations, planted faults, boxes, and bootstrap intervals.

pytest tests/test_measures.py
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from assembly import features
from utils import alignment, bootstrap, metrics, objects
from utils.objects import Box, Boxes


def scenes(count=3, size=64, seed=0, blur=2):
    """Smooth images in [0, 1]: (count, 1, size, size)."""
    x = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    for _ in range(blur):
        x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="circular"), 5, 1)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low)


# agreement


def test_psnr_and_ssim_are_those_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = scenes(seed=1), (scenes(seed=1) + 0.2 * scenes(seed=2)).clamp(0, 1)
    for i in range(len(a)):
        x, y = a[i, 0].double().numpy(), b[i, 0].double().numpy()
        other = skimage.peak_signal_noise_ratio(y, x, data_range=1.0)
        assert metrics.psnr(a[i : i + 1], b[i : i + 1]).item() == pytest.approx(other, abs=1e-4)
        x, y = (np.pad(z, 5, mode="reflect") for z in (x, y))  # ours mirrors, it leaves out borders
        other = skimage.structural_similarity(
            x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert metrics.ssim(a[i : i + 1], b[i : i + 1]).item() == pytest.approx(other, abs=1e-4)


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    a, b = (scenes(seed=1) * 20).round() / 20, scenes(seed=2)  # with ties
    for x, y, found in zip(a, b, metrics.rank_correlation(a, b)):
        other = stats.spearmanr(x.flatten(), y.flatten()).statistic
        assert found.item() == pytest.approx(other, abs=1e-4)


def test_ms_ssim_follows_its_formula():
    """Written down once more, from Wang et al. 2003, with scipy's filter."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    a, b = scenes(2, 192, 1), (scenes(2, 192, 1) + 0.3 * scenes(2, 192, 2)).clamp(0, 1)

    def terms(x, y):
        def blur(z):
            return ndimage.gaussian_filter(z, 1.5, truncate=3.5, mode="mirror")

        mx, my = blur(x), blur(y)
        xx, yy, xy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        contrast = (2 * xy + 0.03**2) / (xx + yy + 0.03**2)
        light = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        return contrast[5:-5, 5:-5].mean(), (light * contrast).mean()

    for i in range(2):
        x, y, product = a[i, 0].double().numpy(), b[i, 0].double().numpy(), 1.0
        for scale, power in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            product *= terms(x, y)[scale == 4] ** power
            x, y = (z.reshape(len(z) // 2, 2, -1, 2).mean((1, 3)) for z in (x, y))
        assert metrics.ms_ssim(a, b)[i].item() == pytest.approx(product, abs=1e-4)
    with pytest.raises(ValueError, match="161 or more"):
        metrics.ms_ssim(scenes(), scenes())


def test_the_kernel_distance_is_the_one_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 30)), rng.normal(0.3, 1.2, size=(12, 30))
    found = features.kernel_distance(a, b)
    other = poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert found == pytest.approx(other, rel=1e-6)
    once = features.kernel_distance(a, b, np.ones((1, 12)))
    assert once[0] == pytest.approx(found)


def test_a_resample_of_equal_sets_is_no_distance():
    """Were an image compared with its own double, sets of one distribution would seem nearer."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 80, 10))
    spread = features.kernel_distance(a, b, bootstrap.weights(80))
    assert abs(spread.mean() - features.kernel_distance(a, b)) < 0.1 * spread.std()


# hot spots


def test_hot_spots_overlap_as_counted_by_hand():
    true, seen = torch.zeros(2, 1, 20, 20), torch.zeros(2, 1, 20, 20)
    true[:, :, :4, :5] = 1.0  # 20 of 400 pixels
    seen[0, :, :4, :5] = 0.3  # at another level
    seen[1, :, 2:6, :5] = 0.3  # half of it: 10 of 30
    assert metrics.hot_spot_iou(seen, true).tolist() == pytest.approx([1.0, 1 / 3])
    assert metrics.hot_spot_iou(torch.zeros(2, 1, 20, 20), true).tolist() == [0.0, 0.0]


# displacement


@pytest.mark.parametrize("shift", [(2.0, 0.0), (0.0, -2.0), (1.5, 0.5), (-0.3, 3.25), (0.0, 0.0)])
def test_a_planted_displacement_is_found(shift):
    true = scenes(3, 96)
    f = torch.fft.fftfreq(96, dtype=torch.float64)
    phase = torch.exp(-2j * torch.pi * (f * shift[0] + f[:, None] * shift[1]))
    moved = torch.fft.ifft2(torch.fft.fft2(true.double()) * phase).real
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    for seen in (moved, 0.2 + 0.5 * blurred, 1 - moved):  # gain, blur and inversion do not matter
        found = alignment.displacement(seen, true)
        torch.testing.assert_close(found, torch.tensor([shift] * 3), atol=0.3, rtol=0)


def test_an_image_without_edges_has_no_displacement():
    assert alignment.displacement(torch.full((1, 1, 32, 32), 0.5), scenes(1, 32)).isnan().all()


# objects


def test_a_warm_object_is_measured_against_its_ring():
    true = torch.full((40, 40), 0.2)
    true[10:20, 10:20] = 0.8
    true[10:20, 22:30] = 0.9  # a neighbour, which must not count as surroundings
    boxes = [Box("person", 0.25, 0.25, 0.5, 0.5), Box("car", 0.55, 0.25, 0.75, 0.5)]
    seen = torch.full((40, 40), 0.4)
    seen[10:20, 10:20] = 0.7
    person, car = objects.contrasts(seen, true, boxes)
    assert person["true_contrast"] == pytest.approx(0.6)
    assert person["contrast"] == pytest.approx(0.3) and person["auc"] == 1.0
    assert car["contrast"] == pytest.approx(0.0) and car["auc"] == 0.5
    assert objects.contrasts(1 - seen, true, boxes)[0]["auc"] == 0.0
    assert objects.contrasts(1 - seen, 1 - true, boxes)[0]["auc"] == 1.0  # colder, as in truth
    assert objects.contrasts(seen, true, [Box("person", 0.5, 0.5, 0.51, 0.9)]) == []


def test_the_area_under_the_curve_counts_pairs():
    rng = np.random.default_rng(0)
    inside, outside = (torch.from_numpy(rng.integers(0, 9, n) / 9) for n in (20, 30))
    pairs = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside)
    assert objects.area_under_curve(inside, outside) == pytest.approx(pairs.mean().item())


def test_boxes_are_read_by_source_and_name_and_stay_in_their_folder(tmp_path):
    (tmp_path / "boxes" / "b").mkdir(parents=True)
    (tmp_path / "boxes_classes.txt").write_text("0 person\n1 bicycle\n")
    (tmp_path / "boxes" / "x.txt").write_text("0 0.5 0.5 0.2 0.4\n\n7 0.1 0.1 0.1 0.1\n")
    (tmp_path / "boxes" / "b" / "x.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    (tmp_path / "secret.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    boxes = Boxes(tmp_path / "boxes")
    assert [box.kind for box in boxes.of("a", "x")] == ["person", "class 7"]
    assert boxes.of("a", "x")[0][1:] == pytest.approx((0.4, 0.3, 0.6, 0.7))
    assert [box.kind for box in boxes.of("b", "x")] == ["bicycle"]
    assert boxes.of("a", "other") == [] and boxes.of("a", "../secret") == []
    for line in ("0 0.5 0.5", "0 0.5 0.5 0 0.4", "0 0.5 x 0.2 0.4", "0 150 80 20 20"):
        (tmp_path / "boxes" / "bad.txt").write_text(line)
        with pytest.raises(ValueError, match=r"bad\.txt, line 1: not a box"):
            boxes.of("a", "bad")
    with pytest.raises(ValueError, match="is not a folder"):
        Boxes(tmp_path / "missing")


def test_real_people_are_warmer_than_their_surroundings(real_data):
    """Boxes, their classes and the infrared belong together, upright and unshifted."""
    boxes, found = Boxes(real_data / "msrs" / "boxes"), []
    for path in sorted((real_data / "msrs" / "infrared").glob("*.png"))[::20]:
        image = torch.from_numpy(np.asarray(Image.open(path).convert("L"), np.float32) / 255)
        found += objects.contrasts(image, image, boxes.of("msrs", path.stem))
    people = [x for x in found if x["kind"] == "person"]
    assert len(people) > 10 and {x["kind"] for x in found} <= {"person", "bicycle", "car"}
    assert np.mean([x["true_contrast"] > 0 for x in people]) > 0.9
    assert np.mean([x["auc"] for x in people]) > 0.8
    assert all(x["contrast"] == x["true_contrast"] for x in found)


def test_day_and_night_are_read_from_names_and_folders():
    assert objects.light_of("msrs", "00004N") == "night"
    assert objects.light_of("msrs", "00111D") == "day"
    assert objects.light_of("llvip_night", "010001") == "night"
    assert objects.light_of("set", "day/3") == "day"
    assert objects.light_of("yesterday", "FLIR0800") == ""


# intervals


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    w = bootstrap.weights(60, 400)
    for _ in range(200):
        x = rng.normal(1.0, 2.0, 60)
        low, high = bootstrap.interval(bootstrap.means(x, np.ones(60), w))
        held += low <= 1.0 <= high
    assert 0.9 <= held / 200 <= 0.98


def test_things_of_images_are_averaged_over_things():
    sums, counts = np.array([3.0, 0.0, 1.0]), np.array([3.0, 0.0, 2.0])
    assert bootstrap.mean(sums, counts) == pytest.approx(4 / 5)
    found = bootstrap.means(sums, counts, np.array([[3.0, 0, 0], [0, 3, 0], [1, 1, 1]]))
    assert found.tolist() == pytest.approx([1.0, 4 / 5])  # the second drew nothing that counts
    assert np.isnan(bootstrap.interval(found[:0])).all()


@pytest.mark.parametrize(
    "low_high, higher, said",
    [
        ([0.1, 0.2], True, "ahead"),
        ([0.1, 0.2], False, "behind"),
        ([-0.2, -0.1], False, "ahead"),
        ([-0.1, 0.1], True, "cannot be told"),
    ],
)
def test_a_difference_is_ahead_behind_or_cannot_be_told(low_high, higher, said):
    assert bootstrap.verdict(low_high, higher) == said


# features


@pytest.fixture(scope="module")
def network():
    try:
        return features.ImageFeatures()
    except ValueError as error:
        pytest.skip(str(error))


def test_what_looks_less_alike_is_farther_in_features(network):
    true = scenes(3, 64)
    maps = network(true)
    assert features.distance(maps, maps).tolist() == [0, 0, 0]
    near, far = (
        features.distance(network((true + a * (scenes(3, 64, 9, 0) - 0.5)).clamp(0, 1)), maps)
        for a in (0.05, 0.5)
    )
    assert (near > 0).all() and (near < far).all() and (far < 4).all()
    assert features.pooled(maps).shape == (3, 352)
    assert not any(p.requires_grad for p in network.net.parameters())


def test_features_do_not_depend_on_the_batch(network):
    true = scenes(3, 64)
    together, alone = network(true), network(true[1:2])
    for x, y in zip(together, alone):
        torch.testing.assert_close(x[1:2], y, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="32 or more"):
        network(scenes(1, 24))
