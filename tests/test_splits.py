"""Splits by folder names, cut by fractions or by time; near-duplicates; aspect; names in NFC."""

import json
import signal
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

import prepare
from data import splits
from data.inspection import in_workers
from data.pairs import DataConfig, LabelConfig, open_pairs
from tests import tiny_data as tiny


def run(root, *options):
    argv = ["--visible", root / "visible", "--infrared", root / "infrared", "--out", root / "out"]
    prepare.main([str(a) for a in [*argv, "--num_workers", 1, *options]])
    return json.loads((root / "out" / "manifest.json").read_text())


def names_of(manifest):
    return {s: [n.split("/", 1)[1] for n in manifest["splits"][s]["names"]] for s in splits.SPLITS}


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("{split}/{i}", ("train", "val", "test")),
        ("{split}/{i}", ("Training", "Valid", "TESTING")),
        ("city/{split}/night/{i}", ("train", "validation", "test")),
        ("day/deep/er/{split}/{i}", ("train", "dev", "test")),
    ],
)
def test_folders_named_as_splits_are_the_splits_at_every_depth(tmp_path, pattern, words, capsys):
    place = {w: [pattern.format(split=w, i=f"x{i}y") for i in range(4)] for w in words}
    tiny.folders(tmp_path, [name for names in place.values() for name in names])
    found = names_of(run(tmp_path))
    assert [sorted(found[s]) for s in splits.SPLITS] == [sorted(place[w]) for w in words]
    assert "splits by folder names (train 4, val 4, test 4)" in capsys.readouterr().out


@pytest.mark.parametrize("there, cut", [(["train"], ["val", "test"]), (["train", "test"], ["val"])])
def test_splits_without_a_folder_are_cut_from_train(tmp_path, there, cut):
    tiny.folders(tmp_path, [f"{s}/x{i}y" for s in there for i in range(20)])
    found = names_of(run(tmp_path, "--split_fractions", 0.5, 0.25, 0.25))
    for split in cut:
        assert found[split] and all(n.startswith("train/") for n in found[split])
    if "test" in there:
        assert len(found["test"]) == 20 and all(n.startswith("test/") for n in found["test"])
        assert (len(found["train"]), len(found["val"])) == (13, 7)
    else:
        assert [len(found[s]) for s in splits.SPLITS] == [10, 5, 5]


def test_folders_that_do_not_say_one_split_are_named_with_the_way_out(tmp_path):
    tiny.folders(tmp_path, [f"{s}/x{i}y" for s in ("train", "test", "more") for i in range(3)])
    with pytest.raises(ValueError, match="3 of 9 pairs are outside.*more/x0y.*--split_folders off"):
        run(tmp_path)
    assert sum(map(len, names_of(run(tmp_path, "--split_folders", "off")).values())) == 9


def test_a_path_of_two_splits_is_refused(tmp_path):
    tiny.folders(tmp_path, [f"train/test/x{i}y" for i in range(3)])
    with pytest.raises(ValueError, match="test and train"):
        run(tmp_path)


def fixed_camera(root, count):
    noise = np.random.default_rng(0)
    for folder, base in (("visible", tiny.visible(0)), ("infrared", tiny.infrared(0))):
        (root / folder).mkdir()
        for i in range(count):
            image = np.clip(base + noise.integers(-2, 3, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / folder / f"{i:04d}.png")


def test_a_fixed_camera_is_cut_by_time_with_a_gap(tmp_path):
    fixed_camera(tmp_path, 60)
    with pytest.raises(ValueError, match="1 group .*--time_blocks 10 --gap 1"):
        run(tmp_path)
    manifest = run(tmp_path, "--time_blocks", 10, "--gap", 2)
    found = {s: [int(n) for n in names] for s, names in names_of(manifest).items()}
    assert [len(found[s]) for s in splits.SPLITS] == [48, 4, 4]
    assert min(found["val"]) - max(found["train"]) == 3
    assert min(found["test"]) - max(found["val"]) == 3
    assert manifest["near_duplicates_in_two_splits"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (("--gap", 2), "give both"),
        (("--time_blocks", 2), "3 or more"),
        (("--time_blocks", 10, "--gap", 6), "leave 6 a block"),
        (("--split_fractions", 1, 0, 0), "above 0"),
    ],
)
def test_rules_that_cannot_be_followed_are_one_sentence(tmp_path, options, message):
    fixed_camera(tmp_path, 60)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *options)
    assert not (tmp_path / "out").exists()


def test_links_join_what_all_pairs_of_near_duplicates_join(monkeypatch):
    monkeypatch.setattr(splits, "ROWS", 7)
    noise = np.random.default_rng(0)
    base = noise.normal(size=(12, 256))[noise.integers(0, 12, 60)]
    looks = base + 0.1 * noise.normal(size=base.shape)
    looks = (looks / np.linalg.norm(looks, axis=1, keepdims=True)).astype(np.float32)
    links = splits.similar_links(looks, looks)
    assert len(links) < 60
    near = np.triu(looks @ looks.T > 0.95, 1)
    label = list(range(60))
    for i, j in links:
        assert near[i, j]
        label = [label[i] if x == label[j] else x for x in label]
    for i, j in zip(*np.nonzero(near)):
        assert label[i] == label[j]
    words = [splits.SPLITS[i % 3] for i in range(60)]
    count, shown = splits.torn_pairs(looks, looks, words)
    assert count == sum(words[i] != words[j] for i, j in zip(*np.nonzero(near)))
    assert len(shown) == 3 and all(near[i, j] and words[i] != words[j] for i, j in shown)


def test_memory_grows_with_the_frames_and_not_with_their_square():
    program = (
        "import pathlib, re, resource, numpy as np; from data import splits\n"
        "x = np.full((12000, 256), 1 / 16, np.float32)\n"
        "assert len(splits.similar_links(x, x)) == 11999\n"
        # on Linux ru_maxrss begins at what the parent process had; VmHWM does not
        "status = pathlib.Path('/proc/self/status')\n"
        "own = status.is_file() and re.search(r'VmHWM:\\s*(\\d+)', status.read_text())\n"
        "print(own[1] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    kib = int(done.stdout) * (1 if sys.platform == "linux" else 1 / 1024)
    assert kib < 800 * 2**10  # all 72 million pairs as tuples are 10 GB


@pytest.mark.parametrize("shape, noted", [((24, 64), True), ((48, 64), False), ((49, 64), False)])
def test_a_resize_that_changes_the_aspect_is_said(tmp_path, shape, noted, capsys):
    tiny.folders(tmp_path, [f"x{i}y" for i in range(6)])
    for file in (tmp_path / "visible").iterdir():
        image = Image.open(file).convert("RGB").resize(shape[::-1])
        image.save(file)
    run(tmp_path, "--resize_visible")
    told = capsys.readouterr().out
    assert ("squeezed 6 of 6" in told and "2.67:1" in told) == noted
    assert noted or "squeezed" not in told


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_compared_after_unicode_normalisation(tmp_path, forms):
    tiny.folders(tmp_path, [f"x{i}y" for i in range(6)])
    for folder, form in zip(("visible", "infrared"), forms):
        for file in list((tmp_path / folder).iterdir()):
            name = unicodedata.normalize(form, f"café Zürich {file.name}")
            file.rename(file.with_name(name))
    found = [n for names in names_of(run(tmp_path)).values() for n in names]
    assert len(found) == 6 and all(unicodedata.is_normalized("NFC", n) for n in found)


@pytest.mark.parametrize(
    "files, sizes",
    [
        ({"train-00000-of-00001": 20}, (16, 2, 2)),
        ({"train-00000-of-00002": 10, "train-00001-of-00002": 10}, (16, 2, 2)),
        ({"train-00000-of-00001": 18, "test-00000-of-00001": 5}, (16, 2, 5)),
        ({"train": 4, "validation": 5, "test": 3}, (4, 5, 3)),
    ],
)
def test_parquet_published_with_train_alone_can_be_used(tmp_path, files, sizes):
    rows = tiny.rows(25)
    first = 0
    for name, count in files.items():
        part = {k: x[first : first + count] for k, x in rows.items() if k != "split"}
        tiny.write(tmp_path / f"{name}.parquet", part)
        first += count
    cfg = DataConfig(path=str(tmp_path), labels=LabelConfig(material_source="none"))
    assert tuple(len(open_pairs(cfg, s)) for s in splits.SPLITS) == sizes


def _ends_at_sigterm(_) -> bool:
    return signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_workers_do_not_inherit_a_handler_that_they_could_miss():
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        assert all(in_workers(_ends_at_sigterm, [0] * 8, 2))
    finally:
        signal.signal(signal.SIGTERM, before)
