"""Layouts of public sets: miniature trees in the published structure, and the shared sets."""

import json

import pytest

import prepare
from data import layouts
from tests import tiny_data as tiny

TREES = {
    "kaist": ("set0{i}/V000/visible/I0000{i}.jpg", "set0{i}/V000/lwir/I0000{i}.jpg"),
    "flir_aligned": ("JPEGImages/FLIR_0{i}_RGB.jpg", "JPEGImages/FLIR_0{i}_PreviewData.jpeg"),
    "dronevehicle": ("{split}/{split}img/0{i}.jpg", "{split}/{split}imgr/0{i}.jpg"),
    "msrs": ("{official}/vi/0{i}D.png", "{official}/ir/0{i}D.png"),
    "llvip": ("LLVIP/visible/{official}/0{i}.jpg", "LLVIP/infrared/{official}/0{i}.jpg"),
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
    if name in ("msrs", "llvip", "dronevehicle"):
        assert pairs["test"] == 3 and all("test/" in n for n in manifest["splits"]["test"]["names"])


def test_the_two_sides_are_not_swapped_and_the_rest_is_named(tmp_path):
    root = tree(tmp_path, "vedai")
    (root / "Vehicules512" / "map.png").write_bytes(tiny.png(tiny.visible(0)))
    _, items, notes = layouts.find("v", root)
    assert items[0].visible.name == "00000_co.png" and items[0].infrared.name == "00000_ir.png"
    assert "1 images are no part" in notes[0] and "map.png" in notes[0]


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
