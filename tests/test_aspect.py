"""Images of several aspects: cut, never squashed unasked; batches of one shape; exact order."""

import json
import math

import numpy as np
import pytest
import torch

from assembly import checkpoints
from configs.schema import PretrainConfig
from data.aspect import BucketOrder, bucket_shapes, nearest_shape, same_area
from data.pairs import DataConfig, LabelConfig, open_pairs
from data.stored_sizes import stored_sizes
from data.stream import in_step, sequential, stream
from data.transforms import AugmentConfig, Pair, augment, crop_centre, largest_window
from tests import tiny_data as tiny
from tests.conftest import call_main
from utils import config

SIZES = [(24, 32)] * 7 + [(32, 24)] * 5 + [(24, 24)] * 4 + [(20, 60)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A parquet file of pairs of four aspects, all in every split."""
    columns: dict[str, list] = {"visible": [], "infrared": [], "name": [], "split": []}
    for split in ("train", "val", "test"):
        for i, size in enumerate(SIZES):
            number = i + 100 * ("train", "val", "test").index(split)
            columns["visible"].append(tiny.png(tiny.visible(number, size)))
            columns["infrared"].append(tiny.png(tiny.infrared(number, size)))
            columns["name"].append(f"pair_{number:04d}")
            columns["split"].append(split)
    return str(tiny.write(tmp_path_factory.mktemp("mixed") / "pairs.parquet", columns))


def opened(path, split="train", **changes):
    labels = LabelConfig(material_source="none")
    return open_pairs(
        DataConfig(path=path, size=64, labels=labels, num_workers=0, **changes), split
    )


# ---- one image


def test_a_crop_of_the_aspect_that_is_there_already_is_the_whole_image():
    for shape, size in [((480, 640), (192, 256)), ((33, 33), (64, 64)), ((1080, 1920), (144, 256))]:
        assert largest_window(shape, size) == shape
    assert largest_window((480, 640), (64, 64)) == (480, 480)
    assert largest_window((1000, 100), (16, 32)) == (50, 100)
    assert largest_window((1, 5000), (64, 16)) == (1, 1)


def ramp(height: int, width: int) -> Pair:
    """Red counts rows, green columns, infrared both: a pixel says where it was."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    visible = np.stack([rows, columns, rows], axis=2)
    return Pair(visible, rows * np.uint16(256) + columns, rows)


def test_training_cuts_a_random_part_without_changing_its_aspect():
    cfg = AugmentConfig(flip=0, crop_scale=[0.5, 1.0], brightness=0, contrast=0)
    places, sides = set(), set()
    for seed in range(40):
        pair = augment(ramp(60, 120), cfg, np.random.default_rng(seed), (32, 32))
        rows, columns = pair.visible[..., 0].astype(float), pair.visible[..., 1].astype(float)
        down, right = np.ptp(rows), np.ptp(columns)
        assert abs(down - right) <= 2 and 28 <= down <= 59  # a square stays a square
        places.add(round(columns.min()))
        sides.add(round(down))
    assert min(places) < 15 and max(places) > 55 and len(sides) > 10


def test_training_without_a_crop_takes_the_middle_as_evaluation_does():
    cfg = AugmentConfig(flip=0, crop_scale=[1, 1], brightness=0, contrast=0)
    middle = crop_centre(ramp(61, 120), (32, 32))
    assert middle.infrared.shape == (61, 61) and middle.visible[0, 0, 1] == 29
    pair = augment(ramp(61, 120), cfg, np.random.default_rng(0), (61, 61))
    assert np.array_equal(pair.infrared, middle.infrared)
    assert np.array_equal(pair.semantic, middle.semantic)


def test_squash_and_crop_are_equal_where_the_aspect_fits():
    cfg = AugmentConfig()
    for seed in range(5):
        first, second = (
            augment(ramp(48, 64), cfg, np.random.default_rng(seed), (24, 32), squash)
            for squash in (True, False)
        )
        assert all(np.array_equal(a, b) for a, b in zip(first, second))


def test_what_is_shown_is_round_where_the_scene_is(tmp_path):
    """A disc in a 2 : 1 photograph is as wide as it is high, but where squashing was asked for."""
    y, x = np.mgrid[:60, :120]
    disc = np.where((y - 30) ** 2 + (x - 60) ** 2 < 400, 255, 0).astype(np.uint8)
    columns = {
        "visible": [tiny.png(np.stack([disc] * 3, axis=2))] * 3,
        "infrared": [tiny.png(disc)] * 3,
        "name": list("abc"),
        "split": ["train", "val", "test"],
    }
    path = str(tiny.write(tmp_path / "disc.parquet", columns))
    ratios = {}
    for aspect in ("crop", "buckets", "squash"):
        seen = opened(path, "val", aspect=aspect, window=[0, 255])[0]["infrared"][0] > 0.5
        ratios[aspect] = seen.any(0).sum().item() / seen.any(1).sum().item()
    assert ratios["crop"] == pytest.approx(1, abs=0.06)
    assert ratios["buckets"] == pytest.approx(1, abs=0.06)
    assert ratios["squash"] == pytest.approx(0.5, abs=0.06)


# ---- shapes


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (512, 640), (64, 64)])
def test_bucket_shapes_have_about_the_pixels_of_the_size(size):
    shapes = bucket_shapes(size)
    assert shapes[0] == size and len(shapes) == len(set(shapes)) <= 17
    for height, width in shapes:
        assert height % 16 == width % 16 == 0
        within = 1.15 if min(size) > 64 else 1.7
        assert 1 / within < height * width / (size[0] * size[1]) <= within
    for stored in [(480, 640), (512, 640), (1080, 1920), (3024, 4032), (4032, 3024), (300, 300)]:
        height, width = nearest_shape(shapes, stored)
        cut = largest_window(stored, (height, width))
        kept = cut[0] * cut[1] / (stored[0] * stored[1])
        assert kept > (0.9 if min(size) > 64 else 0.75), (stored, (height, width))


def test_same_area_keeps_the_number_of_pixels():
    assert same_area((64, 64), 1.0) == (64, 64)
    assert same_area((512, 512), 3 / 4) == (448, 592)
    assert math.prod(same_area((64, 64), 1 / 50)) <= 64 * 64 * 2


# ---- order

SHAPES = [(64, 64)] * 9 + [(48, 80)] * 13 + [(80, 48)] * 3 + [(112, 32)]


@pytest.mark.parametrize("batch", [1, 4, 7, 26, 60])
def test_every_image_is_drawn_once_an_epoch_in_batches_of_one_shape(batch):
    n, order = len(SHAPES), BucketOrder(SHAPES, 3, batch)
    drawn = [order.draws(i) for i in range(-(-6 * n // batch))]
    for draws in drawn:
        assert len(draws) == batch and len({draw.shape for draw in draws}) == 1
        assert draws[0].shape in [SHAPES[draw.item] for draw in draws]
    flat = [draw for draws in drawn for draw in draws]
    epochs = len(flat) // n
    assert len({draw.position for draw in flat}) == len(flat)  # no position twice
    # positions of whole windows are complete, and a position is the item that it always is
    dealt = sorted(draw.position for draw in flat)
    assert dealt[: (epochs - 2) * n] == list(range((epochs - 2) * n)) or batch > n
    for draw in flat:
        epoch, place = divmod(draw.position, n)
        assert draw.item == np.random.default_rng([3, epoch]).permutation(n)[place]
    if batch < n:  # most keep their own shape; the rest is what fills no batch
        own = sum(draw.shape == SHAPES[draw.item] for draw in flat) / len(flat)
        assert own > (0.99 if batch == 1 else 0.4)


def test_ranks_share_a_shape_and_see_what_one_process_would_see(mixed):
    pairs = opened(mixed, aspect="buckets", augment=AugmentConfig())
    whole = stream(pairs, 4, seed=1)
    ranks = [stream(pairs, 2, seed=1, rank=r, world_size=2) for r in (0, 1)]
    shapes = set()
    for _ in range(9):
        one, parts = next(whole), [next(r) for r in ranks]
        assert one["draw"] == parts[0]["draw"] + parts[1]["draw"]
        assert torch.equal(one["visible"], torch.cat([p["visible"] for p in parts]))
        shapes.add(tuple(one["visible"].shape[-2:]))
    assert len(shapes) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_at_the_exact_batch(mixed, workers):
    pairs = opened(mixed, aspect="buckets", augment=AugmentConfig())
    whole = stream(pairs, 3, seed=2)
    batches = [next(whole) for _ in range(12)]
    for first in (1, 5, 6, 11):  # within an epoch of 17 pairs and across its end
        resumed = next(stream(pairs, 3, seed=2, first=first, num_workers=workers))
        assert resumed["draw"] == batches[first]["draw"]
        assert torch.equal(resumed["infrared"], batches[first]["infrared"])


def test_held_out_pairs_come_once_each_in_batches_of_one_shape(mixed):
    pairs = opened(mixed, "val", aspect="buckets")
    found = [b for r in (0, 1, 2) for b in sequential(pairs, 4, r, 3)]
    assert sorted(i for b in found for i in b["draw"]) == list(range(len(SIZES)))
    assert len({tuple(b["visible"].shape[-2:]) for b in found}) == 4
    in_steps = [list(in_step(pairs, 4, r, 3)) for r in (0, 1, 2)]
    assert len({len(batches) for batches in in_steps}) == 1  # as many passes on every rank
    counted = [i for batches in in_steps for b in batches if not b["filler"] for i in b["draw"]]
    assert sorted(counted) == list(range(len(SIZES)))


def test_sizes_are_read_from_columns_of_prepared_sets_and_else_from_headers(mixed, tmp_path):
    found = opened(mixed, aspect="buckets")
    assert not stored_sizes(found.source.rows) and found.source.sizes() == SIZES
    names = [f"p{i}" for i in range(20)]
    tiny.folders(tmp_path / "raw", names, size=(24, 40))
    folders = [arg for k in ("visible", "infrared") for arg in (f"--{k}", tmp_path / "raw" / k)]
    call_main("prepare", *folders, "--out", tmp_path / "set")
    pairs = opened(str(tmp_path / "set"), aspect="buckets")
    assert len(stored_sizes(pairs.source.rows)) == 20
    assert set(pairs.source.sizes()) == {(24, 40)}


def test_latents_of_buckets_are_refused():
    with pytest.raises(ValueError, match="data.latents holds each pair in one shape"):
        change = AugmentConfig(crop_scale=[1, 1], brightness=0, contrast=0)
        DataConfig(latents="x", aspect="buckets", augment=change)


# ---- from end to end


def test_all_stages_work_on_images_of_several_aspects(mixed, tmp_path):
    common = ["--data_path", mixed, "data.size=32", "data.aspect=buckets", "--device", "cpu"]
    common += ["data.labels.material_source=none", "data.num_workers=0", "training.batch_size=4"]
    common += ["training.steps=3", "training.eval_every=3", "run.images=2"]
    pre, run = tmp_path / "pre", tmp_path / "run"
    values = ["--config", "configs/demo/pretrain.yaml", "model.width=8"]
    call_main("pretrain", *values, *common, "--output_dir", pre)
    values = ["--config", "configs/demo/train.yaml", "sampling.steps=1", "model.discriminator=true"]
    values += ["flow.adversarial_weight=0.1", f"--decomposition_checkpoint={pre}/best_model.pth"]
    call_main("train", *values, *common, "--output_dir", run)
    use = ["--checkpoint", run, "--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
    call_main("evaluate", *use, "--output_dir", tmp_path / "results", "--report")
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert found["pairs"] == len(SIZES)
    assert found["protocol"]["frozen"]["resize"].endswith("aspect kept")
    assert {"training mean", "mean", "sample"} <= set(found["methods"])
    squashed = ["--output_dir", tmp_path / "squashed", "--aspect", "squash"]
    call_main("evaluate", *use, *squashed)
    other = json.loads((tmp_path / "squashed" / "results.json").read_text())
    assert "aspect not kept" in other["protocol"]["frozen"]["resize"]
    assert other["protocol"]["id"] != found["protocol"]["id"]


def test_a_checkpoint_from_before_there_was_a_choice_is_one_that_squashes(monkeypatch, tmp_path):
    raw = config.to_dict(PretrainConfig())
    del raw["data"]["aspect"]
    (tmp_path / "old.pth").touch()
    monkeypatch.setattr(checkpoints.checkpoint, "load", lambda path: {"config": raw, "model": {}})
    monkeypatch.setattr(checkpoints.checkpoint, "damaged", lambda path: None)
    assert checkpoints.read(tmp_path / "old.pth")[0].data.aspect == "squash"
    assert DataConfig().aspect == "crop"
