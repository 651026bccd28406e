"""prepare.py on values that people have: orientation, windows of counts, radiometry."""

import contextlib
import io
import json
import pickle
import shutil
import struct
import zlib

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import prepare
from data import decoding, image_values, infrared_files, outputs, radiometry
from data.pairs import DataConfig, LabelConfig, open_pairs
from data.transforms import make_window
from tests import tiny_data as tiny


def run(root, *options, out="out") -> dict:
    """Prepare root/visible and root/infrared into root/out, in this process; the manifest."""
    folders = ("--visible", root / "visible", "--infrared", root / "infrared")
    argv = [*folders, "--out", root / out, "--num_workers", 1, *options]
    prepare.main([str(a) for a in argv])
    return json.loads((root / out / "manifest.json").read_text())


def opened(root, split="all"):
    labels = LabelConfig(material_source="none")
    return open_pairs(DataConfig(path=str(root / "out"), labels=labels), split)


def wide_png(colours: np.ndarray, orientation: int = 1) -> bytes:
    """16-bit PNG of (H,W,3), which PIL does not write."""

    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    exif = Image.Exif()
    exif[0x112] = orientation
    height, width, _ = colours.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
            chunk(b"eXIf", exif.tobytes()[6:]),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize("orientation, back", [(3, 2), (6, 1), (8, 3)])  # back: np.rot90's turns
def test_sides_turned_by_exif_are_both_upright_in_the_set(tmp_path, orientation, back):
    names = [f"s{i}" for i in range(6)]
    tiny.folders(tmp_path, names)
    exif = Image.Exif()
    exif[0x112] = orientation
    for i, name in enumerate(names):
        visible = Image.fromarray(np.rot90(tiny.visible(i), back).copy())
        visible.save(tmp_path / "visible" / f"{name}.png", exif=exif)
        counts = np.rot90(tiny.infrared(i, dtype=np.uint16), back)
        path = tmp_path / "infrared" / f"{name}.png"
        path.write_bytes(wide_png(np.stack([counts] * 3, 2), orientation))
    run(tmp_path)
    pairs = opened(tmp_path)
    for k, name in enumerate(pairs.names):
        i = names.index(name)
        assert np.array_equal(pairs.pair(k).visible, tiny.visible(i))
        assert np.array_equal(pairs.pair(k).infrared, tiny.infrared(i, dtype=np.uint16))


# ---------------------------------------------------------------------------- windows of counts


LOW, HIGH = 21000, 24000


def thermal(i: int, size=(48, 64)) -> np.ndarray:
    """Float counts of a smooth scene between LOW and HIGH with a little noise."""
    rng = np.random.default_rng([i, 7])
    coarse = Image.fromarray(rng.random((6, 8), dtype=np.float32))
    smooth = np.array(coarse.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float64)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return np.clip(LOW + (HIGH - LOW) * smooth + rng.normal(0, 4, size), LOW, HIGH)


def border(counts, i, value):
    counts[:5] = counts[:, :3] = value
    return counts


def warped_border(counts, i, value=0):
    """A border as an interpolation leaves it: its rim holds every mixture."""
    counts = border(counts, i, value)
    share = np.random.default_rng(i).random((5, counts.shape[1]))
    counts[5], counts[:, 3] = share[0] * counts[5], share[1, : len(counts)] * counts[:, 3]
    return counts


def dead_pixels(counts, i, value):
    counts[[7, 9, 20, 31, 40], [5, 50, 33, 11, 60]] = value
    return counts


def saturated(counts, i, value=65535):
    counts[20:24, 30:36] = value
    return counts


def both(counts, i):
    return saturated(border(counts, i, 0), i)


def some(change, every=3):
    return lambda counts, i: change(counts, i) if i % every == 0 else counts


SPOILED = {
    "zero border": lambda c, i: border(c, i, 0),
    "zero border in a third of the images": some(lambda c, i: border(c, i, 0)),
    "interpolated border": warped_border,
    "border of another value": lambda c, i: border(c, i, 1000),
    "border of the highest value": lambda c, i: border(c, i, 65535),
    "dead pixels": lambda c, i: dead_pixels(c, i, 0),
    "one dead pixel of all images": lambda c, i: np.where(
        np.arange(c.size) == 77, 0, c.flat
    ).reshape(c.shape),
    "stuck pixels": lambda c, i: dead_pixels(c, i, 65535),
    "saturated 16 bit": saturated,
    "saturated in a third of the images": some(saturated),
    "border and saturation": both,
    "border close to the scene": lambda c, i: border(c, i, LOW - 300),
    "zero border of scenes in few levels": lambda c, i: border(c // 300 * 300, i, 0),
    "border below a wide scene": lambda c, i: border((c - LOW) * 4 + LOW, i, LOW - 3000),
}


def write_infrared(root, change, count=20, dtype=np.uint16):
    names = [f"s{i}" for i in range(count)]
    tiny.folders(root, names, size=(48, 64))
    for i, name in enumerate(names):
        (root / "infrared" / f"{name}.png").unlink()
        counts = change(thermal(i), i)
        if dtype == np.uint16:
            Image.fromarray(np.rint(counts).astype(np.uint16)).save(
                root / "infrared" / f"{name}.png"
            )
        else:
            np.save(root / "infrared" / f"{name}.npy", counts.astype(dtype))
    return root


def true_outside(root, window) -> float:
    """Share of the training pixels outside the window, counted."""
    pairs = opened(root, "train")
    images = [pairs.pair(i).infrared.astype(np.float64) for i in range(len(pairs))]
    images = np.stack([image for image in images if np.ptp(image)])
    return float(((images < window["low"]) | (images > window["high"])).mean())


@pytest.mark.parametrize("kind", SPOILED)
def test_values_apart_from_all_others_do_not_set_the_window_and_are_named(tmp_path, kind, capsys):
    manifest = run(write_infrared(tmp_path, SPOILED[kind]))
    window, facts = manifest["window"], manifest["infrared"]
    told = capsys.readouterr().out
    high = 4 * (HIGH - LOW) + LOW if "wide" in kind else HIGH
    assert LOW <= window["low"] < LOW + 60 and high - 60 < window["high"] <= high
    assert "is left out of the window" in told and facts["left_out_of_window"]
    share = facts["train_pixels_outside_window"]
    expected = true_outside(tmp_path, window)
    assert share["below"] + share["above"] == pytest.approx(expected, abs=0.005)
    assert f"below {share['below']:.2%}, above {share['above']:.2%}" in told


@pytest.mark.filterwarnings("error")  # thumbnails of such values overflow
@pytest.mark.parametrize("value", [-9999.0, -32768.0, 0.0, 1e6, -3.4028234663852886e38])
def test_nodata_of_float_images_is_left_out_without_being_told(tmp_path, value, capsys):
    manifest = run(
        write_infrared(tmp_path, lambda c, i: border(c / 80, i, value), dtype=np.float32),
        *("--unit", "kelvin"),
    )
    assert manifest["window"]["low"] == pytest.approx(LOW / 80, abs=1)
    assert manifest["window"]["high"] == pytest.approx(HIGH / 80, abs=1)
    assert f"the value {value:g} kelvin (" in capsys.readouterr().out


def test_nodata_that_is_told_counts_for_nothing(tmp_path, capsys):
    write_infrared(tmp_path, lambda c, i: border(c, i, LOW - 100))
    close = run(tmp_path)
    assert close["window"]["low"] == LOW - 100  # 100 counts from the scene: nothing suspect
    told = run(tmp_path, "--nodata", LOW - 100, "--nodata", -1, out="told")
    assert LOW <= told["window"]["low"] < LOW + 60
    share = told["infrared"]["nodata"]
    assert share[str(LOW - 100)] == pytest.approx((5 * 64 + 43 * 3) / (48 * 64))
    assert share["-1"] == 0 and "no infrared image has the value -1" in capsys.readouterr().out


def test_the_nodata_tag_of_a_tiff_is_followed(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    write_infrared(tmp_path, lambda c, i: c)
    for i, path in enumerate(sorted((tmp_path / "infrared").iterdir())):
        counts = border(thermal(i), i, LOW - 100).astype(np.float32)
        tag = [(42113, "s", 0, str(LOW - 100), True)]
        tifffile.imwrite(path.with_suffix(".tif"), counts, extratags=tag)
        path.unlink()
    manifest = run(tmp_path)
    assert LOW <= manifest["window"]["low"] < LOW + 60
    assert manifest["infrared"]["nodata"][str(LOW - 100)] > 0.1


def test_an_image_of_nothing_but_nodata_is_constant(tmp_path, capsys):
    write_infrared(tmp_path, lambda c, i: np.full_like(c, 7) if i == 2 else c)
    manifest = run(tmp_path, "--nodata", 7)
    assert LOW <= manifest["window"]["low"] < LOW + 60
    assert "1 of 20 infrared images" in capsys.readouterr().out


@pytest.mark.parametrize("value", [0, 30000, 65535])
@pytest.mark.parametrize("dead", [[3], [3, 9], list(range(0, 15))])
def test_constant_images_however_many_do_not_set_the_window(tmp_path, dead, value, capsys):
    def change(counts, i):
        return np.full_like(counts, value) if i in dead else counts

    manifest = run(write_infrared(tmp_path, change))
    assert manifest["window"]["low"] >= LOW and manifest["window"]["high"] <= HIGH
    told = capsys.readouterr().out
    assert f"note: {len(dead)} of 20 infrared images (" in told and "are constant" in told
    assert f"s{dead[0]}.png" in told


def test_images_of_nearly_one_value_are_constant(tmp_path, capsys):
    def change(counts, i):
        dead = np.zeros_like(counts)
        dead.flat[[5, 800, 2000, 3000]] = [1, 60000, 500, 40000]
        return dead if i in (3, 9) else counts

    manifest = run(write_infrared(tmp_path, change))
    assert manifest["window"]["low"] >= LOW and manifest["window"]["high"] <= HIGH
    assert "2 of 20 infrared images" in capsys.readouterr().out


@pytest.mark.parametrize("level", [300, 60000])
def test_dead_images_of_noise_do_not_set_the_window(tmp_path, level, capsys):
    def change(counts, i):
        noise = np.random.default_rng(i).normal(level, 5, counts.shape)
        return noise if i in (3, 9, 12) else counts

    manifest = run(write_infrared(tmp_path, change))
    assert manifest["window"]["low"] >= LOW and manifest["window"]["high"] <= HIGH
    assert "hold little but noise" in capsys.readouterr().out


def test_only_constant_images_are_one_sentence(tmp_path):
    write_infrared(tmp_path, lambda c, i: np.full_like(c, 100 + i))
    with pytest.raises(ValueError, match="all 16 infrared images of the training split are const"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_constant_images_of_8_bit_are_named_too(tmp_path, capsys):
    tiny.folders(tmp_path, [f"s{i}" for i in range(12)])
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(tmp_path / "infrared" / "s4.png")
    assert run(tmp_path)["window"] == {"low": 0.0, "high": 255.0, "unit": "counts"}
    assert "s4.png" in capsys.readouterr().out


def test_few_images_of_other_values_are_named_and_kept(tmp_path, capsys):
    """A fire is no fault: what many different pixels show stays in the window."""
    manifest = run(write_infrared(tmp_path, lambda c, i: c + 15000 if i in (4, 7) else c, 30))
    assert manifest["window"]["high"] > HIGH + 14000
    told = capsys.readouterr().out
    assert "2 of 24 infrared images" in told and "alone make the window more than twice" in told


def as_before(root) -> tuple[float, float]:
    """The rule for sets without outliers: all but a 10,000th of each image at either end."""
    pairs = opened(root, "train")
    tails = [
        np.quantile(pairs.pair(i).infrared, [1e-4, 1 - 1e-4], method="nearest")
        for i in range(len(pairs))
    ]
    return min(t[0] for t in tails), max(t[1] for t in tails)


def stretched(counts, i):
    """Each image stretched to the whole type and clipped at both ends, as automatic gain does."""
    low, high = np.quantile(counts, [0.02, 0.98])
    return np.clip((counts - low) / (high - low), 0, 1) * 65535


def hot_object(counts, i):
    counts[30:36, 40:48] = 29000 + np.random.default_rng(i).normal(0, 100, (6, 8))
    return counts


ORDINARY = {
    "smooth scenes": lambda c, i: c,
    "automatic gain": stretched,
    "drifting offset": lambda c, i: c + 150 * i,
    "low contrast": lambda c, i: 22000 + (c - 22000) / (1 + i % 5),
    "hot objects": some(hot_object, 4),
    "cold sky": lambda c, i: np.where(np.arange(48)[:, None] < 15, c - 6000, c),
    "few levels": lambda c, i: c // 300 * 300,
    "8 bits in 16": lambda c, i: (c - LOW) // 12 * 256,
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_values_keep_the_window_they_had(tmp_path, kind, capsys):
    window = run(write_infrared(tmp_path, ORDINARY[kind]))["window"]
    low, high = as_before(tmp_path)
    assert window["low"] == pytest.approx(low, abs=0.001 * (high - low))
    assert window["high"] == pytest.approx(high, abs=0.001 * (high - low))
    assert "left out" not in capsys.readouterr().out


def test_real_radiometric_images_keep_the_window_they_had(real_data, tmp_path):
    folder = real_data / "flir_radiometric"
    paths = ["--visible", folder / "visible", "--infrared", folder / "infrared"]
    argv = [*paths, "--resize_visible", "--sequences", "off", "--out", tmp_path / "out"]
    prepare.main([str(a) for a in (*argv, "--num_workers", 1)])
    window = json.loads((tmp_path / "out" / "manifest.json").read_text())["window"]
    assert (window["low"], window["high"]) == as_before(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("which", [range(20), [5, 6]])
def test_swapped_bytes_are_noticed_and_named(tmp_path, dtype, which):
    def change(counts, i):
        counts = (counts - (23000 if dtype == np.int16 else 0)).astype(dtype)
        return counts.byteswap() if i in which else counts

    write_infrared(tmp_path, change, dtype=dtype)
    with pytest.raises(ValueError, match=rf"{len(which)} of 20 infrared .* bytes .* swapped"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, "--window", -40000, 70000)  # the way out that the sentence names


@pytest.mark.parametrize("wide", [1, 4])
def test_swapped_bytes_of_flat_scenes_are_noticed_in_the_set(tmp_path, wide):
    """Each image alone has too few levels to tell."""

    def change(counts, i):
        flat = np.repeat(np.repeat(counts[::12, ::16], 12, 0), 16, 1)
        return np.rint((flat - LOW) * wide + LOW / 4).astype(np.uint16).byteswap()

    write_infrared(tmp_path, change)
    with pytest.raises(ValueError, match="20 of 20 infrared .* bytes .* swapped"):
        run(tmp_path)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_visible_images_that_use_a_fraction_of_their_type_are_said(tmp_path, bits, capsys):
    tiny.folders(tmp_path, [f"s{i}" for i in range(12)])
    run(tmp_path, out="plain")
    assert "too dark" not in capsys.readouterr().out
    for i in range(12):
        values = tiny.visible(i).astype(np.uint16) * 257 >> 16 - bits
        (tmp_path / "visible" / f"s{i}.png").write_bytes(wide_png(values))
    run(tmp_path)
    told = capsys.readouterr().out
    assert (f"{bits}-bit values are stored in 16 bits" in told) == (bits < 16)
    assert (f"{2 ** (16 - bits)} times too dark" in told) == (bits < 16)


def test_what_is_kept_of_an_image_is_small_whatever_its_size():
    for size in ((48, 64), (768, 1024)):
        counts = np.random.default_rng(0).integers(0, 65536, size, dtype=np.uint16)
        assert len(pickle.dumps(image_values.measure(counts))) < 2000


# ---------------------------------------------------------------------------- radiometry


def radiometric(real_data, root, *options):
    folder = real_data / "flir_radiometric"
    paths = ["--visible", folder / "visible", "--infrared", folder / "rjpeg", "--resize_visible"]
    argv = [*paths, "--sequences", "off", "--out", root / "out", "--num_workers", 1, *options]
    prepare.main([str(a) for a in argv])
    return json.loads((root / "out" / "manifest.json").read_text())


def camera_facts(real_data, name: str) -> tuple[np.ndarray, dict]:
    """The counts that another program took from the file, and its constants."""
    folder = real_data / "flir_radiometric"
    counts = np.asarray(Image.open(folder / "infrared" / f"{name}.png"))
    return counts, json.loads((folder / "meta.json").read_text())[name]["planck"]


def test_radiometric_jpegs_become_their_counts_with_constants(real_data, tmp_path):
    manifest = radiometric(real_data, tmp_path)
    pairs = opened(tmp_path)
    assert manifest["window"]["unit"] == "counts" and len(pairs) == 5
    for i, name in enumerate(pairs.names):
        counts, planck = camera_facts(real_data, name)
        assert np.array_equal(pairs.pair(i).infrared, counts)
        assert pairs.planck._asdict() == pytest.approx(planck)


@pytest.mark.parametrize("unit, zero", [("kelvin", 0.0), ("celsius", 273.15)])
def test_radiometric_jpegs_become_temperatures_that_are_exact_to_a_count(
    real_data, tmp_path, unit, zero
):
    manifest = radiometric(real_data, tmp_path, "--unit", unit)
    pairs = opened(tmp_path)
    assert manifest["window"]["unit"] == unit and pairs.planck is None
    for i, name in enumerate(pairs.names):
        counts, p = camera_facts(real_data, name)
        kelvin = p["B"] / np.log(
            p["R1"] / (p["R2"] * (counts.astype(np.float64) + p["O"])) + p["F"]
        )
        stored = pairs.pair(i).infrared.astype(np.float64) + zero
        assert np.abs(stored - kelvin).max() < 1e-4
        back = p["R1"] / (p["R2"] * (np.exp(p["B"] / stored) - p["F"])) - p["O"]
        assert np.array_equal(np.rint(back), counts)


def test_calibrated_files_take_no_scale(real_data, tmp_path):
    with pytest.raises(ValueError, match="brings its own calibration"):
        radiometric(real_data, tmp_path, "--unit", "kelvin", "--scale", 0.01)
    assert not (tmp_path / "out").exists()


def container(records: dict[int, bytes], parts: int = 2) -> bytes:
    """A JPEG with FLIR's container of these records in so many segments."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "JPEG")
    start, directory, bodies = 64 + 32 * len(records), b"", b""
    for kind, record in records.items():
        at = start + len(bodies)
        directory += struct.pack(">HHIIII", kind, 1, 100, 1, at, len(record)) + bytes(12)
        bodies += record
    head = b"FFF\0" + bytes(16) + struct.pack(">III", 100, 64, len(records)) + bytes(32)
    whole, segments = head + directory + bodies, b""
    size = -(-len(whole) // parts)
    for i in range(parts):
        body = b"FLIR\0\1" + bytes([i, parts - 1]) + whole[i * size : (i + 1) * size]
        segments += b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return buffer.getvalue()[:2] + segments + buffer.getvalue()[2:]


def raw_record(counts: np.ndarray, order: str, kind: str) -> bytes:
    head = struct.pack(order + "HHH", 2, counts.shape[1], counts.shape[0]) + bytes(26)
    if kind == "plain":
        return head + counts.astype(order + "u2").tobytes()
    stored = counts.byteswap() if kind == "swapped PNG" else counts
    return head + tiny.png(stored)


def camera_record(order: str, constants=(17000.0, 1430.0, 1.0, -6500, 0.0125)) -> bytes:
    r1, b, f, o, r2 = constants
    record = bytearray(0x400)
    record[:2] = struct.pack(order + "H", 2)
    record[0x58:0x64] = struct.pack(order + "fff", r1, b, f)
    record[0x308:0x310] = struct.pack(order + "if", o, r2)
    return bytes(record)


SCENE = np.rint(thermal(1)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["plain", "PNG", "swapped PNG"])
@pytest.mark.parametrize("order", "<>")
def test_every_way_to_store_the_raw_image_is_read(kind, order):
    data = container({1: raw_record(SCENE, order, kind), 0x20: camera_record(order)})
    read = infrared_files.read_infrared(data, "x.jpg")
    assert np.array_equal(read.values, SCENE) and read.planck.O == -6500
    assert np.array_equal(decoding.decode_infrared(read.stored, "row"), SCENE)
    kelvin = infrared_files.read_infrared(data, "x.jpg", "kelvin").values
    assert np.array_equal(np.rint(read.planck.to_counts(kelvin)), SCENE)


def test_damaged_radiometric_jpegs_are_refused_by_name():
    good = container({1: raw_record(SCENE, "<", "plain"), 0x20: camera_record("<")})
    huge = struct.pack("<HHH", 2, 65535, 65535) + bytes(58)
    bad = {
        "1 of its 2 parts": good.replace(b"FLIR\0\1\1\1", b"XXXX\0\1\1\1"),
        "no raw image": container({0x20: camera_record("<")}),
        "a raw image of 65535 x 65535": container({1: huge}),
        "bytes of a raw image": container({1: raw_record(SCENE, "<", "plain")[:-9]}),
        "ends behind the file": good.replace(
            struct.pack(">I", len(raw_record(SCENE, "<", "plain"))), b"\x7f\xff\xff\xff", 1
        ),
        "not FLIR's container": good.replace(b"FFF\0", b"GGG\0"),
        "impossible Planck": container(
            {1: raw_record(SCENE, "<", "PNG"), 0x20: camera_record("<", (1.0, -5.0, 1, 0, 1))}
        ),
    }
    for message, data in bad.items():
        with pytest.raises(ValueError, match=rf"x\.jpg: .*{message}"):
            infrared_files.read_infrared(data, "x.jpg")
    for cut in range(20, len(good), 97):
        with contextlib.suppress(
            ValueError
        ):  # one sentence or the whole image, never another error
            infrared_files.read_infrared(good[:cut], "x.jpg")
    with pytest.raises(ValueError, match="x.jpg: no Planck constants"):
        only = container({1: raw_record(SCENE, "<", "plain")})
        infrared_files.read_infrared(only, "x.jpg", "kelvin")


def write_cameras(root, constants):
    names = [f"s{i}" for i in range(len(constants))]
    tiny.folders(root, names, size=SCENE.shape)
    for i, values in enumerate(constants):
        (root / "infrared" / f"s{i}.png").unlink()
        counts = np.rint(thermal(i)).astype(np.uint16)
        records = {1: raw_record(counts, "<", "PNG"), 0x20: camera_record("<", values)}
        (root / "infrared" / f"s{i}.jpg").write_bytes(container(records))
    return root


def test_cameras_of_other_constants_need_a_temperature(tmp_path):
    one, other = (17000.0, 1430.0, 1.0, -6500, 0.0125), (16000.0, 1420.0, 1.0, -6000, 0.0125)
    write_cameras(tmp_path, [one] * 6 + [other] * 4)
    with pytest.raises(ValueError, match="different Planck constants.*--unit kelvin"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, "--unit", "celsius")["window"]["unit"] == "celsius"


def test_counts_that_are_called_kelvin_are_said(tmp_path, capsys):
    write_infrared(tmp_path, lambda c, i: c, 12)
    run(tmp_path, "--unit", "kelvin")
    assert "cannot be the temperature of a scene" in capsys.readouterr().out
    run(tmp_path, "--unit", "kelvin", "--scale", 0.0125, out="scaled")
    assert "cannot be the temperature of a scene" not in capsys.readouterr().out


@pytest.mark.parametrize("unit", ["kelvin", "celsius"])
def test_npy_of_temperatures_keeps_its_unit(tmp_path, unit):
    write_infrared(tmp_path, lambda c, i: c / 80 - (273.15 if unit == "celsius" else 0), 12, "f4")
    manifest = run(tmp_path, "--unit", unit)
    pairs = opened(tmp_path)
    assert manifest["window"]["unit"] == pairs.window.unit == unit
    kelvin = radiometry.to_kelvin(pairs.pair(0).infrared, unit)
    assert np.abs(kelvin - thermal(int(pairs.names[0][1:])) / 80).max() < 1e-3


FACTS = {"unit": "kelvin", "scale": 0.0125, "offset": 0.5}


def test_the_unit_beside_the_files_is_followed(tmp_path, capsys):
    write_infrared(tmp_path, lambda c, i: c, 12)
    for path in list((tmp_path / "infrared").iterdir()):
        path.with_suffix(".json").write_text(json.dumps(FACTS))
    window = run(tmp_path)["window"]
    assert window["unit"] == "kelvin" and "from beside the files" in capsys.readouterr().out
    assert window["low"] == pytest.approx(LOW * 0.0125 + 0.5, abs=1)
    counts = run(tmp_path, "--unit", "counts", out="told")["window"]
    assert counts["low"] > 20000 and counts["unit"] == "counts"  # what is given is followed
    (tmp_path / "infrared" / "s3.json").write_text(json.dumps(FACTS | {"scale": 0.02}))
    with pytest.raises(ValueError, match=r"s3\.png has .* beside it.*give --unit"):
        run(tmp_path, out="other")


@pytest.mark.parametrize("unit", list(radiometry.TEMPERATURES))
def test_units_of_temperature_and_their_inverse(unit):
    kelvin = np.linspace(200, 700, 1001)
    values = radiometry.from_kelvin(kelvin, unit)
    assert np.allclose(radiometry.to_kelvin(values, unit), kelvin, atol=1e-9)
    freezing = {"kelvin": 273.15, "celsius": 0, "fahrenheit": 32, "centikelvin": 27315}[unit]
    assert radiometry.to_kelvin(np.float64(freezing), unit) == pytest.approx(273.15)


def test_mean_absolute_error_in_kelvin():
    """Against the formula by hand: celsius, and a camera's counts."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.random((3, 1, 8, 9), dtype=np.float32)) for _ in range(2))
    window = make_window(-20, 60, "celsius")
    expected = 80 * (x.double() - y).abs().mean((1, 2, 3))
    found = radiometry.mae_kelvin(x, y, window.restore, "celsius")
    assert found.shape == (3,) and torch.allclose(found.double(), expected, atol=1e-4)
    planck = radiometry.Planck(17000.0, 1430.0, 1.0, -6500.0, 0.0125)
    window = make_window(LOW, HIGH)
    found = radiometry.mae_kelvin(x, y, window.restore, "counts", planck)
    a, b = (
        1430.0 / np.log(17000 / (0.0125 * (LOW + 3000 * z.double() - 6500)) + 1) for z in (x, y)
    )
    assert torch.allclose(found.double(), (a - b).abs().mean((1, 2, 3)), atol=1e-3)
    assert (radiometry.mae_kelvin(x, x, window.restore, "counts", planck) == 0).all()
    with pytest.raises(ValueError, match="'counts' is no unit of temperature"):
        radiometry.mae_kelvin(x, y, window.restore, "counts")
    with pytest.raises(ValueError, match="cannot be compared"):
        radiometry.mae_kelvin(x, y[:, 0], window.restore, "celsius")


# ---------------------------------------------------------------------------- false colour

PALETTES = ["inferno", "jet", "hot", "viridis", "gray", "turbo", "hot_r"]


def coloured(levels: np.ndarray, palette: str) -> np.ndarray:
    table = np.rint(matplotlib.colormaps[palette](np.arange(256) / 255)[:, :3] * 255)
    return table.astype(np.uint8)[levels]


@pytest.mark.parametrize("palette", PALETTES)
def test_false_colour_is_inverted_to_the_resolution_of_its_palette(palette):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = infrared_files.read_infrared(tiny.png(coloured(levels, palette)), "x", palette=palette)
    stored = decoding.decode_infrared(read.stored, "row")
    assert np.array_equal(coloured(stored, palette), coloured(levels, palette))
    if len(np.unique(coloured(levels, palette).reshape(-1, 3), axis=0)) == 256:
        assert np.array_equal(stored, levels)


def test_false_colour_survives_a_jpeg_nearly():
    smooth = ((thermal(2, (96, 128)) - LOW) / (HIGH - LOW) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(coloured(smooth, "inferno"))
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    read = infrared_files.read_infrared(buffer.getvalue(), "x", palette="inferno")
    assert np.abs(read.values.astype(int) - smooth).mean() < 3


def test_a_set_in_false_colour_is_prepared_through_its_palette_or_refused(tmp_path):
    tiny.folders(tmp_path, [f"s{i}" for i in range(12)])
    for i in range(12):
        image = coloured(tiny.infrared(i), "inferno")
        (tmp_path / "infrared" / f"s{i}.png").write_bytes(tiny.png(image))
    with pytest.raises(ValueError, match="coloured.*--palette NAME"):
        run(tmp_path)
    with pytest.raises(ValueError, match="not those of palette viridis"):
        run(tmp_path, "--palette", "viridis")
    with pytest.raises(ValueError, match="--palette infrno: .*near: inferno"):
        run(tmp_path, "--palette", "infrno")
    assert not (tmp_path / "out").exists()
    run(tmp_path, "--palette", "inferno")
    pairs = opened(tmp_path)
    for k, name in enumerate(pairs.names):
        expected = tiny.infrared(int(name[1:]))
        assert np.array_equal(
            coloured(pairs.pair(k).infrared, "inferno"), coloured(expected, "inferno")
        )


@pytest.mark.parametrize("kind", ["png16", "tiff"])
def test_what_generate_writes_is_prepared_without_being_told_its_unit(tmp_path, kind):
    """Counts of a camera: back to the count through the sidecar; as TIFF in kelvin."""
    planck = radiometry.Planck(17000.0, 1430.0, 1.0, -6500.0, 0.0125)
    window = make_window(LOW, HIGH)
    tiny.folders(tmp_path, [f"s{i}" for i in range(12)], size=(48, 64))
    for i in range(12):
        (tmp_path / "infrared" / f"s{i}.png").unlink()
        values = window.normalise(np.rint(thermal(i)))
        to = outputs.make_format(kind, window, planck, whole=False)
        for suffix, data in outputs.encode(values, to).items():
            (tmp_path / "infrared" / f"s{i}{suffix}").write_bytes(data)
    manifest = run(tmp_path)
    pairs = opened(tmp_path)
    assert manifest["window"]["unit"] == ("counts" if kind == "png16" else "kelvin")
    for k, name in enumerate(pairs.names):
        found, counts = pairs.pair(k).infrared, np.rint(thermal(int(name[1:])))
        if kind == "png16":
            assert pairs.planck == planck and np.array_equal(found, counts)
        else:
            assert pairs.planck is None and np.array_equal(np.rint(planck.to_counts(found)), counts)


def test_window_and_constants_go_with_the_rows_without_their_manifest(tmp_path):
    write_cameras(tmp_path, [(17000.0, 1430.0, 1.0, -6500, 0.0125)] * 10)
    manifest = run(tmp_path)
    before = opened(tmp_path)
    (tmp_path / "out" / "manifest.json").unlink()
    pairs = opened(tmp_path)
    assert pairs.window == before.window == tuple(manifest["window"].values())
    assert pairs.planck == before.planck and pairs.planck.O == -6500
    (tmp_path / "b").mkdir()
    run(write_infrared(tmp_path / "b", lambda c, i: c - 500), "--source", "b", out="set")
    shard = tmp_path / "b" / "set" / "train-00000.parquet"
    shutil.copy(shard, tmp_path / "out" / "train-00001.parquet")
    with pytest.raises(ValueError, match="another window than .*set data.window"):
        opened(tmp_path)
