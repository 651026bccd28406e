"""prepare.py: matching, checks, windows, splits, shards, the manifest, and nothing half-written."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import prepare
from data import folders, inspection, ranges, splits, writing
from data.materials import CLASS_NAMES, MATERIALS, PALETTES, material_table
from data.pairs import DataConfig, LabelConfig, open_pairs
from tests import tiny_data as tiny

NAMES = [f"a_{i}" for i in range(20)]  # natural order differs from the alphabet's


def run(root, *options, out="out"):
    """Prepare root/visible and root/infrared into root/out, in this process."""
    argv = [
        "--visible",
        root / "visible",
        "--infrared",
        root / "infrared",
        "--out",
        root / out,
        "--num_workers",
        1,
        *options,
    ]
    prepare.main([str(a) for a in argv])
    return json.loads((root / out / "manifest.json").read_text())


def opened(path, split="train", **options):
    labels = LabelConfig(material_source=options.pop("material_source", "none"))
    return open_pairs(DataConfig(path=str(path), labels=labels, **options), split)


def names_of(manifest, split):
    return [name.split("/")[-1] for name in manifest["splits"][split]["names"]]


def test_folders_become_a_set_that_reads_back_exactly(tmp_path):
    manifest = run(tiny.folders(tmp_path, NAMES))
    assert manifest["window"] == {"low": 0.0, "high": 255.0, "unit": "counts"}
    assert [manifest["splits"][s]["pairs"] for s in ("train", "val", "test")] == [16, 2, 2]
    for split in ("train", "val", "test"):
        pairs = opened(tmp_path / "out", split, size=[24, 32])
        assert pairs.names == names_of(manifest, split)
        for i, name in enumerate(pairs.names):
            assert np.array_equal(pairs.pair(i).visible, tiny.visible(NAMES.index(name)))
            assert np.array_equal(pairs.pair(i).infrared, tiny.infrared(NAMES.index(name)))


def test_the_command_prints_counts_window_place_and_next_step(tmp_path, capsys):
    run(tiny.folders(tmp_path, NAMES))
    told = capsys.readouterr().out
    assert "train 16, val 2, test 2" in told and "0 to 255 counts" in told
    assert f"--data_path {tmp_path / 'out'}" in told and "32x24 (20)" in told


def test_splits_are_blocks_in_natural_order_and_never_change(tmp_path):
    tiny.folders(tmp_path, NAMES)
    first, second = run(tmp_path), run(tmp_path, "--num_workers", 2, out="again")
    assert names_of(first, "train") == NAMES[:16] and names_of(first, "test") == NAMES[18:]
    assert first == second


@pytest.mark.parametrize("make", ["png", "tiff", "npy"])
def test_sixteen_bit_counts_survive_the_whole_road(tmp_path, make):
    tiny.folders(tmp_path, NAMES, dtype=np.uint16)
    if make != "png":
        for i, name in enumerate(NAMES):
            path = tmp_path / "infrared" / f"{name}.png"
            counts = tiny.infrared(i, dtype=np.uint16)
            if make == "npy":
                np.save(path.with_suffix(".npy"), counts)
            else:
                Image.fromarray(counts).save(path.with_suffix(".tiff"))
            path.unlink()
    manifest = run(tmp_path)
    assert manifest["window"] == {"low": 0.0, "high": 65535.0, "unit": "counts"}
    pairs = opened(tmp_path / "out", size=[24, 32])
    restored = pairs.window.restore(pairs.get(3)["infrared"][0]).numpy()
    assert np.abs(restored - tiny.infrared(3, dtype=np.uint16)).max() < 0.01


def test_radiometric_camera_files_come_back_to_the_count(real_data, tmp_path):
    folder = real_data / "flir_radiometric"
    for kind in ("visible", "infrared"):
        shutil.copytree(folder / kind, tmp_path / kind)
    with pytest.raises(ValueError, match="visible is 1186 x 888 but infrared is 640 x 480"):
        run(tmp_path)
    run(tmp_path, "--resize_visible", "--window", 12000, 17000)
    pairs = opened(tmp_path / "out", size=[480, 640])
    for i, name in enumerate(pairs.names):
        counts = np.array(Image.open(folder / "infrared" / f"{name}.png"))
        restored = pairs.window.restore(pairs.get(i)["infrared"][0]).numpy()
        assert np.array_equal(np.rint(restored), counts)
        assert pairs.pair(i).visible.shape == (480, 640, 3)


def test_kelvin_by_scale_and_offset(tmp_path):
    tiny.folders(tmp_path, NAMES, dtype=np.uint16)
    manifest = run(tmp_path, "--unit", "kelvin", "--scale", 0.01, "--offset", 200)
    assert manifest["window"] == {"low": 200.0, "high": pytest.approx(855.35), "unit": "kelvin"}
    pairs = opened(tmp_path / "out", size=[24, 32])
    kelvin = pairs.window.restore(pairs.get(0)["infrared"][0]).numpy()
    assert np.allclose(kelvin, tiny.infrared(0, dtype=np.uint16) * 0.01 + 200, atol=1e-3)


def test_the_window_comes_from_the_training_split_only(tmp_path):
    tiny.folders(tmp_path, NAMES, dtype=np.uint16)
    for i, name in enumerate(NAMES):
        counts = tiny.infrared(i, dtype=np.uint16) // (1 if i >= 16 else 4)
        (tmp_path / "infrared" / f"{name}.png").write_bytes(tiny.png(counts))
    assert run(tmp_path)["window"]["high"] == 65535 // 4


def test_eight_and_sixteen_bit_together_need_a_window(tmp_path):
    tiny.folders(tmp_path, NAMES)
    (tmp_path / "infrared" / "a_3.png").write_bytes(tiny.png(tiny.infrared(3, dtype=np.uint16)))
    with pytest.raises(ValueError, match="19 of 20 infrared images have 8 bit"):
        run(tmp_path)


def test_unmatched_names_are_counted_and_named(tmp_path):
    tiny.folders(tmp_path, NAMES)
    (tmp_path / "visible" / "a_7.png").unlink()
    (tmp_path / "infrared" / "a_2.png").unlink()
    (tmp_path / "infrared" / "a_10.png").unlink()
    with pytest.raises(ValueError, match=r"2 visible without infrared \(first: a_2, a_10\).*1 inf"):
        run(tmp_path)
    manifest = run(tmp_path, "--allow_unmatched")
    assert sum(s["pairs"] for s in manifest["splits"].values()) == 17


def test_endings_that_differ_are_cut_off(tmp_path):
    tiny.folders(tmp_path, NAMES)
    for path in (tmp_path / "visible").iterdir():
        path.rename(path.with_name(path.stem + "_RGB.png"))
    with pytest.raises(ValueError, match="no name is in both"):
        run(tmp_path)
    assert names_of(run(tmp_path, "--suffixes=_RGB,,"), "val") == ["a_16", "a_17"]


def test_two_files_of_one_name_are_refused(tmp_path):
    tiny.folders(tmp_path, NAMES)
    shutil.copy(tmp_path / "visible" / "a_1.png", tmp_path / "visible" / "a_1.tiff")
    with pytest.raises(ValueError, match="have the same name"):
        run(tmp_path)


@pytest.mark.parametrize("kind", ["visible", "infrared", "semantic"])
def test_a_truncated_file_stops_everything_and_leaves_nothing(tmp_path, kind):
    tiny.folders(tmp_path, NAMES, classes=9)
    path = tmp_path / kind / "a_5.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"{kind}/a_5\.png: damaged or truncated"):
        run(tmp_path, "--semantic", tmp_path / "semantic", "--table", "msrs")
    assert {p.name for p in tmp_path.iterdir()} == {"visible", "infrared", "semantic"}


def test_false_colour_and_class_ids_out_of_range_are_refused(tmp_path):
    tiny.folders(tmp_path, NAMES, classes=20)
    with pytest.raises(ValueError, match="class id .* outside the 9 classes of 'msrs'"):
        run(tmp_path, "--semantic", tmp_path / "semantic", "--table", "msrs")
    (tmp_path / "infrared" / "a_4.png").write_bytes(tiny.png(tiny.visible(3)))
    with pytest.raises(ValueError, match=r"a_4\.png: the infrared image is coloured"):
        run(tmp_path)


def test_coloured_labels_become_ids_and_are_counted(tmp_path):
    tiny.folders(tmp_path, NAMES, classes=9)
    colours = np.asarray(PALETTES["msrs"], dtype=np.uint8)[:9]
    for i, name in enumerate(NAMES):
        path = tmp_path / "semantic" / f"{name}.png"
        path.write_bytes(tiny.png(colours[tiny.semantic(i)]))
    (tmp_path / "semantic" / "a_3.png").unlink()
    manifest = run(tmp_path, "--semantic", tmp_path / "semantic", "--palette", "msrs")
    assert manifest["table"] == "msrs"
    found = manifest["balance"]["train"]
    maps = [tiny.semantic(i) for i in range(16) if i != 3]
    assert found["images"] == 15
    assert found["classes"]["car"] == np.mean([m == CLASS_NAMES["msrs"].index("car") for m in maps])
    ids = material_table("msrs").numpy()[np.stack(maps)]
    ids = ids[ids != 255]
    shares = {MATERIALS[i].name: (ids == i).mean() for i in np.unique(ids)}
    assert {n: share["pixels"] for n, share in found["materials"].items()} == pytest.approx(shares)
    pairs = opened(tmp_path / "out", size=[24, 32], material_source="msrs")
    assert np.array_equal(pairs.get(5)["semantic"], tiny.semantic(5))
    assert (pairs.get(3)["semantic"] == 255).all()
    with pytest.raises(ValueError, match="'msrs' classes but .* 'ade20k'"):
        opened(tmp_path / "out", material_source="ade20k")


def test_frames_of_a_sequence_stay_together(tmp_path):
    names = [f"{s:04d}_16_{f:04d}" for s in range(10) for f in range(4)]
    manifest = run(tiny.folders(tmp_path, names))
    of = {n[:4]: split for split in manifest["splits"] for n in names_of(manifest, split)}
    for split in manifest["splits"]:
        assert all(of[n[:4]] == split for n in names_of(manifest, split))
    assert [manifest["splits"][s]["pairs"] for s in ("train", "val", "test")] == [32, 4, 4]


def test_one_sequence_cannot_be_split_unless_told(tmp_path):
    tiny.folders(tmp_path, [f"clip1_{i:03d}" for i in range(20)])
    with pytest.raises(ValueError, match=r"20 pairs form 1 group .*val and test would be empty"):
        run(tmp_path)
    run(tmp_path, "--sequences", "off")
    with pytest.raises(ValueError, match="needs a group"):
        run(tmp_path, "--sequences", "clip.*", out="other")


def test_near_duplicates_stay_together_without_sequence_names(tmp_path):
    tiny.folders(tmp_path, NAMES)
    rng = np.random.default_rng(0)
    for j in (16, 17, 18):  # nearly frame 15, across both boundaries
        for kind, image in (("visible", tiny.visible(15)), ("infrared", tiny.infrared(15))):
            noisy = np.clip(image + rng.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)
            (tmp_path / kind / f"a_{j}.png").write_bytes(tiny.png(noisy))
    manifest = run(tmp_path)
    where = {n: s for s in manifest["splits"] for n in names_of(manifest, s)}
    assert len({where[f"a_{i}"] for i in (15, 16, 17, 18)}) == 1


def test_video_scenes_of_real_data_are_found_by_their_pictures(real_data, tmp_path):
    for number, path in enumerate(sorted((real_data / "m3svd" / "visible").glob("*.png"))):
        for kind in ("visible", "infrared"):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.open(real_data / "m3svd" / kind / path.name).resize((80, 60)).save(
                tmp_path / kind / f"{number:02d}.png"
            )
    manifest = run(tmp_path)
    for split in manifest["splits"]:
        scenes = [int(n) // 4 for n in names_of(manifest, split)]
        assert all(scenes.count(s) == 4 for s in scenes)


def write_splits(tmp_path, table):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(table))
    return path


def test_given_splits_by_source_are_followed(tmp_path):
    for source in ("one", "two"):
        tiny.folders(tmp_path / source, NAMES[:6])
    for i in range(6):  # the sources must not hold the same files
        for kind, image in (("visible", tiny.visible(50 + i)), ("infrared", tiny.infrared(50 + i))):
            (tmp_path / "two" / kind / f"a_{i}.png").write_bytes(tiny.png(image))
    table = {
        "one": {"train": NAMES[2:6], "val": NAMES[:1], "test": NAMES[1:2]},
        "two": {"train": NAMES[:4], "validation": NAMES[4:5], "test": NAMES[5:6]},
        "three": {"train": ["elsewhere"]},
    }
    argv = []
    for source in ("one", "two"):
        argv += [
            "--visible",
            tmp_path / source / "visible",
            "--infrared",
            tmp_path / source / "infrared",
            "--source",
            source,
        ]
    argv += ["--splits", write_splits(tmp_path, table), "--out", tmp_path / "o"]
    prepare.main([str(a) for a in argv])
    val = opened(tmp_path / "o", "val")
    assert list(zip(val.sources, val.names)) == [("one", "a_0"), ("two", "a_4")]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["val"].append("a_0"), "'a_0' of 'pairs' is in train and val"),
        (lambda t: t["train"].remove("a_3"), "1 .first: pairs/a_3. of 20 pairs are in no split"),
        (lambda t: t["train"].append("b"), "1 .first: pairs/b. names of the splits have no files"),
        (lambda t: t.update(extra=[]), "unknown split 'extra'"),
        (lambda t: t.update(test=[], train=t["train"] + t["test"]), "split 'test' would be empty"),
        (lambda t: t.update(pairs=5), "'train' must be .split: .names.., got"),
        (lambda t: (t.clear(), t.update(pairs={"train": 5})), "'pairs' must be .* got .'train': 5"),
        (lambda t: (t.clear(), t.update(pairs=5)), "'pairs' must be .* got 5"),
    ],
)
def test_wrong_split_files_are_refused(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(inspection, "inspect", lambda task: pytest.fail("said too late"))
    tiny.folders(tmp_path, NAMES)
    table = {"train": NAMES[:16], "val": NAMES[16:18], "test": NAMES[18:]}
    change(table)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--splits", write_splits(tmp_path, table))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["visible", "infrared"])
def test_one_content_in_two_given_splits_is_refused(tmp_path, kind):
    tiny.folders(tmp_path, NAMES)
    shutil.copy(tmp_path / kind / "a_0.png", tmp_path / kind / "a_19.png")
    table = {"train": NAMES[:16], "val": NAMES[16:18], "test": NAMES[18:]}
    with pytest.raises(ValueError, match=f"same {kind} content is in train .*a_0.* test .*a_19"):
        run(tmp_path, "--splits", write_splits(tmp_path, table))
    run(tmp_path)  # without given splits such pairs stay together


def test_an_existing_folder_is_kept_unless_told(tmp_path):
    tiny.folders(tmp_path, NAMES)
    before = run(tmp_path)
    with pytest.raises(ValueError, match="exists; choose another --out or add --overwrite"):
        run(tmp_path)
    (tmp_path / "infrared" / "a_1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"a_1\.png"):
        run(tmp_path, "--overwrite")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == before
    with pytest.raises(ValueError, match="no prepared data set"):
        run(tmp_path, "--overwrite", out="visible")


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    tiny.folders(tmp_path, NAMES)
    monkeypatch.setattr(writing, "dump", lambda m: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"visible", "infrared"}


def test_a_file_changed_between_check_and_writing_is_refused(tmp_path, monkeypatch):
    tiny.folders(tmp_path, NAMES)
    real = ranges.choose_window

    def change(*args):
        (tmp_path / "visible" / "a_3.png").write_bytes(tiny.png(tiny.visible(77)))
        return real(*args)

    monkeypatch.setattr(ranges, "choose_window", change)
    with pytest.raises(ValueError, match=r"a_3\.png.*changed"):
        run(tmp_path)


def test_shards_are_bounded_and_checked_at_open(tmp_path, monkeypatch):
    tiny.folders(tmp_path, NAMES)
    monkeypatch.setattr(writing, "SHARD_ROWS", 6)
    monkeypatch.setattr(writing, "GROUP_ROWS", 2)
    manifest = run(tmp_path)
    out = tmp_path / "out"
    assert [s["rows"] for s in manifest["shards"]] == [6, 6, 4, 2, 2]
    assert pq.ParquetFile(out / "train-00000.parquet").num_row_groups == 3
    assert opened(out).names == NAMES[:16]
    shard = out / "train-00001.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"train-00001\.parquet: .* truncated or was changed"):
        opened(out)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.parquet is listed in .* but missing"):
        opened(out)
    shard.write_bytes(data)
    shutil.copy(shard, out / "train-00007.parquet")
    with pytest.raises(ValueError, match=r"train-00007\.parquet: not listed"):
        opened(out)


def test_pixels_changed_in_a_shard_are_found_by_the_full_check(tmp_path):
    run(tiny.folders(tmp_path, NAMES))
    shard = tmp_path / "out" / "train-00000.parquet"
    data = bytearray(shard.read_bytes())
    place = data.index((tmp_path / "visible" / "a_9.png").read_bytes())
    replacement = (tmp_path / "visible" / "a_9.png").read_bytes()[:-1] + b"!"
    data[place : place + len(replacement)] = replacement  # decodes as before
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="'a_9': the images are not those that were written"):
        prepare.main(["--check", str(tmp_path / "out")])


def test_synthetic_scenes_are_those_that_are_rendered_on_the_fly(tmp_path):
    argv = ["--synthetic", 10, "--size", 32, "--seed", 3, "--out", tmp_path / "s"]
    prepare.main([str(a) for a in argv])
    for split, count in (("train", 8), ("val", 1), ("test", 1)):
        made = opened(tmp_path / "s", split, size=32, material_source="synthetic")
        cfg = DataConfig(
            size=32,
            synthetic_seed=3,
            synthetic_scenes={split: count},
            labels=LabelConfig(material_source="synthetic"),
        )
        live = open_pairs(cfg, split)
        assert made.names == live.names
        a, b = made.get(count - 1), live.get(count - 1)
        assert (a["visible"] == b["visible"]).all() and (a["semantic"] == b["semantic"]).all()
        assert (a["infrared"] - b["infrared"]).abs().max() < 1e-5


def test_thumbnails_tell_scenes_apart_and_flat_images_match_nothing():
    some = np.stack([folders.thumbnail(tiny.visible(i)) for i in range(8)])
    other = np.stack([folders.thumbnail(tiny.infrared(i)) for i in range(8)])
    assert splits.similar_links(some, other) == []
    assert splits.similar_links(np.repeat(some[:1], 3, 0), np.repeat(other[:1], 3, 0)) == [
        (0, 1),
        (0, 2),
    ]
    assert splits.similar_links(np.repeat(some[:1], 3, 0), other[:3]) == []
    assert splits.similar_links(some[:3], np.repeat(other[:1], 3, 0)) == []
    flat = np.stack([folders.thumbnail(np.zeros((9, 5), np.uint8))] * 2)
    assert splits.similar_links(flat, flat) == []


def test_exif_turned_photographs_match_their_infrared(tmp_path):
    tiny.folders(tmp_path, NAMES)
    image = Image.fromarray(np.rot90(tiny.visible(2), 1))
    exif = image.getexif()
    exif[274] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    (tmp_path / "visible" / "a_2.png").write_bytes(buffer.getvalue())
    run(tmp_path)
    pairs = opened(tmp_path / "out")
    assert np.array_equal(pairs.pair(2).visible, tiny.visible(2))


@pytest.mark.parametrize(
    "argv",
    [
        ["--visible", "v", "--out", "o"],
        ["--visible", "v", "--infrared", "i", "--visible", "w", "--infrared", "j", "--out", "o"],
        ["--visible", "v", "--infrared", "i", "--semantic", "s", "--out", "o"],
        ["--visible", "v", "--infrared", "i", "--palette", "msrs", "--out", "o"],
        ["--synthetic", "2", "--out", "o"],
        ["--out", "o"],
        ["--synthetic", "10", "--visible", "v", "--infrared", "i", "--out", "o"],
        ["--visible", "v", "--infrared", "i", "--out", "o"],
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(tmp_path, argv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        prepare.main(argv)


def test_real_splits_of_two_sources_work(real_data, tmp_path):
    """The real names; small images of our own, because decoding 734 real ones takes long."""
    splits = json.loads((real_data / "splits.json").read_text())
    argv, number = [], 0
    for source in ("roadscene", "msrs"):
        for path in sorted((real_data / source / "visible").iterdir()):
            for kind, draw in (("visible", tiny.visible), ("infrared", tiny.infrared)):
                file = tmp_path / source / kind / f"{path.stem}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tiny.png(draw(number)))
            number += 1
        for kind in ("visible", "infrared"):
            argv += [f"--{kind}", tmp_path / source / kind]
        argv += ["--source", source]
    argv += ["--splits", real_data / "splits.json", "--out", tmp_path / "o", "--num_workers", 1]
    prepare.main([str(a) for a in argv])
    for split in ("train", "val", "test"):
        pairs = opened(tmp_path / "o", split)
        wanted = {(s, n) for s in splits for n in splits[s][split]}
        assert set(zip(pairs.sources, pairs.names)) == wanted and len(pairs) == len(wanted)


def test_check_says_that_every_pair_is_as_it_was_written(tmp_path, capsys):
    run(tiny.folders(tmp_path, NAMES))
    prepare.main(["--check", str(tmp_path / "out")])
    assert "20 pairs are as they were written" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_to_is_said_before_any_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "inspect", lambda task: pytest.fail("said too late"))
    tiny.folders(tmp_path, NAMES)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out cannot be made: .*file is no folder"):
        run(tmp_path, out="file/out")


def test_prepare_without_a_place_to_write_says_so(tmp_path):
    with pytest.raises(ValueError, match="--out datasets/mine"):
        prepare.main(["--synthetic", "10"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--window", "5", "1"], "low < high"),
        (["--window", "a", "b"], "LOW HIGH, got a b"),
        (["--window", "1"], "LOW HIGH, got 1"),
        (["--scale", "nan"], "--scale"),
        (["--offset", "inf"], "--offset"),
        (["--sequences", "("], r"--sequences \(: not a pattern"),
        (["--sequences", "clip.*"], "needs a group"),
        (["--splits", "none.json"], "none.json"),
    ],
)
def test_wrong_arguments_are_said_before_any_image_is_read(tmp_path, wrong, message, monkeypatch):
    monkeypatch.setattr(inspection, "inspect", lambda task: pytest.fail("said too late"))
    with pytest.raises((ValueError, OSError), match=message):
        run(tiny.folders(tmp_path, NAMES), *wrong)


def test_names_with_digits_that_are_no_decimals_are_names(tmp_path):
    names = [*"①②③④⑤⑥", "x²"]
    run(tiny.folders(tmp_path, names))
    assert len(opened(tmp_path / "out", "train")) == 5


def test_images_outside_a_given_window_are_refused(tmp_path):
    tiny.folders(tmp_path, NAMES)
    flat = np.full((24, 32), 7300, np.uint16)
    (tmp_path / "infrared" / "a_4.png").write_bytes(tiny.png(flat))
    with pytest.raises(ValueError, match="1 of 20 infrared images lie wholly outside --window"):
        run(tmp_path, "--window", "0", "255")


def test_the_next_command_is_one_that_a_shell_reads(tmp_path, capsys):
    run(tiny.folders(tmp_path, NAMES), out="my set")
    assert f"--data_path '{tmp_path / 'my set'}' data" in capsys.readouterr().out


def test_linked_folders_are_read_and_broken_links_and_odd_names_are_named(tmp_path):
    tiny.folders(tmp_path / "store", NAMES)
    for kind in ("visible", "infrared"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "s0").symlink_to(tmp_path / "store" / kind)
    assert sum(s["pairs"] for s in run(tmp_path, "--sequences", "off")["splits"].values()) == 20
    (tmp_path / "visible" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"lost\.png: a broken link"):
        run(tmp_path, out="again")
    (tmp_path / "visible" / "lost.png").unlink()
    try:
        (tmp_path / "visible" / "stra\udcdfe.png").touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ValueError, match="not UTF-8"):
        run(tmp_path, out="again")


@pytest.mark.parametrize(
    "name, sequence",
    [
        ("set00/V000/I00012", "set00/V000"),
        ("set00_V000_I00012", "set00_V000"),
        ("seq1/frame000012", "seq1"),
        ("video-57kWW-frame-000816-b6tu", "video-57kWW"),
        ("0111_1716_0000", "0111_1716"),
        ("FLIR_00006", None),
        ("00006", None),
        ("day/00006", None),
    ],
)
def test_sequences_are_read_from_the_names_of_common_data_sets(name, sequence):
    assert folders.sequence_of(folders.Item("s", name, None, None), "auto") == sequence


def test_a_single_image_that_sets_the_window_is_named(tmp_path, capsys):
    tiny.folders(tmp_path, NAMES, dtype=np.uint16)
    for path in (tmp_path / "infrared").iterdir():
        counts = np.asarray(Image.open(path)) // 64 + 29000
        Image.fromarray(counts.astype(np.uint16)).save(path)
    run(tmp_path)
    assert "alone" not in capsys.readouterr().out
    path = tmp_path / "infrared" / "a_3.png"
    counts = np.asarray(Image.open(path)).copy()
    counts[0, 0] = 0  # a dead pixel
    Image.fromarray(counts).save(path)
    run(tmp_path, out="again")
    assert "a_3.png of source 'pairs') alone make the window" in capsys.readouterr().out


def test_check_takes_every_label_set_and_synthetic_takes_no_options_of_folders(tmp_path):
    with pytest.raises(ValueError, match="leave out --window, --unit"):
        prepare.main(["--synthetic", "3", "--window", "0", "9", "--unit", "K", "--out", "x"])
    with pytest.raises(ValueError, match="three endings"):
        run(tiny.folders(tmp_path, NAMES), "--suffixes=-rgb")


def test_hidden_and_system_folders_are_passed_over(tmp_path):
    tiny.folders(tmp_path, NAMES)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        for side in ("visible", "infrared"):
            shutil.copytree(
                tmp_path / side,
                tmp_path / side / name / "a",
                dirs_exist_ok=False,
                ignore=lambda where, names: [n for n in names if n[0] in "._@"],
            )
    manifest = run(tmp_path)
    assert sum(manifest["splits"][s]["pairs"] for s in ("train", "val", "test")) == len(NAMES)


@pytest.mark.parametrize("visible, infrared", [("_co", "_ir"), ("", "_ir"), ("_rgb", "")])
def test_both_sides_may_share_a_folder_by_their_endings(tmp_path, visible, infrared):
    tiny.folders(tmp_path, NAMES)
    (tmp_path / "both").mkdir()
    for side, ending in (("visible", visible), ("infrared", infrared)):
        for path in (tmp_path / side).iterdir():
            path.rename(tmp_path / "both" / f"{path.stem}{ending}{path.suffix}")
    both = tmp_path / "both"
    options = f"--suffixes={visible},{infrared},"
    argv = ["--visible", both, "--infrared", both, "--out", tmp_path / "out", options]
    prepare.main([str(a) for a in argv])
    pairs = opened(tmp_path / "out", size=[24, 32])
    assert len(pairs) == 16
    first = NAMES.index(pairs.names[0])
    assert np.array_equal(pairs.pair(0).visible, tiny.visible(first))
    assert np.array_equal(pairs.pair(0).infrared, tiny.infrared(first))


@pytest.mark.parametrize("how", ["the same folder", "a copy"])
def test_one_image_on_both_sides_is_refused(tmp_path, how):
    tiny.folders(tmp_path, NAMES)
    for path in (tmp_path / "infrared").iterdir():  # grey saved as RGB is readable as both
        Image.open(path).convert("RGB").save(path)
    shutil.rmtree(tmp_path / "visible")
    if how == "a copy":
        shutil.copytree(tmp_path / "infrared", tmp_path / "visible")
    else:
        (tmp_path / "visible").symlink_to(tmp_path / "infrared")
    with pytest.raises(ValueError, match="both sides|as visible and as infrared"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_file_of_splits_may_begin_with_a_byte_order_mark(tmp_path):
    tiny.folders(tmp_path, NAMES)
    content = json.dumps({"train": NAMES[:16], "val": NAMES[16:18], "test": NAMES[18:]})
    (tmp_path / "splits.json").write_text(content, encoding="utf-8-sig")
    manifest = run(tmp_path, "--splits", tmp_path / "splits.json")
    assert names_of(manifest, "test") == NAMES[18:]
