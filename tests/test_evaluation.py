"""The table of evaluate.py: planted faults are called out, equal inputs give equal bytes.

pytest tests/test_evaluation.py
"""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from assembly import peers, report
from assembly.rows import Row
from assembly.scoring import Found, Scorer, uncertainty
from tests import tiny_data
from tests.conftest import ROOT, call_main
from tests.test_measures import scenes
from utils import metrics, page, results
from utils.objects import Boxes

CPU = torch.device("cpu")


def batches(true, names=None):
    names = names or [f"{i:05d}{'DN'[i % 2]}" for i in range(len(true))]
    for i in range(0, len(true), 2):
        own = names[i : i + 2]
        yield {
            "infrared": true[i : i + 2].expand(-1, 3, -1, -1),
            "draw": list(range(i, i + len(own))),
            "name": own,
            "source": ["set"] * len(own),
            "filler": False,
        }


def summarised(true, boxes=None, **images):
    """The summary of rows whose images are given as (N, n, H, W)."""
    rows = [Row(n, lambda batch, x=x: x[batch["draw"]], n != "plain") for n, x in images.items()]
    scorer = Scorer(tuple(true.shape[-2:]), CPU, boxes)
    for batch in batches(true):
        scorer.score(rows, batch)
    found = scorer.result()
    own = [row.name for row in rows if row.of_model]
    return results.summarise(found.images, found.boxes, own, found.displacement), found


def test_a_planted_shift_is_reported_within_a_third_of_a_pixel():
    true = scenes(6, 64)
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(7)) - 0.5
    noisy = (true + 0.2 * noise).clamp(0, 1)
    moved = noisy.roll(2, dims=-1)
    found, _ = summarised(true, ours=moved, plain=noisy)
    assert found["displacement"]["ours"]["x"] == pytest.approx(2.0, abs=0.3)
    assert found["displacement"]["ours"]["y"] == pytest.approx(0.0, abs=0.3)
    (text,) = found["warnings"]
    assert (
        re.match(r"the edges of ours lie (1\.[89]|2\.[012]) px", text)
        and " px right of and 0." in text
    )
    assert summarised(true, ours=noisy)[0]["warnings"] == []


def test_images_that_share_nothing_are_not_called_displaced():
    assert summarised(scenes(6, 64), ours=scenes(6, 64, seed=5))[0]["warnings"] == []


def test_a_planted_inversion_is_called_out_in_words():
    true = scenes(6, 64)
    found, _ = summarised(true, ours=1 - true, plain=1 - true)
    (text,) = found["warnings"]  # one: of the model's row alone
    assert text.startswith("ours looks INVERTED: its rank correlation with the truth is -1.00")


def test_paired_differences_see_what_intervals_side_by_side_do_not():
    """Images differ far more than methods do; on the same images the better one is seen."""
    true = scenes(8, 64)
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(3)) - 0.5
    strength = torch.linspace(0.05, 0.6, 8).view(-1, 1, 1, 1)
    plain, ours = (
        (true + noise * strength).clamp(0, 1),
        (true + 0.95 * noise * strength).clamp(0, 1),
    )
    found, _ = summarised(true, plain=plain, ours=ours)
    low, high = found["intervals"]["ours"]["mae"]
    assert low < found["methods"]["plain"]["mae"] < high
    against = found["differences"]["ours"]["plain"]
    assert against["mae"]["verdict"] == against["psnr"]["verdict"] == "ahead"
    equal = summarised(true, plain=plain, ours=plain)[0]["differences"]["ours"]["plain"]
    assert {x["verdict"] for x in equal.values()} == {"cannot be told"}


def test_objects_are_averaged_over_boxes_and_split_by_class_and_light(tmp_path):
    true = torch.full((2, 1, 64, 64), 0.2)
    true[:, :, 20:30, 20:30] = 0.8
    true[0, :, 40:50, 40:50] = 0.8
    (tmp_path / "classes.txt").write_text("person\ncar\n")
    (tmp_path / "00000D.txt").write_text(
        "0 0.390625 0.390625 0.15625 0.15625\n1 0.703125 0.703125 0.15625 0.15625\n"
    )
    (tmp_path / "00001N.txt").write_text("0 0.390625 0.390625 0.15625 0.15625\n")
    seen = true.clone()
    seen[0, :, 40:50, 40:50] = 0.1  # the car is colder
    seen[1, :, 20:30, 20:30] = 0.5  # half of the contrast
    found, measured = summarised(true, Boxes(tmp_path), ours=seen)
    groups = {name: own["ours"] for name, own in found["objects"].items()}
    assert groups["all"]["boxes"] == 3 and groups["all"]["sign"] == pytest.approx(2 / 3)
    assert groups["person"]["ratio"] == pytest.approx(0.75)
    assert groups["person, night"]["ratio"] == pytest.approx(0.5)
    assert groups["car, day"]["sign"] == groups["car"]["warmer"] == 0
    assert groups["day"]["boxes"] == 2 and groups["night"]["boxes"] == 1
    assert found["methods"]["ours"]["object_sign"] == pytest.approx(2 / 3)
    assert len(measured.boxes) == 3


def test_uncertainty_of_samples_is_that_of_pixels():
    samples, true = torch.zeros(1, 2, 32, 32), torch.zeros(1, 1, 32, 32)
    samples[:, 1, :16] = 0.4  # two samples that differ by 0.4: deviation 0.283, error 0.2
    found = uncertainty(samples, true)
    assert found["spread"].item() == pytest.approx(0.4 / 2**0.5 / 2)
    assert found["spread_rank"].item() == pytest.approx(1.0)
    summary, _ = summarised(
        scenes(4, 64), ours=scenes(8, 64, 2).view(4, 2, 64, 64), plain=scenes(4, 64)
    )
    assert summary["methods"]["ours"]["spread"] > 0 and "spread" not in summary["methods"]["plain"]


def test_few_images_are_not_judged():
    found, _ = summarised(scenes(7, 64), plain=scenes(7, 64, 5), ours=scenes(7, 64))
    verdicts = {x["verdict"] for x in found["differences"]["ours"]["plain"].values()}
    assert verdicts == {"cannot be told"}


def test_tables_hold_what_the_summary_says():
    summary, found = summarised(scenes(8, 64), plain=scenes(8, 64, 5), ours=scenes(8, 64))
    text = "\n".join(results.table(summary, {"ours": 0.25}))
    assert text.count("\n") == 3 and "| 0.25 |" in text and "PSNR dB" in text
    assert summary["methods"]["ours"]["psnr"] == float("inf")
    assert json.dumps(results.finite(summary), allow_nan=False)
    assert "ahead" in "\n".join(results.verdict_table(summary, "ours"))
    assert len(results.as_csv(found.images).splitlines()) == 17


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """One tiny U-Net, evaluated twice on one rank and once on two."""
    folder = tmp_path_factory.mktemp("evaluated")
    train = ["data.size=64", "data.num_workers=0", "training.steps=2", "model.width=4"]
    train += ["data.synthetic_scenes={train: 6, val: 2, test: 5}", "training.mixed_precision=no"]
    train += ["model.levels=2", "--device", "cpu", "--output_dir", folder / "run"]
    call_main("baselines.unet", *train)
    evaluate = ["--checkpoint", folder / "run", "--batch_size", "2"]
    evaluate += ["--device", "cpu", "--num_workers", "0", "--output_dir"]
    for name in "ab":
        call_main("evaluate", *evaluate, folder / name)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "evaluate.py", *map(str, evaluate), str(folder / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_evaluating_twice_gives_the_same_bytes(evaluated):
    for file in ("per_image.csv", "per_region.csv"):
        a, b = ((evaluated / x / file).read_bytes() for x in "ab")
        assert a == b
    a, b = (json.loads((evaluated / x / "results.json").read_text()) for x in "ab")
    assert a.pop("run") and b.pop("run") and a == b
    assert list(a["protocol"]) == [
        "id",
        "frozen",
        "checkpoint_hash",
        "seeds",
        "bootstrap",
        "sampler",
    ]


def test_two_ranks_give_the_table_of_one(evaluated):
    one, two = (json.loads((evaluated / x / "results.json").read_text()) for x in ("a", "two"))
    assert one["pairs"] == two["pairs"] == 5 and one["protocol"] == two["protocol"]
    for method, values in one["methods"].items():
        assert two["methods"][method] == pytest.approx(values, rel=1e-4, abs=1e-5)
    told = [x["failures"]["told"] for x in (one, two)]
    assert list(told[0]) == list(told[1]) and "sky" in told[0]
    for name, own in told[0].items():
        assert own["pixels"] == told[1][name]["pixels"]
        for method, values in own["methods"].items():
            found = told[1][name]["methods"][method]
            assert found["mae"] == pytest.approx(values["mae"], rel=1e-4, abs=1e-5)
    rows = [(evaluated / x / "per_image.csv").read_text().splitlines() for x in ("a", "two")]
    assert [r.split(",")[:3] for r in rows[0]] == [r.split(",")[:3] for r in rows[1]]


def test_the_protocol_changes_with_the_pairs(evaluated, tmp_path):
    limited = ["--limit", "3", "--device", "cpu", "--num_workers", "0", "--output_dir", tmp_path]
    call_main("evaluate", "--checkpoint", evaluated / "run", *limited)
    few, all_ = (
        json.loads((folder / "results.json").read_text())["protocol"]
        for folder in (tmp_path, evaluated / "a")
    )
    assert few["id"] != all_["id"] and few["checkpoint_hash"] == all_["checkpoint_hash"]
    assert few["frozen"]["split_hash"] != all_["frozen"]["split_hash"]
    assert np.array_equal(few["frozen"]["pairs"], 3)


# protocols of other projects


def by_protocol(evaluated, name, folder):
    """results.json, but for its entry `run`, and the table of two images."""
    arguments = ["--checkpoint", evaluated / "run", "--limit", "2", "--device", "cpu"]
    arguments += ["--num_workers", "0", "--protocol", name, "--output_dir", folder]
    call_main("evaluate", *arguments)
    found = json.loads((folder / "results.json").read_text())
    assert found.pop("run")["command"].endswith(str(folder))
    return found, (folder / "results.md").read_text()


def absent(*_):
    raise ValueError("the weights of a network cannot be fetched (no route); leave out --lpips")


def test_without_weights_a_peers_row_has_a_sentence_and_the_other_numbers(
    evaluated, tmp_path, monkeypatch
):
    monkeypatch.setattr(metrics, "Lpips", absent)
    monkeypatch.setattr(peers, "Inception", absent)
    found, text = by_protocol(evaluated, "fvita", tmp_path / "a")
    head, _, *rows = text.splitlines()[:6]
    assert head == "| method | FID | KID | LPIPS | SSIM | PSNR dB | s/image |"
    assert rows[-1].startswith("| U-Net | not measured | not measured | not measured | 0.")
    assert found["size"] == [256, 256] and "failures" not in found
    assert "no LPIPS: the weights of a network cannot be fetched" in text
    assert "this infrared is stretched from 0 to 1" in found["note"]
    again, _ = by_protocol(evaluated, "fvita", tmp_path / "b")
    assert again == found
    ours = json.loads((evaluated / "a" / "results.json").read_text())["protocol"]
    assert found["protocol"]["id"] != ours["id"] and "name" not in ours["frozen"]
    assert found["protocol"]["frozen"]["measured"]["bits"] == 8
    for option in ("--lpips", "--report"):
        with pytest.raises(ValueError, match=f"fvita has its own .* leave out {option}"):
            call_main("evaluate", "--protocol", "fvita", option, "--output_dir", tmp_path / "c")


def test_with_weights_a_peers_row_is_whole(evaluated, tmp_path, monkeypatch):
    asked = []

    def lpips(device, network, scaled):
        asked.append((network, scaled))
        return metrics.mae

    monkeypatch.setitem(peers.PEERS, "mavic", peers.PEERS["mavic"]._replace(side=64))
    monkeypatch.setattr(metrics, "Lpips", lpips)

    def inception(_):
        return lambda images: [F.adaptive_avg_pool2d(images, 2).reshape(-1, 4, 1, 1)]

    monkeypatch.setattr(peers, "Inception", inception)
    found, text = by_protocol(evaluated, "mavic", tmp_path)
    assert text.startswith("| method | LPIPS | FID | L1 | task score | s/image |")
    own = found["methods"]["U-Net"]
    assert asked == [("vgg", True)] and own["lpips"] == own["mae"]
    expected = (2 / math.pi * math.atan(own["fid"]) + 2 * own["mae"]) / 3
    assert own["fid"] > 0 and own["mavic_score"] == pytest.approx(expected)


# the report


def test_the_report_is_one_file_whose_names_are_escaped(tmp_path):
    columns = tiny_data.rows(10, split=tiny_data.by_tens)
    columns["name"] = [f"<script>alert({i})</script> $x_{i}$" for i in range(10)]
    columns["split"] = ["train", "train", "val", *["test"] * 7]
    tiny_data.write(tmp_path / "set" / "a.parquet", columns)
    (tmp_path / "boxes").mkdir()
    for name in columns["name"][3:5]:
        (tmp_path / "boxes" / f"{name.replace('/', '_')}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    train = ["--data_path", tmp_path / "set", "data.size=32"]
    train += ["data.num_workers=0", "training.steps=1", "training.mixed_precision=no"]
    train += ["model.width=4", "model.levels=2", "--device", "cpu", "training.batch_size=2"]
    evaluate = ["--checkpoint", tmp_path / "run", "--boxes", tmp_path / "boxes"]
    evaluate += ["--device", "cpu", "--num_workers", "0", "--output_dir", tmp_path, "--report"]
    call_main("baselines.pix2pix", *train, "--output_dir", tmp_path / "run")
    call_main("evaluate", *evaluate)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"""(src|href)=["'](?!data:image/png;base64,)""", text)
    found = re.findall(r"<h2>(.*?)</h2>", text)
    assert found[:3] == ["Table", "Is pix2pix ahead?", "Plots"]
    assert [x.split()[0] for x in found[3:7]] == ["Where", "Best", "Median", "Worst"]
    for data in re.findall(r"base64,([^\"]+)\"", text):
        assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] > 300


def test_every_part_of_a_page_escapes_what_it_is_given():
    evil = "<img src=x>"
    parts = [
        page.heading(evil),
        page.paragraph(evil),
        page.picture(np.zeros((4, 4, 3), np.uint8), evil),
    ]
    parts.append(page.table([f"| {evil} | b |", "|---|---|", f"| {evil} | ahead |"]))
    text = page.page(evil, parts)
    assert evil not in text and text.count("&lt;img src=x&gt;") == 8
    assert '<td class="ahead">ahead</td>' in text


def test_the_report_shows_the_best_the_worst_and_objects_that_fail():
    rows = [{"index": i, "method": "ours", "ssim": i / 20} for i in range(20)]
    boxes = [{"index": i, "method": "ours", "auc": a} for i, a in ((3, 0.1), (4, 0.9), (5, 0.3))]
    chosen = report.picks(Found(images=rows, boxes=boxes), "ours")
    assert chosen["best"] == [19, 18, 17] and chosen["worst"] == [0, 1, 2]
    assert chosen["median"] == [11, 10, 9] and chosen["failed"] == [3, 5]
