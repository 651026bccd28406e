"""--align affine: planted turns and scales are found and undone; what was right is left alone.

pytest tests/test_affine.py
"""

import json

import numpy as np
import pytest
from PIL import Image

import prepare
from data import affine, boxes
from data.affine import Affine
from data.folders import Item
from data.pairs import DataConfig, LabelConfig, open_pairs
from data.synthetic import render_scene
from utils.objects import Boxes

MARGIN = 16
SIZE = (192, 256)  # of the pairs, cut from larger scenes so that a move invents no border
SCENES = 6


def planted(degrees, scale, rows=0.0, columns=0.0):
    """The infrared turned clockwise and enlarged around the middle, then moved."""
    turn = np.deg2rad(degrees)
    inverse = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / scale
    middle = (np.array(SIZE) - 1) / 2
    offset = middle - inverse @ (middle + (rows, columns))
    (a, b), (d, e) = inverse
    return Affine(a, b, offset[0], d, e, offset[1])


@pytest.fixture(scope="module")
def scenes():
    """(visible uint8, infrared uint8) with a margin around SIZE."""
    size = (SIZE[0] + 2 * MARGIN, SIZE[1] + 2 * MARGIN)
    drawn = [render_scene(0, index, size) for index in range(SCENES)]
    return [
        tuple(np.rint(x * 255).astype(np.uint8) for x in (s.visible, s.infrared)) for s in drawn
    ]


def pairs_of(scenes, truth):
    """Pairs of SIZE whose infrared shows at a pixel what the visible shows at truth's."""
    inner = slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN)
    pixels = np.indices(SIZE).reshape(2, -1)
    rows, columns = truth.matrix()[:2] @ np.vstack([pixels, np.ones(pixels.shape[1])]) + MARGIN
    for visible, infrared in scenes:
        yield visible[inner], bilinear(infrared, rows, columns).reshape(SIZE)


def bilinear(image, rows, columns):
    """Values between pixels, written apart from what the program uses."""
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = rows - top, columns - left
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)


def saved(root, pairs):
    for i, pair in enumerate(pairs):
        for kind, image in zip(("visible", "infrared"), pair):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(root / kind / f"s{i}x.png")


def prepared(root, capsys, *options, align="affine", out="out"):
    """What prepare.py prints, and the manifest."""
    argv = ["--visible", root / "visible", "--infrared", root / "infrared", "--num_workers", 1]
    prepare.main([str(x) for x in [*argv, "--out", root / out, "--align", align, *options]])
    return capsys.readouterr().out, json.loads((root / out / "manifest.json").read_text())


def shards(root, out):
    return [path.read_bytes() for path in sorted((root / out).glob("*.parquet"))]


def off(found, truth):
    """Pixels by which a map is wrong at the worst corner."""
    return np.hypot(*(found.corners(SIZE) - truth.corners(SIZE)).T).max()


def test_a_planted_turn_scale_and_shift_is_found_and_undone(scenes, tmp_path, capsys):
    truth = planted(1.5, 1.02, 4, 0)
    pairs = list(pairs_of(scenes, truth))
    saved(tmp_path, pairs)
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "s0x.txt").write_text("1 0.5 0.5 0.25 0.25\n0 0.5 0.999 0.1 0.002\n")
    (tmp_path / "boxes_classes.txt").write_text("0 car\n1 person\n")
    told, manifest = prepared(tmp_path, capsys)
    found = Affine(*manifest["aligned"]["pairs"])
    assert off(found, truth) < 0.5
    assert "its infrared was turned by +1.5" in told and "the visible side is moved" in told
    assert "+2.0 % high and +2.0 % wide" in told
    # the infrared keeps its values; the visible is where the infrared is
    top, bottom, left, right = found.inside(SIZE)
    labels = LabelConfig(material_source="none")
    stored = open_pairs(DataConfig(path=str(tmp_path / "out"), cache="none", labels=labels), "all")
    names = list(stored.names)
    for i, (_, infrared) in enumerate(pairs):
        pair = stored.pair(names.index(f"s{i}x"))
        assert np.array_equal(pair.infrared, infrared[top:bottom, left:right])
        apart = edge_gap(pair.visible, pair.infrared)
        assert apart is None or off(apart, Affine()) < 1
    # so are the boxes of the infrared, where evaluate.py finds them
    (box,) = Boxes(tmp_path / "out" / "boxes").of("pairs", "s0x")
    assert box.kind == "person"
    edges = [box.left * (right - left) + left, box.bottom * (bottom - top) + top]
    assert np.allclose(edges, [SIZE[1] * 0.375, SIZE[0] * 0.625], atol=0.01)
    assert "1 boxes lie in what was cropped away" in told


def edge_gap(visible, infrared):
    found = affine.fit(affine.parts(visible, infrared, Affine()), Affine(), infrared.shape)
    return found and found.affine


def test_what_a_shift_leaves_too_small_has_no_agreement(scenes):
    far = Affine(c=-170.0, f=250.0)
    assert not affine.parts(scenes[0][0][: SIZE[0]], scenes[0][1][: SIZE[0]], far).any()


def test_class_images_move_with_the_visible(scenes):
    visible = scenes[0][0]
    ids = (visible[..., 0] > 99).astype(np.uint8) * 7
    move = planted(3.0, 1.05, 2, -3)
    there = move.moved(ids, classes=True)
    assert set(np.unique(there)) <= {0, 7} and there.shape == move.moved(visible).shape[:2]
    assert np.mean((move.moved(ids * 36) > 126) == (there > 0)) > 0.99


@pytest.mark.parametrize("move", [planted(4, 0.93, 5, -3), planted(-2, 1.08, -6, 4)])
def test_nothing_outside_the_visible_is_shown_and_little_is_lost(move):
    there = move.moved(np.full((*SIZE, 3), 200, np.uint8))
    assert there.min() == 200
    top, bottom, left, right = move.inside(SIZE)
    edges = np.array([[r, c, 1] for r in (top, bottom - 1) for c in (left, right - 1)])
    rows, columns = move.matrix()[:2] @ edges.T
    assert min(rows.min(), columns.min()) > -1e-5
    assert top == 0 or rows.min() < 3


def test_a_map_of_a_map_is_their_product():
    first, second = planted(2, 1.05, 3, 1), planted(-1, 0.97, 0, 2)
    point = np.array([20.0, 30.0, 1.0])
    assert np.allclose(
        second.after(first).matrix() @ point, second.matrix() @ (first.matrix() @ point)
    )


def test_a_source_that_was_right_keeps_its_bytes(scenes, tmp_path, capsys):
    saved(tmp_path, pairs_of(scenes, Affine(c=0.3)))  # pixels: right enough
    told, manifest = prepared(tmp_path, capsys)
    assert "is not turned or scaled" in told and manifest["aligned"] == {}
    prepared(tmp_path, capsys, align="off", out="plain")
    assert shards(tmp_path, "out") == shards(tmp_path, "plain")


def test_a_source_that_is_shifted_alone_is_cropped_and_not_resampled(scenes, tmp_path, capsys):
    pairs = list(pairs_of(scenes, Affine(c=-4.0, f=2.0)))
    saved(tmp_path, pairs)
    told, manifest = prepared(tmp_path, capsys)
    assert manifest["aligned"] == {"pairs": [4, -2]} and "differs from a shift by" in told
    assert manifest["sizes"] == {f"{SIZE[1] - 2}x{SIZE[0] - 4}": SCENES}


def test_noise_is_not_moved(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (SCENES, *SIZE, 4), dtype=np.uint8)
    saved(tmp_path, ((x[..., :3], x[..., 3]) for x in noise))
    told, manifest = prepared(tmp_path, capsys)
    assert "too few parts" in told and manifest["aligned"] == {}


def test_an_improbable_map_is_refused(scenes, tmp_path, capsys):
    saved(tmp_path, pairs_of(scenes, planted(6.0, 1.0)))
    told, manifest = prepared(tmp_path, capsys)
    assert "which is improbable (over 5 degrees or 10%)" in told and manifest["aligned"] == {}


def test_sizes_that_differ_and_too_few_pairs_are_said(scenes, tmp_path, capsys):
    pairs = list(pairs_of(scenes[:3], planted(1.5, 1.02)))
    saved(tmp_path, pairs)
    told, _ = prepared(tmp_path, capsys)
    assert "3 pairs can be measured, 5 are needed" in told
    saved(tmp_path, [*pairs[:2], (pairs[2][0][:-2], pairs[2][1][:-2])])
    told, _ = prepared(tmp_path, capsys, "--overwrite")
    assert "its images have 2 sizes" in told


def test_boxes_of_sources_that_stay_are_there_too(tmp_path):
    items = []
    for source in "ab":
        folder = tmp_path / source
        (folder / "boxes").mkdir(parents=True)
        (folder / "boxes" / "x.txt").write_text("0 0.5 0.5 0.5 0.5\nno box\n")
        (folder / "boxes_classes.txt").write_text(f"0 {source}\n")
        items.append(Item(source, "x", folder / "visible" / "x.png", folder / "infrared" / "x.png"))
    sizes = [(100, 200)] * 2
    texts, notes = boxes.moved(items, sizes, [Affine(c=-10), None])
    assert texts == {
        "a/x.txt": "0 0.500000 0.444444 0.500000 0.555556\n",
        "b/x.txt": "0 0.5 0.5 0.5 0.5\nno box\n",
    }
    assert "differently" in notes[-1]
    assert boxes.moved(items, sizes, [None, None]) == ({}, [])
