"""Where the images fail, calibration of samples: planted errors are found where they were put.

pytest tests/test_atlas.py
"""

import json

import numpy as np
import pytest
import torch

from assembly import atlas, scoring
from assembly.atlas import Atlas
from assembly.rows import Row
from assembly.scoring import Scorer
from data.label_sets import CLASSES
from tests.test_measures import scenes
from utils import bootstrap, calibration
from utils.objects import Boxes

CPU = torch.device("cpu")
IDS = {name: i for i, (name, _) in enumerate(CLASSES["synthetic"])}


def batch_of(semantic, visible=0.5, names=None):
    count, H, W = semantic.shape
    return {
        "visible": torch.full((count, 3, H, W), visible),
        "semantic": semantic,
        "name": names or [f"scene {i}" for i in range(count)],
        "source": ["set"] * count,
        "draw": list(range(count)),
        "filler": False,
    }


def summary_of(image, true, batch, where):
    rows = [
        {"index": i, "method": "ours", **row}
        for i, own in enumerate(atlas.errors(image, true, where.masks(batch)))
        for row in own
    ]
    return atlas.summarise(rows, list(range(len(image))), where.not_measured)


# categories


def test_a_planted_error_is_in_the_row_of_what_it_was_planted_on():
    semantic = torch.full((3, 32, 32), IDS["road"])
    semantic[:, :8] = IDS["sky"]
    semantic[:2, 14:20, 12:18] = IDS["clothing"]
    semantic[0, 26:32, 26:32] = IDS["car window"]  # glass, and of a vehicle
    true = torch.full((3, 1, 32, 32), 0.3)
    true[:2, :, 14:20, 12:18] = 0.7
    image = true.clone()
    image[:, :, :8] += 0.2  # a sky that is too warm
    image[:2, :, 14:20, 12:18] = 0.4  # people a quarter as warm as they are
    found = summary_of(image, true, batch_of(semantic), Atlas("synthetic", None))
    told = {name: (x["images"], x["methods"]["ours"]) for name, x in found["told"].items()}
    assert list(told) == ["everywhere", "people", "vehicles", "sky", "glass"]
    assert told["sky"][1]["mae"] == pytest.approx(0.2) == told["sky"][1]["bias"]
    assert told["people"][0] == 2 and found["told"]["people"]["pixels"] == 72
    assert told["people"][1]["bias"] == pytest.approx(-0.3)
    assert told["people"][1]["contrast_ratio"] == pytest.approx(0.25)
    assert told["glass"] == told["vehicles"] and told["glass"][1]["mae"] == pytest.approx(0)
    everywhere = told["everywhere"][1]
    assert everywhere["mae"] == pytest.approx((image - true).abs().mean().item())
    assert "contrast_ratio" not in everywhere  # nothing is around it
    assert set(found["untold"]) == {"vegetation", "water", "night", "glare"}


def test_a_region_counts_by_its_pixels_and_its_interval_is_over_images():
    semantic = torch.full((9, 32, 32), IDS["road"])
    true = torch.full((9, 1, 32, 32), 0.5)
    image = true.clone()
    for i in range(9):
        semantic[i, : i + 2] = IDS["sky"]
        image[i, :, : i + 2] += 0.01 * (i + 2)
    own = summary_of(image, true, batch_of(semantic), Atlas("synthetic", None))
    own = own["told"]["sky"]["methods"]["ours"]
    pixels, error = 32 * np.arange(2.0, 11), 0.01 * np.arange(2, 11)
    assert own["mae"] == pytest.approx((pixels * error).sum() / pixels.sum())
    draws = bootstrap.means(pixels * error, pixels, bootstrap.weights(9))
    assert own["mae_interval"] == pytest.approx(bootstrap.interval(draws))


def test_night_is_told_by_name_or_darkness_and_glare_by_blown_out_pixels():
    names = ["00001D", "00002N", "a", "b"]
    batch = batch_of(torch.full((4, 16, 16), 255), 0.1, names)
    batch["visible"][1] = batch["visible"][3] = 0.6
    batch["visible"][3, :, :4, :5] = 1.0
    batch["visible"][3, :2, 8:12, :5] = 1.0  # yellow is a colour, not glare
    masks = Atlas(None, None).masks(batch)
    assert masks["night"].flatten(1).all(1).tolist() == [False, True, True, False]
    assert masks["glare"].flatten(1).sum(1).tolist() == [0, 0, 0, 20]


def test_what_data_cannot_tell_is_named_with_the_reason(tmp_path):
    (tmp_path / "classes.txt").write_text("Person\ntree\n")
    (tmp_path / "scene 0.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.1 0.1\n")
    nothing, boxed = Atlas(None, None), Atlas(None, Boxes(tmp_path))
    assert list(nothing.not_measured) == list(atlas.CATEGORIES)
    assert nothing.not_measured["sky"] == "there are no class maps, there are no annotated boxes"
    assert (
        "people" not in boxed.not_measured
        and "annotated boxes have no class" in boxed.not_measured["vehicles"]
    )
    people = boxed.masks(batch_of(torch.full((2, 16, 16), 255)))["people"]
    assert people[0].sum() == 64 and not people[1].any()
    of_msrs = Atlas("msrs", None)
    assert set(of_msrs.ids) == {"people", "vehicles"}
    assert "'msrs' has no class for it" in of_msrs.not_measured["glass"]
    text = atlas.sentences({"untold": of_msrs.not_measured})
    assert text[0].startswith("not measured: sky ('msrs' has no class for it")


def test_the_night_of_msrs_is_dark_and_its_day_is_not(real_data):
    from PIL import Image

    light = {"D": [], "N": []}
    for path in sorted((real_data / "msrs" / "visible").glob("*.png"))[::15]:
        image = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), np.float32) / 255)
        batch = batch_of(torch.full((1, *image.shape[:2]), 255))
        batch["visible"] = image.permute(2, 0, 1)[None]
        light[path.stem[5]].append(Atlas(None, None).masks(batch)["night"].all().item())
    assert np.mean(light["N"]) > 0.9 and np.mean(light["D"]) < 0.2


def test_the_worst_image_of_a_category_is_the_one_with_the_largest_error_there():
    rows = [
        {"index": i, "method": m, "category": c, "mae": x}
        for i, m, c, x in (
            (0, "ours", "sky", 0.1),
            (1, "ours", "sky", 0.4),
            (2, "other", "sky", 0.9),
            (0, "ours", "people", 0.2),
        )
    ]
    worst = atlas.worst(rows, "ours")
    assert list(worst) == ["people", "sky"] and worst["sky"]["index"] == 1


# calibration


def test_a_sparsification_curve_is_the_one_counted_by_hand():
    error = torch.tensor([4.0, 3.0, 2.0, 1.0] * 5).view(1, 1, 4, 5)
    order = torch.tensor([1.0, 2.0, 3.0, 4.0] * 5).view(1, 1, 4, 5)  # the wrong way round
    curve, oracle = calibration.sparsification(order, error)
    assert oracle[0, [0, 5, 10, 15]].tolist() == pytest.approx([1, 0.8, 0.6, 0.4])
    assert curve[0, [0, 5, 10, 15]].tolist() == pytest.approx([1, 1.2, 1.4, 1.6])
    assert calibration.areas(oracle, oracle)["ause"].item() == 0
    found = calibration.areas(curve, oracle)
    assert found["ause"] > found["ause_random"] > 0


def test_a_deviation_that_says_nothing_is_as_good_as_a_random_order():
    error = scenes(2, 32)
    flat, oracle = calibration.sparsification(torch.full_like(error, 0.1), error)
    assert torch.allclose(flat, torch.ones_like(flat))
    found = calibration.areas(flat, oracle)
    assert torch.allclose(found["ause"], found["ause_random"])
    none, _ = calibration.sparsification(error, torch.zeros_like(error))
    assert not none.any()


def scored(true, samples, indices, monkeypatch):
    """The scorers of two ranks, of which each sees some of the images in batches of two."""
    scorers, shares = [], []
    row = Row("ours", lambda batch: samples[batch["draw"]])
    for own in indices:
        scorer = Scorer((32, 32), CPU, where=Atlas("synthetic", None))
        for i in range(0, len(own), 2):
            draw = own[i : i + 2]
            semantic = torch.full((len(draw), 32, 32), IDS["road"])
            semantic[:, :9] = IDS["sky"]
            batch = batch_of(semantic, names=[f"scene {x}" for x in draw])
            scorer.score([row], {**batch, "draw": draw, "infrared": true[draw]})
        scorers.append(scorer)
        shares.append(((scorer.found, scorer.times), scorer.surfaces))
    gathered = iter(zip(*shares))  # result() gathers the measures, then the sums of surfaces
    monkeypatch.setattr(scoring.dist, "gather", lambda _: list(next(gathered)))
    return scorers[0].result()


def test_curves_and_regions_are_the_same_on_one_rank_and_on_two(monkeypatch):
    true = scenes(5, 32)
    noise = torch.rand(5, 4, 32, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    noise[..., :16] *= 0.1  # the samples agree, and are right, in the left half
    samples = (true + 0.4 * noise).clamp(0, 1)
    one = scored(true, samples, [list(range(5))], monkeypatch)
    two = scored(true, samples, [[0, 2, 4], [1, 3]], monkeypatch)
    assert one.curves == two.curves and one.regions == two.regions
    assert json.dumps(calibration.means(one.curves)) == json.dumps(calibration.means(two.curves))
    row = one.images[0]
    assert 0 < row["ause"] < 0.5 * row["ause_random"]
    (text,) = calibration.sentences({"ours": row})
    assert text.startswith("uncertainty of ours: AUSE 0.")
