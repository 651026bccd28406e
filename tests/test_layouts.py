"""Layouts of public sets: miniature trees in the published structure, and the shared sets."""

import json

import numpy as np
import pytest

import prepare
from data import layouts
from data.pairs import DataConfig, LabelConfig, open_pairs
from tests import tiny_data as tiny

TREES = {
    "kaist": ("set0{i}/V000/visible/I0000{i}.jpg", "set0{i}/V000/lwir/I0000{i}.jpg"),
    "flir_aligned": ("JPEGImages/FLIR_0{i}_RGB.jpg", "JPEGImages/FLIR_0{i}_PreviewData.jpeg"),
    "dronevehicle": ("{split}/{split}img/0{i}.jpg", "{split}/{split}imgr/0{i}.jpg"),
    "msrs": ("{official}/vi/0{i}D.png", "{official}/ir/0{i}D.png"),
    "llvip": ("LLVIP/visible/{official}/0{i}.jpg", "LLVIP/infrared/{official}/0{i}.jpg"),
    "ab_folders": ("{official}A/0{i}.png", "{official}B/0{i}.png"),
    "m3fd": ("M3FD_Detection/Vis/0{i}.png", "M3FD_Detection/Ir/0{i}.png"),
    "roadscene": ("crop_HR_visible/FLIR_0{i}.jpg", "cropinfrared/FLIR_0{i}.jpg"),
    "vedai": ("Vehicules512/0000{i}_co.png", "Vehicules512/0000{i}_ir.png"),
    "suffixes": ("shots/s{i}x_rgb.png", "shots/s{i}x_thermal.png"),
    "folders": ("rgb/s{i}x.png", "thermal/s{i}x.png"),
}


def tree(root, name, count=9):
    for i in range(count):
        words = {
            "split": ("train", "val", "test")[i % 3],
            "official": ("train", "test")[i % 3 == 2],
        }
        for pattern, image in zip(TREES[name], (tiny.visible(i), tiny.infrared(i))):
            path = root / pattern.format(i=i, **words)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.png(image))
    return root


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("given", [True, False])
def test_a_published_tree_is_prepared_by_its_folder_alone(tmp_path, name, given, capsys):
    tree(tmp_path / "set", name)
    argv = ["--folder", tmp_path / "set", "--out", tmp_path / "out", "--num_workers", 1]
    prepare.main([str(a) for a in [*argv, *(["--layout", name] if given else [])]])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    pairs = {s: x["pairs"] for s, x in manifest["splits"].items()}
    assert f"layout '{name}'" in capsys.readouterr().out and sum(pairs.values()) == 9
    if name in ("msrs", "llvip", "dronevehicle", "ab_folders"):
        assert pairs["test"] == 3 and all("test/" in n for n in manifest["splits"]["test"]["names"])


def mfnet(root, count=9):
    """images/ of four channels, labels/, mirrored copies and lists of splits, as published."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    names = {"train": [], "val": [], "test": []}
    for i in range(count):
        name = f"0000{i}{'DN'[i % 2]}"
        four = np.dstack([tiny.visible(i), tiny.infrared(i)])
        (root / "images" / f"{name}.png").write_bytes(tiny.png(four))
        (root / "images" / f"{name}_flip.png").write_bytes(tiny.png(four[:, ::-1].copy()))
        (root / "labels" / f"{name}.png").write_bytes(tiny.png(tiny.semantic(i)))
        names[("train", "val", "test")[i % 3]] += [name, f"{name}_flip"]
    for split, listed in names.items():
        (root / f"{split}.txt").write_text("\n".join(listed) + "\n")
    return root


def test_four_channels_in_one_file_become_two_sides(tmp_path, capsys):
    root = mfnet(tmp_path / "set")
    argv = ["--folder", root, "--out", tmp_path / "out", "--num_workers", 1]
    prepare.main([str(a) for a in argv])
    told = capsys.readouterr().out
    assert "layout 'mfnet'" in told and "18 images do not belong" in told and "00000D_flip" in told
    assert "3 files are not images (first: test.txt" in told
    labels = LabelConfig(material_source="none")
    config = DataConfig(path=str(tmp_path / "out"), cache="none", labels=labels)
    for number, split in enumerate(("train", "val", "test")):
        pairs = open_pairs(config, split)
        assert len(pairs) == 3
        for index in range(3):
            i = 3 * index + number
            pair = pairs.pair(index)
            assert pairs.names[index] == f"{split}/0000{i}{'DN'[i % 2]}"
            assert np.array_equal(pair.visible, tiny.visible(i))
            assert np.array_equal(pair.infrared, tiny.infrared(i))


def test_a_file_of_three_channels_is_no_pair(tmp_path):
    root = mfnet(tmp_path)
    (root / "images" / "00003N.png").write_bytes(tiny.png(tiny.visible(3)))
    with pytest.raises(ValueError, match=r"00003N.png: .* need 4 channels, has RGB"):
        prepare.main(["--folder", str(root), "--out", str(tmp_path / "out"), "--num_workers", "1"])
    (root / "images" / "00000D.png").write_bytes(tiny.png(tiny.visible(0)))
    with pytest.raises(ValueError, match="no pair of images in the layout"):
        layouts.find("m", root)


def test_the_two_sides_are_not_swapped_and_the_rest_is_named(tmp_path):
    root = tree(tmp_path, "vedai")
    (root / "Vehicules512" / "map.png").write_bytes(tiny.png(tiny.visible(0)))
    _, items, notes = layouts.find("v", root)
    assert items[0].visible.name == "00000_co.png" and items[0].infrared.name == "00000_ir.png"
    assert "1 images do not belong" in notes[0] and "map.png" in notes[0]


def test_what_does_not_fit_is_one_sentence(tmp_path):
    root = tree(tmp_path, "vedai")
    with pytest.raises(ValueError, match="no pair of images in the layout kaist"):
        layouts.find("v", root, "kaist")
    with pytest.raises(ValueError, match="expected auto or one of kaist"):
        layouts.find("v", root, "other")
    (root / "Vehicules512" / "00003_ir.png").unlink()
    with pytest.raises(ValueError, match=r"1 visible without partner.*00003.*--allow_unmatched"):
        layouts.find("v", root)
    assert len(layouts.find("v", root, allow_unmatched=True)[1]) == 8


@pytest.mark.parametrize(
    "name, options",
    [
        ("msrs", ()),
        ("roadscene", ()),
        ("llvip", ("--time_blocks", 10)),
        ("m3svd", ()),
        ("pv_aerial", ("--time_blocks", 8)),
    ],
)
def test_every_real_set_is_prepared_by_one_command(real_data, tmp_path, name, options, capsys):
    argv = ["--folder", real_data / name, *options, "--out", tmp_path / "out", "--num_workers", 1]
    prepare.main([str(a) for a in argv])
    assert "layout 'folders'" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    count = len(list((real_data / name / "visible").iterdir()))
    assert sum(x["pairs"] for x in manifest["splits"].values()) == count
