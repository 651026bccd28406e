"""Windows and their inverse, augmentation, resizing, and the tensors of a sample."""

import numpy as np
import pytest
import torch

from data import transforms as tf

RNG = np.random.default_rng(0)

RGB = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)

COUNTS = RNG.integers(0, 65536, (12, 16), dtype=np.uint16)


@pytest.mark.parametrize("window", [(0.0, 65535.0), (13366.0, 15865.0), (-40.0, 70000.0)])
def test_window_and_its_inverse_restore_counts_exactly(window):
    low, high = max(0, int(window[0])), min(65535, int(window[1]))
    counts = np.arange(low, high + 1, dtype=np.uint16)
    made = tf.make_window(*window)
    values = made.normalise(counts)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1
    assert np.abs(made.restore(values) - counts).max() < 0.01
    restored = made.restore(torch.from_numpy(values))
    assert np.array_equal(np.rint(restored.numpy()).astype(np.uint16), counts)


def test_window_clips_what_lies_outside():
    assert tf.make_window(10, 20).normalise(np.array([0, 10, 15, 20, 99])).tolist() == [
        0,
        0,
        0.5,
        1,
        1,
    ]


@pytest.mark.parametrize("low, high", [(1, 1), (2, 1), (0, float("nan")), (0, float("inf"))])
def test_window_without_extent_is_refused(low, high):
    with pytest.raises(ValueError, match="low < high"):
        tf.make_window(low, high)


def test_sizes_that_differ_are_named():
    with pytest.raises(ValueError, match="16 x 12.*infrared is 12 x 16"):
        tf.make_pair(RGB, COUNTS.T, None, "row 3")


def make_pair():
    position = np.arange(40 * 60).reshape(40, 60)
    visible = np.stack([position % 256] * 3, axis=2).astype(np.uint8)
    return tf.Pair(visible, position.astype(np.uint16), (position % 251).astype(np.uint8))


def test_augmentation_moves_all_images_alike():
    cfg = tf.AugmentConfig(flip=0.5, crop_scale=[0.4, 1.0], brightness=0, contrast=0)
    flipped, sides = set(), []
    for seed in range(20):
        pair = tf.augment(make_pair(), cfg, np.random.default_rng(seed))
        assert np.array_equal(pair.visible[:, :, 0], pair.infrared % 256)
        assert np.array_equal(pair.semantic, pair.infrared % 251)
        flipped.add(bool(pair.infrared[0, 0] > pair.infrared[0, -1]))
        height, width = pair.infrared.shape
        sides.append(height)
        assert abs(width / height - 1.5) < 0.1
    assert flipped == {True, False} and 16 <= min(sides) < 22 and 34 < max(sides) <= 40


def test_exposure_changes_the_visible_only():
    cfg = tf.AugmentConfig(flip=0, crop_scale=[1.0, 1.0], brightness=0.5, contrast=0.5)
    pair = tf.augment(make_pair(), cfg, np.random.default_rng(1))
    assert np.array_equal(pair.infrared, make_pair().infrared)
    assert not np.array_equal(pair.visible, make_pair().visible)


def test_one_option_leaves_the_randomness_of_the_others():
    plain = tf.AugmentConfig(flip=0, brightness=0, contrast=0)
    other = tf.AugmentConfig(flip=1, brightness=0.3, contrast=0.3)
    a = tf.augment(make_pair(), plain, np.random.default_rng(7))
    b = tf.augment(make_pair(), other, np.random.default_rng(7))
    assert np.array_equal(a.infrared, b.infrared[:, ::-1])


@pytest.mark.parametrize(
    "options",
    [{"crop_scale": [0.0, 1.0]}, {"crop_scale": [1.0, 0.5]}, {"flip": 2.0}, {"contrast": -0.1}],
)
def test_augmentation_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError):
        tf.AugmentConfig(**options)


def test_resizing_to_the_same_size_changes_nothing():
    pair = make_pair()
    same = tf.resize(pair, (40, 60))
    assert all(a is b for a, b in zip(pair, same))


def test_resizing_keeps_16_bit_steps_and_does_not_mix_class_ids():
    infrared = np.repeat(np.arange(30000, 30040, dtype=np.uint16)[:, None], 60, axis=1)
    ids = np.where(np.arange(60) % 3 == 0, 200, 0).astype(np.uint8)[None].repeat(40, axis=0)
    pair = tf.resize(make_pair()._replace(infrared=infrared, semantic=ids), (20, 30))
    assert pair.infrared.dtype == np.float32
    # each output row is the antialiased mean around two input rows
    assert np.abs(pair.infrared[2:-2, 0] - np.arange(30004.5, 30036, 2)).max() < 0.01
    assert set(np.unique(pair.semantic)) == {0, 200}
    assert pair.visible.shape == (20, 30, 3)


def test_tensors_have_the_shapes_and_ranges_of_the_contract():
    sample = tf.to_tensors(make_pair(), tf.make_window(0, 2399))
    assert sample["visible"].shape == sample["infrared"].shape == (3, 40, 60)
    assert sample["visible"].dtype == sample["infrared"].dtype == torch.float32
    assert sample["infrared"].min() == 0 and sample["infrared"].max() == 1
    assert torch.equal(sample["infrared"][0], sample["infrared"][2])
    assert sample["semantic"].dtype == torch.int64 and sample["semantic"].shape == (40, 60)
    unlabelled = tf.to_tensors(make_pair()._replace(semantic=None), None)
    assert (unlabelled["semantic"] == 255).all()
    assert unlabelled["infrared"].min() == 0 and unlabelled["infrared"].max() == 1
