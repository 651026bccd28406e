"""What generate.py reads and writes: folders, formats it refuses by name, units, exact counts."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image, features

from data import infrared_files, outputs, radiometry
from data.decoding import decode_infrared, decode_visible, size_of
from data.pairs import DataConfig, LabelConfig, open_pairs
from data.photographs import find_photographs, refuse_raw
from data.transforms import make_window
from tests import tiny_data as tiny
from tests.conftest import call_main

PLANCK = radiometry.Planck(17000.0, 1430.0, 1.0, -6500.0, 0.0125)
COUNTS = np.random.default_rng(0).integers(13366, 15866, (48, 64)).astype(np.uint16)


def written(folder, values, window, planck=None, kind="png16", whole=False):
    """Files as generate.py writes them, and what prepare.py makes of them."""
    to = outputs.make_format(kind, window, planck, whole)
    for suffix, data in outputs.encode(values, to).items():
        (folder / f"a{suffix}").write_bytes(data)
    path = folder / f"a{outputs.SUFFIXES[kind]}"
    return decode_infrared(path.read_bytes(), "a"), infrared_files.facts_beside(path)


@pytest.mark.parametrize("low, high", [(13366, 15865), (0, 65535), (13000.5, 16000.25)])
def test_counts_come_back_exactly_through_a_16_bit_png(tmp_path, low, high):
    window = make_window(low, high)
    values = window.normalise(COUNTS)  # float32 in [0, 1], as a model's image
    found, facts = written(tmp_path, values, window, PLANCK)
    assert found.dtype == np.uint16 and np.array_equal(found, COUNTS)
    assert facts["unit"] == "counts" and facts["scale"] == 1 and facts["offset"] == 0
    assert radiometry.make_planck(facts["planck"], "x") == PLANCK
    assert np.array_equal(written(tmp_path, values, window, None, whole=True)[0], COUNTS)


@pytest.mark.parametrize(
    "low, high, unit", [(-20.0, 60.0, "celsius"), (287.1, 310.0, "kelvin"), (0.0, 1.0, "radiance")]
)
def test_a_window_in_degrees_is_spread_over_16_bits(tmp_path, low, high, unit):
    values = np.random.default_rng(1).random((48, 64), dtype=np.float32)
    found, facts = written(tmp_path, values, make_window(low, high, unit))
    back = found * facts["scale"] + facts["offset"]
    one_count = (high - low) / 65535
    assert np.abs(back - (low + (high - low) * values.astype(np.float64))).max() <= one_count
    assert facts["unit"] == unit and found.min() < 100 and found.max() > 65400
    with pytest.raises(ValueError, match="--counts writes whole numbers.*png16 scales them"):
        outputs.make_format("png16", make_window(low, high, unit), None, whole=True)


@pytest.mark.parametrize("kind", ["npy", "tiff"])
@pytest.mark.parametrize(
    "window, planck",
    [
        (make_window(-20, 60, "celsius"), None),
        (make_window(280, 320, "kelvin"), None),
        (make_window(13366, 15865), PLANCK),
    ],
)
def test_temperatures_are_written_in_kelvin(tmp_path, kind, window, planck):
    values = np.random.default_rng(1).random((48, 64), dtype=np.float32)
    found, facts = written(tmp_path, values, window, planck, kind)
    exact = window.low + (window.high - window.low) * values.astype(np.float64)
    kelvin = radiometry.to_kelvin(exact, window.unit, planck)
    assert found.dtype == np.float32 and np.abs(found - kelvin).max() < 1e-4
    assert kind == "npy" or facts == {"unit": "kelvin"}
    if planck:  # to the count
        assert np.abs(planck.to_counts(found) - exact).max() < 0.02


def test_a_tiff_without_a_temperature_holds_the_counts(tmp_path):
    window = make_window(13366, 15865)
    found, facts = written(tmp_path, window.normalise(COUNTS), window, None, "tiff")
    assert np.array_equal(np.rint(found), COUNTS) and facts == {"unit": "counts"}


def test_formats_that_the_training_data_cannot_fill_are_refused():
    with pytest.raises(ValueError, match="--format npy writes kelvin, .* is 'counts'"):
        outputs.make_format("npy", make_window(0, 255), None, False)
    for kind in ("png16", "npy", "tiff"):
        with pytest.raises(ValueError, match=f"--format {kind} needs the window"):
            outputs.make_format(kind, None, None, False)
    grey = outputs.encode(np.full((4, 4), 0.5), outputs.make_format("png8", None, None, False))
    assert (decode_infrared(grey[".png"], "x") == 128).all() and list(grey) == [".png"]


def photo(path, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny.png(tiny.visible(i)))


def test_a_folder_names_what_is_left_out_and_keeps_its_structure(tmp_path):
    root, out = tmp_path / "photos", tmp_path / "photos" / "results"
    for name in ("a.png", "day/a.png", "day/deep/b.c.png", ".hidden/x.png", "__MACOSX/a.png"):
        photo(root / name)
    for name in ("notes.txt", "clip.mp4", ".DS_Store", "day/list.csv"):
        (root / name).write_bytes(b"x")
    photo(out / "day" / "a.png")  # of an earlier run
    paths, names, notes = find_photographs(str(root), False, out)
    assert [p.name for p in paths] == ["a.png"] and [str(n) for n in names] == ["a"]
    assert notes == [
        "left out: 2 files (clip.mp4, notes.txt), no images",
        "left out: 1 folder (day); --recursive reads them too",
    ]
    paths, names, notes = find_photographs(str(root), True, out)
    assert sorted(map(str, names)) == ["a", "day/a", "day/deep/b.c"]
    assert notes == ["left out: 3 files (clip.mp4, day/list.csv, notes.txt), no images"]
    with pytest.raises(ValueError, match=r"no image files.*left out: 1 file \(list.csv\)"):
        (root / "day" / "a.png").unlink()
        find_photographs(str(root / "day"), False, out)


def test_two_photographs_of_one_result_are_refused_in_each_folder(tmp_path):
    photo(tmp_path / "day" / "a.png")
    photo(tmp_path / "night" / "a.png")
    assert len(find_photographs(str(tmp_path), True, tmp_path / "out").paths) == 2
    (tmp_path / "night" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="a.jpg and a.png would both become night/a.png"):
        find_photographs(str(tmp_path), True, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".dng", ".DNG", ".cr3", ".nef"])
def test_camera_raw_is_refused_by_name_and_not_left_out(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"II*\0")
    (path,) = find_photographs(str(tmp_path), False, tmp_path / "out").paths
    with pytest.raises(ValueError, match=rf"camera raw \({suffix[1:].upper()}\) is not read"):
        refuse_raw(path)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_heic_without_its_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"a.heic: HEIC is read by the package pillow-heif"):
        decode_visible(HEIC, "a.heic")


def photo_of(kind: str, pixels: np.ndarray, orientation: int) -> bytes:
    """An image as a phone stores it, turned back by its EXIF orientation. Skips without `kind`."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, quality=95, exif=exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photos_of_phones_are_turned_once(kind, orientation, turns):
    pixels = tiny.visible(0, (64, 96))
    data = photo_of(kind, pixels, orientation)
    found, expected = decode_visible(data, "a").astype(int), np.rot90(pixels, turns)
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 8
    assert size_of(data, "a") == expected.shape[:2]  # from the header alone
    with pytest.raises(ValueError, match="a.heic: "):
        decode_visible(data[:200], "a.heic")


@pytest.mark.parametrize("kind, suffix", [("HEIF", "heic"), ("AVIF", "avif")])
def test_photos_of_phones_are_prepared_and_found(kind, suffix, tmp_path):
    names = [f"p{i}" for i in range(8)]
    tiny.folders(tmp_path, names, size=(64, 48))
    for i, name in enumerate(names):
        (tmp_path / "visible" / f"{name}.png").unlink()
        lying = np.rot90(tiny.visible(i, (64, 48)), 1)
        data = photo_of(kind, np.ascontiguousarray(lying), 6)
        (tmp_path / "visible" / f"{name}.{suffix}").write_bytes(data)
    assert len(find_photographs(str(tmp_path / "visible"), False, tmp_path).paths) == 8
    folders = [x for k in ("visible", "infrared") for x in (f"--{k}", tmp_path / k)]
    call_main("prepare", *folders, "--out", tmp_path / "set")
    labels = LabelConfig(material_source="none")
    pairs = open_pairs(DataConfig(path=str(tmp_path / "set"), labels=labels), "train")
    expected = tiny.visible(int(pairs.names[0][1:]), (64, 48)).astype(int)
    assert np.abs(pairs.pair(0).visible - expected).mean() < 8


def test_avif_without_its_codec_is_one_sentence(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match=r"a.avif: AVIF is read by Pillow from 11.3 on"):
        decode_visible(HEIC.replace(b"ftypheic", b"ftypavif"), "a.avif")


def test_numbers_of_the_sidecar_are_plain_json():
    to = outputs.make_format("png16", make_window(280, 320, "kelvin"), None, False)
    facts = json.loads(outputs.encode(np.zeros((4, 4)), to)[".json"])
    assert facts == {"unit": "kelvin", "scale": 40 / 65535, "offset": 280.0}
