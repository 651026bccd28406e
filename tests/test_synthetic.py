"""Synthetic scenes: radiometry, determinism, and what makes the infrared hard to guess."""

import numpy as np
import pytest

from data.materials import CLASS_NAMES, MATERIALS, TABLES
from data.radiometry import WINDOW_K, band_radiance, band_temperature, to_unit, to_window
from data.synthetic import render_scene

CLASS = {name: i for i, name in enumerate(CLASS_NAMES["synthetic"])}


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(3, i, 64) for i in range(40)]


def ranks(values):
    return np.argsort(np.argsort(values.ravel(), kind="stable"), kind="stable").astype(float)


def psnr(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


def test_band_radiance_is_planck_s_integral():
    """Against a plain midpoint sum over wavelength in SI units."""
    h, c, k = 6.62607015e-34, 299792458.0, 1.380649e-23
    edges = np.linspace(8e-6, 14e-6, 20001)
    w, step = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    for kelvin in (230.0, 300.0, 341.7):
        planck = 2 * h * c**2 / w**5 / np.expm1(h * c / (w * k * kelvin))
        assert abs(band_radiance(kelvin) / (planck.sum() * step) - 1) < 1e-5


def test_temperature_inverts_radiance_and_the_window_has_the_ends_it_names():
    kelvin = np.linspace(200, 400, 77)
    np.testing.assert_allclose(band_temperature(band_radiance(kelvin)), kelvin, rtol=1e-7)
    np.testing.assert_allclose(to_window(band_radiance(np.array(WINDOW_K))), [0, 1], atol=1e-6)
    assert to_window(band_radiance(200.0)) == 0 and to_window(band_radiance(400.0)) == 1


def test_scenes_have_the_promised_shapes_and_ranges():
    scene = render_scene(0, 5, (48, 80))
    assert scene.visible.shape == (48, 80, 3) and scene.visible.dtype == np.float32
    for name in ("infrared", "temperature_k", "emissivity", "environment"):
        plane = getattr(scene, name)
        assert plane.shape == (48, 80) and plane.dtype == np.float32 and np.isfinite(plane).all()
    assert scene.semantic.dtype == scene.material.dtype == np.uint8
    for image in (scene.visible, scene.infrared):
        assert image.min() >= 0 and image.max() <= 1
    assert scene.temperature_k.min() > 210 and scene.temperature_k.max() < 360
    assert scene.name == "synthetic-0-000005"


def test_infrared_equals_the_rendering_equation(scenes):
    for s in scenes:
        radiance = (
            s.emissivity * to_unit(band_radiance(s.temperature_k))
            + (1 - s.emissivity) * s.environment
        )
        np.testing.assert_allclose(np.clip(radiance, 0, 1), s.infrared, atol=1e-4)


def test_material_and_emissivity_follow_the_class(scenes):
    prior = np.array([m.emissivity for m in MATERIALS])
    for s in scenes:
        np.testing.assert_array_equal(s.material, TABLES["synthetic"][s.semantic])
        inside = np.ones(s.material.shape, bool)  # pixels whose neighbours are the same thing
        inside[[0, -1]] = inside[:, [0, -1]] = False
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                inside &= np.roll(s.material, (dy, dx), (0, 1)) == s.material
        error = np.abs(s.emissivity - prior[s.material])[inside]
        assert np.quantile(error, 0.85) < 1e-6  # a thin edge can hide between two samples
        assert error.mean() < 0.01


def test_a_scene_depends_on_nothing_but_seed_and_index():
    first = render_scene(7, 11, 32)
    np.random.seed(0)
    render_scene(7, 12, 32)
    for a, b in zip(first, render_scene(7, 11, 32)):
        np.testing.assert_array_equal(a, b)


def test_different_indexes_and_seeds_are_different_scenes():
    images = [render_scene(s, i, 32) for s, i in [(0, 0), (0, 1), (1, 0), (0, 1000), (1000, 0)]]
    for i, a in enumerate(images):
        for b in images[:i]:
            assert np.abs(a.visible - b.visible).mean() > 0.02
            assert np.abs(a.infrared - b.infrared).mean() > 0.005
            assert a.name != b.name


def test_a_scene_is_the_same_street_at_every_size():
    for index in range(6):
        large, small = render_scene(0, index, 128), render_scene(0, index, 64)
        assert large.night == small.night and large.name == small.name
        assert (large.semantic[::2, ::2] == small.semantic).mean() > 0.85
        halved = large.infrared.reshape(64, 2, 64, 2).mean((1, 3))
        assert psnr(halved, small.infrared) > 25


def test_days_and_nights_and_most_classes_occur(scenes):
    nights = [s.night for s in scenes]
    assert 8 <= sum(nights) <= 30
    bright = [s.visible.mean() for s in scenes]
    day = min(b for b, n in zip(bright, nights) if not n)
    night = max(b for b, n in zip(bright, nights) if n)
    assert night < day
    seen = np.unique(np.concatenate([s.semantic.ravel() for s in scenes]))
    assert len(seen) == len(CLASS)


def mean_of(scene, name, plane="infrared"):
    mask = scene.semantic == CLASS[name]
    return getattr(scene, plane)[mask].mean() if mask.sum() >= 8 else np.nan


def test_heat_is_where_physics_puts_it(scenes):
    def difference(a, b, night=None):
        chosen = [s for s in scenes if night is None or s.night == night]
        return np.nanmean([mean_of(s, a) - mean_of(s, b) for s in chosen])

    assert difference("skin", "clothing") > 0.03  # clothes hide body heat
    assert difference("skin", "road", night=True) > 0.1  # people glow at night
    assert difference("skin", "sky") > 0.3  # the sky is cold
    assert difference("brick wall", "window") > 0.02  # panes reflect it
    assert difference("road", "steelwork") > 0.05  # bare metal too
    assert difference("road", "grass", night=True) > 0.02  # grass cools faster than a road
    for warm_by_day, warm_by_night in (
        ("grass", "tree crown"),
        ("pavement", "water"),
        ("soil", "concrete wall"),
    ):
        assert difference(warm_by_day, warm_by_night, night=False) > 0.01
        assert difference(warm_by_night, warm_by_day, night=True) > 0.01


def test_paint_on_the_road_does_not_show_in_the_infrared(scenes):
    contrasts = {"visible": [], "infrared": []}
    for s in scenes:
        paint, road = s.semantic == CLASS["road marking"], s.semantic == CLASS["road"]
        near = np.arange(64)[:, None] > 40
        if min((paint & near).sum(), (road & near).sum()) < 20 or s.night:
            continue
        contrasts["visible"].append(s.visible[paint & near].mean() - s.visible[road & near].mean())
        contrasts["infrared"].append(
            s.infrared[paint & near].mean() - s.infrared[road & near].mean()
        )
    assert len(contrasts["visible"]) >= 5
    assert np.mean(contrasts["visible"]) > 0.15
    assert abs(np.mean(contrasts["infrared"])) < 0.03


def test_infrared_cannot_be_guessed_from_grey_or_from_the_mean_scene(scenes):
    grey = [s.visible.mean(-1) for s in scenes]
    infrared = np.stack([s.infrared for s in scenes])
    correlations = [np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in zip(grey, infrared)]
    assert np.mean(np.abs(correlations)) < 0.6
    assert np.mean([psnr(a, b) for a, b in zip(grey, infrared)]) < 15
    assert np.mean([psnr(1 - a, b) for a, b in zip(grey, infrared)]) < 15
    assert np.mean([psnr(infrared.mean(0), b) for b in infrared]) < 18.5


def test_bad_sizes_and_seeds_are_refused():
    with pytest.raises(ValueError, match="got 8 x 64"):
        render_scene(0, 0, (8, 64))
    with pytest.raises(ValueError, match="got 0 and -1"):
        render_scene(0, -1, 32)
