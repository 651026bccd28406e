"""The doctor: planted shifts and constant frames are measured and named; the page is whole."""

import json

import numpy as np
import pytest
from PIL import Image

import prepare
from data import boxes, doctor
from data.folders import match, thumbnail
from data.pairs import DataConfig, LabelConfig, open_pairs


def real_pairs(real_data, name, count):
    """(visible, infrared) of pairs evenly spaced over a real set."""
    folder = real_data / name
    visible = sorted((folder / "visible").iterdir())
    infrared = {path.stem: path for path in (folder / "infrared").iterdir()}
    for path in visible[:: len(visible) // count][:count]:
        other = Image.open(infrared[path.stem]).convert("L")
        yield np.array(Image.open(path).convert("RGB")), np.array(other)


def moved(visible, infrared, rows, columns):
    """Both cut to the same size, the infrared from so many pixels above and to the left."""
    height, width = infrared.shape
    part = infrared[8 - rows : height - 8 - rows, 8 - columns : width - 8 - columns]
    return visible[8:-8, 8:-8], part


def examined(pairs, source="s"):
    return [doctor.examine(f"x{i}", source, *pair) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("name", ["msrs", "roadscene", "llvip", "m3svd", "pv_aerial"])
@pytest.mark.parametrize("rows, columns", [(0, 3), (-3, 2)])
def test_a_planted_shift_of_a_source_is_measured_within_half_a_pixel(
    real_data, name, rows, columns
):
    pairs = list(real_pairs(real_data, name, 10 if name == "llvip" else 20))
    plain = doctor.source_shifts(examined(moved(*pair, 0, 0) for pair in pairs))["s"]
    found = doctor.source_shifts(examined(moved(*pair, rows, columns) for pair in pairs))["s"]
    assert abs(found.rows - plain.rows - rows) < 0.5
    assert abs(found.columns - plain.columns - columns) < 0.5


def test_one_shifted_pair_among_many_is_named_and_no_other(real_data):
    pairs = [moved(*pair, 0, 0) for pair in real_pairs(real_data, "m3svd", 20)]
    found = examined(pairs)
    assert doctor.astray(found, doctor.source_shifts(found)) == []
    visible, infrared = list(real_pairs(real_data, "m3svd", 20))[7]
    pairs[7] = moved(visible, infrared, 0, 4)
    found = examined(pairs)
    far = doctor.astray(found, doctor.source_shifts(found))
    assert [f.name for f, _ in far] == ["x7"] and abs(far[0][1] - 4) < 1
    assert "1 pairs lie 3 or more pixels off their source: x7" in "\n".join(doctor.summary(found))


def test_false_alarms_on_real_pairs_are_rare(real_data):
    found = examined(real_pairs(real_data, "roadscene", 55))
    assert len(doctor.astray(found, doctor.source_shifts(found))) <= 2


def test_inverted_polarity_does_not_change_the_shift(real_data):
    ((visible, infrared),) = real_pairs(real_data, "m3svd", 1)
    plain, negative = (examined([(visible, x)])[0].shift() for x in (infrared, 255 - infrared))
    assert plain.clear() and np.allclose(plain[:2], negative[:2], atol=0.1)


def test_unrelated_and_constant_images_are_not_measured():
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (10, 96, 128, 4), dtype=np.uint8)
    found = examined((x[..., :3], x[..., 3]) for x in images)
    assert not doctor.source_shifts(found)["s"].clear() and not doctor.astray(found, {})
    assert (
        doctor.repairs(found)[0] == {}
        and "do the names pair one scene?" in doctor.summary(found)[0]
    )
    (dead,) = examined([(images[0, ..., :3], np.full((96, 128), 7, np.uint16))])
    assert dead.constant and dead.shift() is None
    assert "1 pairs have a constant image (first: x0)" in doctor.summary([dead])


def test_swapped_and_identical_sides_are_named(real_data):
    pairs = list(real_pairs(real_data, "roadscene", 4))
    swapped = [(np.stack([heat] * 3, -1), visible[..., 1]) for visible, heat in pairs]
    assert "4 of 4 pairs have a visible image without colour" in "".join(
        doctor.summary(examined(swapped))
    )
    same = [(visible, visible.mean(2).astype(np.uint8) // 2) for visible, _ in pairs]
    told = "".join(doctor.summary(examined(same)))
    assert "4 of 4 pairs show one image on both sides" in told
    assert "one image" not in (plain := "".join(doctor.summary(examined(pairs))))
    assert "without colour" not in plain


@pytest.mark.parametrize("name", ["msrs", "roadscene"])
def test_a_black_hot_source_among_white_hot_ones_is_named(real_data, name):
    heat = np.stack([thumbnail(x) for _, x in real_pairs(real_data, name, 40)])
    names, sources = [f"x{i}" for i in range(40)], ["a", "b"] * 20
    assert doctor.polarity_notes(names, sources, heat, []) == []
    heat[1::2] *= -1
    (note,) = doctor.polarity_notes(names, sources, heat, doctor.inversions(sources, heat))
    assert "sources 'a' and 'b' are opposite" in note


@pytest.fixture(scope="module")
def infrared_thumbnails(real_data):
    """{set: thumbnails (N,256) of its infrared images}."""
    found = {}
    for name, step in {"msrs": 2, "roadscene": 1, "pv_aerial": 1, "flir_radiometric": 1}.items():
        paths = sorted((real_data / name / "infrared").iterdir())[::step]
        images = (Image.open(path) for path in paths)
        images = (x.convert("L") if x.mode == "RGB" else x for x in images)
        found[name] = np.stack([thumbnail(np.array(x)) for x in images])
    return found


def inverted(heat):
    return doctor.inversions(["s"] * len(heat), heat)


def test_no_image_of_a_real_set_is_called_inverted(infrared_thumbnails):
    assert {name: inverted(heat) for name, heat in infrared_thumbnails.items()} == {
        name: [] for name in infrared_thumbnails
    }


# the share that is found: scenes of MSRS have less in common
@pytest.mark.parametrize("name, found", [("msrs", 0.5), ("roadscene", 0.75), ("pv_aerial", 0.75)])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_planted_inversions_are_found_and_no_other_image(infrared_thumbnails, name, found, share):
    heat = infrared_thumbnails[name].copy()
    chosen = np.random.default_rng(0).permutation(len(heat))[: round(share * len(heat))]
    heat[chosen] *= -1
    named = inverted(heat)
    assert set(named) <= set(chosen) and len(named) >= found * len(chosen)


@pytest.mark.parametrize("count", [8, 60, 300])
def test_where_scenes_have_nothing_in_common_none_is_called_inverted(count):
    noise = np.random.default_rng(count)
    blurred = noise.normal(size=(count, 4, 4)).repeat(10, axis=1).repeat(10, axis=2)
    for heat in (noise.normal(size=(count, 40, 40)), blurred):
        assert inverted(np.stack([thumbnail(x) for x in heat])) == []


def test_half_and_half_is_not_told():
    view = np.random.default_rng(0).normal(size=(40, 40))
    assert inverted(np.stack([thumbnail(view if i < 11 else -view) for i in range(20)])) == []
    assert inverted(np.stack([thumbnail(view if i < 15 else -view) for i in range(20)])) == [
        *range(15, 20)
    ]


# ---------------------------------------------------------------------------- on the command line


def block_scenes(root, count=6, shifts=None, side=(160, 200)):
    """root/visible and root/infrared: blocks, in the infrared moved by (rows, columns)."""
    noise = np.random.default_rng(0)
    for i in range(count):
        rows, columns = (shifts or {}).get(i, (0, 0))
        blocks = noise.integers(0, 256, (side[0] // 10, side[1] // 10, 3), dtype=np.uint8)
        scene = np.array(Image.fromarray(blocks).resize(side[::-1], Image.Resampling.NEAREST))
        heat = 255 - np.roll(scene[..., 1], (rows, columns), axis=(0, 1))
        for kind, image in (("visible", scene), ("infrared", heat)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(root / kind / f"s{i}x.png")


def prepared(root, *options):
    argv = ["--visible", root / "visible", "--infrared", root / "infrared", "--num_workers", 1]
    prepare.main([str(a) for a in [*argv, "--out", root / "out", *options]])
    labels = LabelConfig(material_source="none")
    config = DataConfig(path=str(root / "out"), cache="none", labels=labels)
    return open_pairs(config, "all"), json.loads((root / "out" / "manifest.json").read_text())


def test_a_displaced_source_is_cropped_by_whole_pixels(tmp_path, capsys):
    block_scenes(tmp_path, shifts={i: (3, -2) for i in range(6)})
    pairs, manifest = prepared(tmp_path, "--align", "translation")
    told = capsys.readouterr().out
    assert "cropped on both sides by 3 rows and 2 columns" in told
    assert manifest["aligned"] == {"pairs": [3, -2]} and manifest["sizes"] == {"198x157": 6}
    for index in range(6):
        pair = pairs.pair(index)
        assert pair.visible.shape == (157, 198, 3)  # 3 rows and 2 columns less
        assert np.array_equal(255 - pair.infrared, pair.visible[..., 1])
    prepare.main(["--check", str(tmp_path / "out")])
    assert "lies +0.0 rows" in capsys.readouterr().out.replace("-0.0", "+0.0")


def test_a_source_that_was_right_stays_byte_equal(tmp_path, capsys):
    block_scenes(tmp_path)
    prepared(tmp_path)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    prepared(tmp_path, "--align", "translation", "--overwrite")
    assert "stays as it is" in capsys.readouterr().out
    assert before == [(tmp_path / "out" / name).read_bytes() for name in names]


def test_boxes_outside_images_and_without_a_pair_are_named(tmp_path, capsys):
    block_scenes(tmp_path)
    (tmp_path / "boxes").mkdir()
    lines = {
        "s0x": "0 0.5 0.5 1.0 1.0\n2 0.1 0.1 0.2 0.2\n",
        "s1x": "0 0.9 0.5 0.3 0.2\n",
        "s2x": "0 0.5 0.5\n",
        "s9x": "0 0.5 0.5 0.1 0.1\n",
    }
    for name, text in lines.items():
        (tmp_path / "boxes" / f"{name}.txt").write_text(text)
    prepared(tmp_path)
    told = capsys.readouterr().out
    assert "boxes outside images: s1x.txt line 1; s2x.txt line 1 is no box" in told
    assert "1 files of boxes without a pair (s9x)" in told and "s0x.txt" not in told


def test_the_boxes_of_a_real_set_are_inside(real_data):
    folder = real_data / "msrs"
    items, _ = match("msrs", folder / "visible", folder / "infrared")
    assert boxes.notes(items) == []


def test_check_names_the_shifted_pair_and_writes_one_page(tmp_path, capsys):
    noise = np.random.default_rng(0)
    for i in range(6):
        blocks = Image.fromarray(noise.integers(0, 256, (16, 20), dtype=np.uint8))
        scene = np.array(blocks.resize((200, 160), Image.Resampling.NEAREST))
        moved = np.roll(scene, 5, axis=1) if i == 2 else scene
        for kind, image in (
            ("rgb", np.stack([scene, 255 - scene, scene], -1)),
            ("ir", 255 - moved),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / kind / f"<b>{i}x.png")
    out, page = tmp_path / "out", tmp_path / "page.html"
    argv = ["--visible", tmp_path / "rgb", "--infrared", tmp_path / "ir", "--out", out]
    prepare.main([str(a) for a in [*argv, "--num_workers", 1]])
    prepare.main(["--check", str(out), "--report", str(page)])
    told = capsys.readouterr().out
    assert "1 pairs lie 3 or more pixels off their source: <b>2x by 5.0" in told
    text = page.read_text()
    assert text.count("<img") == 2 and "&lt;b&gt;2x" in text and "<b>" not in text
    with pytest.raises(ValueError, match="no folder"):
        prepare.main(["--check", str(out), "--report", str(tmp_path / "none" / "page.html")])


def test_inverted_images_are_counted_named_and_shown(tmp_path, capsys):
    noise = np.random.default_rng(0)
    ground = np.linspace(0, 150, 64)[:, None]  # a cold sky above warm ground
    for i in range(12):
        heat = (ground + noise.integers(0, 100, (64, 80))).astype(np.uint8)
        colours = noise.integers(0, 256, (64, 80, 3), dtype=np.uint8)
        for kind, image in (("rgb", colours), ("ir", 255 - heat if i in (3, 7) else heat)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / kind / f"scene{i}x.png")
    out, page = tmp_path / "out", tmp_path / "page.html"
    argv = ["--visible", tmp_path / "rgb", "--infrared", tmp_path / "ir", "--out", out]
    prepare.main([str(a) for a in [*argv, "--num_workers", 1]])
    note = "2 of 12 infrared images look like negatives of the others ("
    told = capsys.readouterr().out.split(note)[1].split(")")[0]
    assert sorted(told.split(", ")) == ["scene3x", "scene7x"]
    prepare.main(["--check", str(out), "--report", str(page)])
    assert note in capsys.readouterr().out
    text = page.read_text()
    assert note in text and text.count("<p>the infrared looks like a negative") == 2
    assert "<h3>scene3x</h3>" in text and "<h3>scene7x</h3>" in text
