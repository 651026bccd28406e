"""Materials, tables from classes to materials, palettes, and class balance."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.materials import (
    CLASS_NAMES,
    MATERIALS,
    NUM_MATERIALS,
    PALETTES,
    TABLES,
    ClassBalance,
    decode_palette,
    emissivity_prior,
    material_colors,
    material_table,
)
from utils.labels import IGNORE

ID = {m.name: i for i, m in enumerate(MATERIALS)}
SIZES = {"ade20k": 150, "cityscapes": 19, "msrs": 9, "synthetic": 21}


def test_there_are_32_materials_with_names_colours_and_emissivities_of_their_own():
    assert len(MATERIALS) == len(ID) == NUM_MATERIALS == 32
    colors = material_colors()
    assert colors.shape == (32, 3) and colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == 32
    apart = np.abs(colors[:, None].astype(int) - colors[None]).sum(-1)
    assert apart[~np.eye(32, dtype=bool)].min() >= 40  # tells two materials apart in a panel
    prior = emissivity_prior()
    assert prior.shape == (32,) and prior.dtype == torch.float32
    assert (prior > 0).all() and (prior <= 1).all()
    assert prior[ID["bare metal"]] < 0.5 < prior[ID["glass"]] < prior[ID["skin"]]
    assert all(len(m.source) > 10 for m in MATERIALS)


def test_every_class_of_every_label_set_has_an_entry():
    assert set(TABLES) == set(CLASS_NAMES) == set(PALETTES) == set(SIZES)
    for name, size in SIZES.items():
        assert len(TABLES[name]) == len(CLASS_NAMES[name]) == len(PALETTES[name]) == size
        assert len(set(CLASS_NAMES[name])) == size
        named = TABLES[name][TABLES[name] != IGNORE]
        assert named.max() < NUM_MATERIALS
    # "unlabelled" of MFNet alone says nothing about material
    missing = {n: np.flatnonzero(t == IGNORE).tolist() for n, t in TABLES.items()}
    assert missing == {"ade20k": [], "cityscapes": [], "msrs": [0], "synthetic": []}


@pytest.mark.parametrize(
    ("label_set", "class_id", "class_name", "material"),
    [
        ("ade20k", 0, "wall", "plaster"),
        ("ade20k", 2, "sky", "sky"),
        ("ade20k", 6, "road", "asphalt"),
        ("ade20k", 12, "person", "textile"),
        ("ade20k", 20, "car", "painted metal"),
        ("ade20k", 76, "boat", "plastic"),
        ("ade20k", 127, "bicycle", "mixed object"),
        ("ade20k", 149, "flag", "textile"),
        ("cityscapes", 8, "vegetation", "foliage"),
        ("cityscapes", 18, "bicycle", "mixed object"),
        ("msrs", 1, "car", "painted metal"),
        ("msrs", 2, "person", "textile"),
        ("synthetic", 7, "window", "glass"),
    ],
)
def test_classes_stand_at_their_published_ids(label_set, class_id, class_name, material):
    assert CLASS_NAMES[label_set][class_id] == class_name
    assert MATERIALS[TABLES[label_set][class_id]].name == material


def test_the_same_thing_is_the_same_material_in_every_label_set():
    for thing in ("sky", "road", "car", "person"):
        found = {
            int(TABLES[n][CLASS_NAMES[n].index(thing)]) for n in TABLES if thing in CLASS_NAMES[n]
        }
        assert len(found) == 1, thing


def test_table_tensor_covers_every_byte():
    table = material_table("msrs")
    assert table.shape == (256,) and table.dtype == torch.int64
    assert table[1] == ID["painted metal"]
    assert (table[9:] == IGNORE).all()
    with pytest.raises(ValueError, match="unknown label set 'nyu'"):
        material_table("nyu")


@pytest.mark.parametrize("name", ["cityscapes", "msrs", "synthetic"])
def test_palettes_decode_every_class(name):
    ids = np.arange(SIZES[name], dtype=np.uint8).repeat(2).reshape(2, -1)
    np.testing.assert_array_equal(decode_palette(PALETTES[name][ids], name), ids)


def test_black_is_unlabelled_unless_it_is_a_class():
    black = np.zeros((2, 3, 3), np.uint8)
    assert (decode_palette(black, "cityscapes") == IGNORE).all()
    assert (decode_palette(black, "msrs") == 0).all()


def test_an_unknown_colour_is_refused_with_its_count():
    image = PALETTES["msrs"][np.ones((4, 5), int)].copy()
    image[0, :3] = (64, 1, 128)
    with pytest.raises(ValueError, match=r"\(64, 1, 128\) \(3 of 20 pixels\).*'msrs'"):
        decode_palette(image, "msrs")
    with pytest.raises(ValueError, match="uint8"):
        decode_palette(image.astype(np.float32), "msrs")


def test_a_colour_of_two_classes_is_refused():
    """ADE20K's usual palette paints road and skyscraper alike; guessing would mislabel one."""
    with pytest.raises(ValueError, match="road and skyscraper"):
        decode_palette(np.full((1, 2, 3), 140, np.uint8), "ade20k")
    image = PALETTES["ade20k"][np.array([[0, 5, 149]])]
    assert decode_palette(image, "ade20k").tolist() == [[0, 5, 149]]


def test_real_label_images_decode_with_the_msrs_palette(real_data):
    files = sorted((real_data / "msrs" / "semantic_predicted").glob("*.png"))[:3]
    assert files
    for file in files:
        rgb = np.array(Image.open(file).convert("RGB"))
        ids = decode_palette(rgb, "msrs")
        assert ids.max() < 9
        np.testing.assert_array_equal(PALETTES["msrs"][ids], rgb)


def test_class_balance_gives_shares_of_labelled_pixels_and_of_images():
    pixels, images = np.zeros(32, np.int64), np.zeros(32, np.int64)
    for name, count, seen in (("painted metal", 4, 1), ("textile", 1, 1)):
        pixels[ID[name]], images[ID[name]] = count, seen
    balance = ClassBalance(pixels, images, unlabelled=3, total_images=2)
    assert balance.to_dict() == {
        "painted metal": {"pixels": 0.8, "images": 0.5},
        "textile": {"pixels": 0.2, "images": 0.5},
    }
