"""What generated infrared is good for: scores against hand-made examples, and a toy run to the end.

pytest tests/test_downstream.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from assembly import downstream
from assembly.downstream import Recipe, leak, recipes, worth
from assembly.downstream_tasks import DetectorTask, SegmenterTask, Truth
from data.pairs import DataConfig, open_pairs
from data.pseudo_labels import LabelConfig
from tests import tiny_data
from tests.conftest import call_main
from utils import bootstrap
from utils.objects import Boxes
from utils.run import entry
from utils.task_metrics import Detections, DetectionScores, SegmentationScores

ONE = np.ones((1, 2))


def detections(*rows):
    """Rows of left, top, right, bottom, score, class."""
    x = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(x[:, :4], x[:, 4], x[:, 5].long())


def two_images():
    """Three true boxes of class 1, one of class 2, which nothing finds."""
    scores = DetectionScores(2)
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 10]])
    found = detections(
        [0, 0, 10, 10, 0.9, 1],  # a hit
        [0, 0, 10, 10, 0.8, 1],  # the same box again: no hit
        [20, 0, 30, 6, 0.7, 1],  # overlaps by 0.6: a hit up to that
    )
    scores.add(found, truth[:2], torch.tensor([1, 1]))
    scores.add(detections(), torch.cat([truth[2:], truth[2:]]), torch.tensor([1, 2]))
    return scores


def test_average_precision_is_the_one_computed_by_hand():
    """Recall 1/3 at precision 1, then 2/3 at 2/3: of 101 recalls 34 and 33 lie below these.

    At overlaps above 0.6 only the first; class 2 is never found and has AP 0."""
    low, high = (34 + 33 * 2 / 3) / 101, 34 / 101
    found = two_images().draws(ONE)
    assert found["AP50"][0] == pytest.approx(low / 2)
    assert found["mAP"][0] == pytest.approx((3 * low + 7 * high) / 10 / 2)


def test_an_image_that_is_drawn_twice_counts_as_two():
    twice = DetectionScores(2)
    twice.rows = [two_images().rows[i] for i in (0, 0, 1)]
    drawn = two_images().draws(np.array([[2.0, 1.0], [1.0, 1.0], [2.0, 0.0]]))
    once = twice.draws(np.ones((1, 3)))
    for name in DetectionScores.METRICS:
        assert drawn[name][0] == pytest.approx(once[name][0])
    # without the second image there is no box of class 2: a mean over class 1 alone
    assert drawn["AP50"][2] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert np.isnan(two_images().draws(np.zeros((1, 2)))["mAP"]).all()


def test_average_precision_is_that_of_pycocotools():
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from torchmetrics.detection import MeanAveragePrecision

    g = torch.Generator().manual_seed(0)
    own, theirs = DetectionScores(3), MeanAveragePrecision()
    for _ in range(12):
        corner = torch.rand(6, 2, generator=g) * 80
        truth = torch.cat([corner, corner + 5 + 40 * torch.rand(6, 2, generator=g)], 1)
        kinds = torch.randint(1, 4, (6,), generator=g)
        near = truth.repeat(3, 1) + 4 * torch.randn(18, 4, generator=g)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        labels = torch.where(torch.rand(18, generator=g) < 0.8, kinds.repeat(3), 1)
        score = torch.rand(18, generator=g)
        own.add(Detections(near, score, labels), truth, kinds)
        predicted = {"boxes": near, "scores": score, "labels": labels}
        theirs.update([predicted], [{"boxes": truth, "labels": kinds}])
    found, wanted = own.draws(np.ones((1, 12))), theirs.compute()
    assert 0.1 < wanted["map"] < 0.9
    assert found["mAP"][0] == pytest.approx(wanted["map"].item(), abs=1e-5)
    assert found["AP50"][0] == pytest.approx(wanted["map_50"].item(), abs=1e-5)


def test_miou_is_over_all_pixels_of_the_labelled_classes():
    scores = SegmentationScores(4)
    scores.add(torch.tensor([[0, 0], [1, 3]]), torch.tensor([[0, 0], [0, 255]]))
    scores.add(torch.tensor([[1, 1]]), torch.tensor([[1, 0]]))
    found = scores.draws(ONE)
    assert found["mIoU"][0] == pytest.approx((2 / 4 + 1 / 3) / 2)  # class 3 is labelled nowhere
    assert found["accuracy"][0] == pytest.approx(3 / 5)
    assert scores.draws(np.array([[1.0, 0.0]]))["mIoU"][0] == pytest.approx(2 / 3)


def test_half_of_every_batch_is_real_and_only_of_the_pairs_that_count():
    images = {
        "real": torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1),
        "mean": torch.arange(100, 116, dtype=torch.uint8).view(8, 2, 1, 1),
    }
    stream = downstream.batches(Recipe("", 2, "mean"), images, 5, seed=0)
    drawn = [next(stream) for _ in range(60)]
    real = {int(i) for pixels, _, _ in drawn for i in pixels[:3].flatten() if i < 100}
    made = {int(i) for pixels, _, _ in drawn for i in pixels[3:].flatten()}
    assert len(real) == 2 and made == set(range(100, 116))  # every sample of every photograph
    for pixels, indices, _ in drawn:
        assert pixels.shape == (5, 1, 1, 1) and (pixels[:3] < 100).all()
        assert pixels[:3].flatten().tolist() == indices[:3]
        assert ((pixels[3:].flatten() - 100) // 2).tolist() == indices[3:]
    alone = next(downstream.batches(Recipe("", 0, "mean"), images, 5, 0))
    assert len(alone[0]) == 5 and (alone[0] >= 100).all()


def test_recipes_have_every_kind_alone_and_few_real_pairs_with_and_without():
    made = recipes(["grey", "mean"], "mean", 16, [0.25, 0.5])
    assert [(r.real, r.generated) for r in made] == [
        (16, None),
        (0, "grey"),
        (0, "mean"),
        (4, None),
        (8, None),
        (4, "mean"),
        (8, "mean"),
        (16, "mean"),
    ]


def test_generated_images_are_worth_the_real_pairs_that_reach_their_score():
    points = [{"real": n, "value": v} for n, v in ((4, 0.2), (8, 0.4), (16, 0.5))]
    assert worth(points, 0.3) == pytest.approx(6) and worth(points, 0.5) == pytest.approx(16)
    assert worth(points, 0.1) == 4 and worth(points, 0.6) is None


def test_a_verdict_needs_every_seed():
    def segmented(right):  # ten images; of each the first `right` pixels of four are right
        scores = SegmentationScores(2)
        for _ in range(10):
            target = torch.tensor([[0, 0, 1, 1]])
            predicted = target.clone()
            predicted[0, right:] = 1 - predicted[0, right:]
            scores.add(predicted, target)
        return scores

    made = [Recipe("real", 8, None), Recipe("grey", 0, "grey"), Recipe("mean", 0, "mean")]
    found = {
        "real": [segmented(right) for right in (4, 4, 4, 4, 2)],
        "grey": [segmented(1) for _ in range(5)],
        "mean": [segmented(right) for right in (2, 2, 2, 2, 3)],  # better with the last seed
    }
    summary = downstream.summarise(made, found, 10)
    assert summary["order"] == ["real", "mean", "grey"]
    against = summary["differences"]["real"]
    assert against["grey"]["verdict"] == bootstrap.AHEAD
    assert against["mean"]["interval"][0] > 0 and against["mean"]["verdict"] == bootstrap.UNKNOWN
    assert summary["differences"]["grey"]["mean"]["verdict"] == bootstrap.BEHIND


# whole runs

SIZE = "data.size=32"
TOY = ["--device", "cpu", "--num_workers", "0", "--train_steps", "1", "--train_batch", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny U-Net on synthetic scenes, and boxes for them."""
    folder = tmp_path_factory.mktemp("downstream")
    options = [SIZE, "data.num_workers=0", "training.steps=1", "model.width=4", "model.levels=2"]
    options += ["data.synthetic_scenes={train: 4, val: 5, test: 3}", "training.mixed_precision=no"]
    call_main("baselines.unet", *options, "--device", "cpu", "--output_dir", folder / "run")
    (folder / "boxes").mkdir()
    (folder / "boxes" / "classes.txt").write_text("person\nbicycle\ncar\n")
    data = DataConfig(size=32, synthetic_scenes={"train": 4, "val": 5, "test": 3})
    for name in (name for split in ("val", "test") for name in open_pairs(data, split).names):
        (folder / "boxes" / f"{name}.txt").write_text("0 0.5 0.5 0.3 0.5\n1 0.2 0.2 0.2 0.2\n")
    return folder


def call(folder, out, *more):
    argv = ["--checkpoint", folder / "run", "--output_dir", out, *TOY, *more]
    call_main("downstream", *argv)
    return json.loads((out / "results.json").read_text())


def test_a_toy_run_writes_tables_and_curves_twice_the_same(trained, tmp_path, capsys):
    few = ["--boxes", trained / "boxes", "seeds=[1]", "shares=[0.5]"]
    a = call(trained, tmp_path / "a", *few)
    text = (tmp_path / "a" / "results.md").read_text()
    assert text in capsys.readouterr().out
    b = call(trained, tmp_path / "b", *few, "--task", "segmenter", "shares=[]")
    for name, again in b["tasks"]["segmenter"]["rows"].items():
        assert a["tasks"]["segmenter"]["rows"][name] == again
    assert list(a["tasks"]) == ["detector", "segmenter"]
    assert a["seen_by_generator"] == 0 and (a["train_pairs"], a["test_images"]) == (5, 3)
    rows = ["real", "grey", "inverted grey", "U-Net", "2 real", "2 real + U-Net", "real + U-Net"]
    for name, metric in (("detector", "mAP"), ("segmenter", "mIoU")):
        task = a["tasks"][name]
        assert list(task["rows"]) == rows and sorted(task["order"]) == sorted(rows)
        assert task["metric"] == metric and len(task["rows"]["grey"][metric]["seeds"]) == 1
        assert [p["real"] for p in task["curve"]["without"]] == [2, 5]
        assert [p["real"] for p in task["curve"]["with"]] == [0, 2, 5]
        assert f"## {name}" in text and f"order by {metric}: " in text
    assert (tmp_path / "a" / "detector.png").stat().st_size > 1000
    assert "the generator was trained on none of the 5" in text


def test_pairs_that_the_generator_was_trained_on_are_called_a_leak(tmp_path):
    columns = tiny_data.rows(10, split=tiny_data.by_tens)
    other = tiny_data.rows(6, first=6, split=lambda i: "val")  # 6, 7: train; 8: val; 9: test
    for name, own in (("a", columns), ("b", other)):
        tiny_data.write(tmp_path / name / f"{name}.parquet", own)
    plain = LabelConfig(material_source="none")
    a, b = (DataConfig(path=str(tmp_path / x), size=16, labels=plain) for x in "ab")
    opened = SimpleNamespace(data=a)
    assert leak(opened, open_pairs(a, "train"), 0)[0] == 8
    assert leak(opened, open_pairs(a, "train"), 3)[0] == 3
    seen, text = leak(opened, open_pairs(a, "val"), 0)
    assert seen == 0 and "among which its best checkpoint was chosen" in text
    seen, text = leak(opened, open_pairs(b, "val"), 0)
    assert seen == 2 and text.startswith("LEAK: the generator was trained on 2 of the 6 training")
    gone = SimpleNamespace(data=DataConfig(path=str(tmp_path / "gone"), size=16))
    seen, text = leak(gone, open_pairs(b, "val"), 0)
    assert seen is None and "is not known" in text


def refused(trained, tmp_path, *more):
    with pytest.raises(ValueError) as caught:
        call(trained, tmp_path, *more)
    return str(caught.value)


def test_what_cannot_be_learnt_is_one_sentence(trained, tmp_path):
    assert "detector needs boxes: there is no folder" in refused(
        trained, tmp_path, "--task", "detector"
    )
    (tmp_path / "boxes").mkdir()
    text = refused(trained, tmp_path, "--boxes", tmp_path / "boxes")
    assert text.startswith("the detector needs boxes: no training image has one of person or car")
    text = refused(trained, tmp_path, "--split", "val")
    assert text.endswith("training on val and testing on val would share images")
    text = refused(trained, tmp_path, "seeds=[]", "shares=[2.0]", "train_steps=0")
    assert text.startswith("3 things are wrong:")
    tiny_data.write(tmp_path / "set" / "a.parquet", tiny_data.rows(4, split=lambda i: "test"))
    text = refused(trained, tmp_path, "--test_data", tmp_path / "set")
    assert "no pair in split 'val'" in text
    split = tiny_data.rows(6, split=lambda i: ("val", "test")[i % 2])
    tiny_data.write(tmp_path / "bare" / "a.parquet", split)
    text = refused(trained, tmp_path, "--test_data", tmp_path / "bare")
    assert text.startswith("there is nothing to learn: no folder of boxes")


def truth(labels):
    return Truth([("", "a")], torch.as_tensor(labels, dtype=torch.uint8).view(1, 1, -1))


def test_a_segmenter_needs_labels_and_two_classes():
    with pytest.raises(ValueError, match="no training image has a material"):
        SegmenterTask(truth([255, 255]), truth([1, 2]))
    with pytest.raises(ValueError, match="no test image has a material"):
        SegmenterTask(truth([1, 2]), truth([255, 255]))
    with pytest.raises(ValueError, match="two materials .* show only material 3"):
        SegmenterTask(truth([3, 255]), truth([1, 2]))


def test_boxes_are_clipped_and_small_or_foreign_ones_left_out(tmp_path):
    (tmp_path / "classes.txt").write_text("person\nbicycle\ncar\n")
    (tmp_path / "a.txt").write_text(
        "0 0.0 0.5 0.5 1.0\n1 0.5 0.5 0.5 0.5\n2 0.5 0.5 0.01 0.5\n2 0.75 0.5 0.5 0.5\n"
    )
    one = Truth([("", "a")], torch.zeros(1, 40, 80, dtype=torch.uint8))
    boxes, kinds = DetectorTask(Boxes(tmp_path), ["person", "car"], one, one).train[0]
    assert boxes.tolist() == [[0, 0, 20, 40], [40, 10, 80, 30]] and kinds.tolist() == [1, 2]


def test_both_models_learn_what_they_are_shown(tmp_path):
    """Bright squares on dark ground, mirrored or not: found, and told from it."""
    (tmp_path / "classes.txt").write_text("person\n")
    images, labels = torch.zeros(8, 1, 32, 32, dtype=torch.uint8), torch.zeros(8, 32, 32)
    for i in range(8):
        x, y = 2 + 2 * i, 14 - i
        images[i, 0, y : y + 12, x : x + 12] = 255
        labels[i, y : y + 12, x : x + 12] = 1
        (tmp_path / f"{i}.txt").write_text(f"0 {(x + 6) / 32} {(y + 6) / 32} 0.375 0.375\n")
    own = Truth([("", str(i)) for i in range(8)], labels.byte())
    detector = DetectorTask(Boxes(tmp_path), ["person"], own, own)
    for task, steps, metric, least in (
        (SegmenterTask(own, own), 30, "mIoU", 0.6),
        (detector, 60, "AP50", 0.5),
    ):
        stream = downstream.batches(Recipe("real", 8, None), {"real": images}, 4, seed=0)
        model = downstream.train(task, stream, steps, 3e-3, 0, torch.device("cpu"))
        with torch.no_grad():
            found = task.scores(model, images, 4).draws(np.ones((1, 8)))[metric][0]
        assert found > least, (task.name, found)


def test_an_error_is_one_line_and_ends_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        entry(lambda: call_main("downstream", "--checkpoint", tmp_path, "--device", "cpu"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no checkpoint at") and error.count("\n") == 1
