"""Decoding without loss, refusal of bad files, windows and inverse, augmentation, resizing."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from data import transforms as tf
from data.materials import PALETTES


def encode(array, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=format, **options)
    return buffer.getvalue()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png_of(width, height, depth=8, colour=2, rows=b"") -> bytes:
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
COUNTS = RNG.integers(0, 65536, (12, 16), dtype=np.uint16)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_files_decode_exactly(format):
    decoded = tf.decode_infrared(encode(COUNTS, format), "x")
    assert decoded.dtype == np.uint16 and np.array_equal(decoded, COUNTS)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i4", "<f4", "<f8", "<f2"])
def test_npy_of_every_number_type_decodes_exactly(dtype):
    values = (np.arange(12 * 16) % 200).reshape(12, 16).astype(dtype)
    for shape in ((12, 16), (12, 16, 1), (1, 12, 16)):
        decoded = tf.decode_infrared(npy(values.reshape(shape)), "x")
        assert decoded.dtype in (np.uint8, np.uint16, np.float32)
        assert np.array_equal(decoded.astype(np.float64), values.astype(np.float64))


def test_float_tiff_keeps_kelvin():
    kelvin = RNG.uniform(250, 330, (12, 16)).astype(np.float32)
    assert np.array_equal(tf.decode_infrared(encode(kelvin, "TIFF"), "x"), kelvin)


def test_sixteen_bit_png_of_three_equal_channels_keeps_its_low_bytes():
    rows = b"".join(
        b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in COUNTS
    )
    decoded = tf.decode_infrared(png_of(16, 12, 16, 2, rows), "x")
    assert decoded.dtype == np.uint16 and np.array_equal(decoded, COUNTS)


@pytest.mark.parametrize("window", [(0.0, 65535.0), (13366.0, 15865.0), (-40.0, 70000.0)])
def test_window_and_its_inverse_restore_counts_exactly(window):
    low, high = max(0, int(window[0])), min(65535, int(window[1]))
    counts = np.arange(low, high + 1, dtype=np.uint16)
    made = tf.make_window(*window)
    values = made.normalise(counts)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1
    assert np.abs(made.restore(values) - counts).max() < 0.01
    restored = made.restore(torch.from_numpy(values))
    assert np.array_equal(np.rint(restored.numpy()).astype(np.uint16), counts)


def test_window_clips_what_lies_outside():
    assert tf.make_window(10, 20).normalise(np.array([0, 10, 15, 20, 99])).tolist() == [
        0,
        0,
        0.5,
        1,
        1,
    ]


@pytest.mark.parametrize("low, high", [(1, 1), (2, 1), (0, float("nan")), (0, float("inf"))])
def test_window_without_extent_is_refused(low, high):
    with pytest.raises(ValueError, match="low < high"):
        tf.make_window(low, high)


def test_grey_infrared_in_three_channels_becomes_one():
    grey = np.clip(np.add.outer(np.arange(64) * 2, np.arange(96)), 0, 255).astype(np.uint8)
    equal = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(tf.decode_infrared(encode(equal), "x"), grey)
    nearly = equal.copy()
    nearly[:, :, 0] = np.clip(nearly[:, :, 0].astype(int) + 2, 0, 255)
    decoded = tf.decode_infrared(encode(nearly, "JPEG", quality=90), "x")
    assert decoded.shape == grey.shape and np.abs(decoded.astype(int) - grey).mean() < 3


def test_a_tiff_of_wide_channels_is_refused_and_not_cut_to_8_bits():
    """PIL has no writer for it: one strip of 4 x 2 pixels, three channels of 16 bits."""
    counts = np.repeat(np.arange(7300, 7308, dtype="<u2").reshape(2, 4, 1), 3, axis=2)
    fields = [
        (256, 3, 1, 4),
        (257, 3, 1, 2),
        (258, 3, 3, 134),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 140),
        (277, 3, 1, 3),
        (278, 3, 1, 2),
        (279, 4, 1, 48),
        (284, 3, 1, 1),
    ]
    data = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(fields))
    data += b"".join(struct.pack("<HHII", *field) for field in fields) + struct.pack("<I", 0)
    data += struct.pack("<3H", 16, 16, 16) + counts.tobytes()
    with pytest.raises(ValueError, match="x: an infrared TIFF of 16 bits a channel"):
        tf.decode_infrared(data, "x")


def test_class_ids_of_few_bits_are_read_as_stored_and_those_of_a_jpeg_refused():
    for depth, most in ((2, 3), (4, 8)):
        row = np.arange(most + 1, dtype=np.uint8)
        bits = "".join(f"{i:0{depth}b}" for i in row)
        packed = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))
        data = png_of(most + 1, 1, depth, 0, b"\0" + packed)
        assert np.array_equal(tf.decode_semantic(data, "x"), row[None])
    with pytest.raises(ValueError, match="x: class ids in a JPEG"):
        tf.decode_semantic(encode(np.zeros((16, 16), np.uint8), "JPEG"), "x")


def test_infrared_in_printing_colours_is_refused_by_its_name():
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="x: an infrared image in CMYK, expected one channel"):
        tf.decode_infrared(buffer.getvalue(), "x")


def test_false_colour_infrared_is_refused_with_the_reason():
    ramp = np.arange(256, dtype=np.uint8)
    colour = np.tile(np.stack([ramp, np.roll(ramp, 80), 255 - ramp], axis=1), (8, 1, 1))
    with pytest.raises(ValueError, match=r"hot\.png: .*coloured.*false-colour palette"):
        tf.decode_infrared(encode(colour), "hot.png")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_infrared_that_is_not_finite_is_refused(bad):
    values = np.ones((4, 4), dtype=np.float32)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"x\.npy: 1 infrared values are NaN"):
        tf.decode_infrared(npy(values), "x.npy")


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2, 1), (5, 4, 6), (0, 4)])
def test_infrared_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"x: "):
        tf.decode_infrared(npy(np.ones(shape, dtype=np.float32)), "x")


@pytest.mark.parametrize("array", [RGB[:, :, 0], COUNTS, np.dstack([RGB, RGB[:, :, :1]])])
def test_visible_of_another_channel_count_or_transparency_is_refused(array):
    with pytest.raises(ValueError, match=r"v\.png: the visible image"):
        tf.decode_visible(encode(array), "v.png")


def test_opaque_alpha_is_dropped():
    opaque = np.dstack([RGB, np.full((12, 16), 255, np.uint8)])
    assert np.array_equal(tf.decode_visible(encode(opaque), "x"), RGB)


@pytest.mark.parametrize(
    "decode, format",
    [
        (decode, format)
        for format in ("PNG", "JPEG", "TIFF")
        for decode in (tf.decode_visible, tf.decode_infrared, tf.decode_semantic)
        if (decode, format) != (tf.decode_semantic, "JPEG")
    ],
)
def test_truncated_images_are_refused_at_every_length(decode, format):
    grey = np.repeat(RGB[:, :, :1], 3, axis=2)
    data = encode(np.tile(grey, (8, 8, 1)), format)
    decode(data, "x")
    for share in (0.0, 0.01, 0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match=r"cut\.img: "):
            decode(data[: int(len(data) * share)], "cut.img")


def test_truncated_or_pickled_npy_is_refused():
    with pytest.raises(ValueError, match="truncated"):
        tf.decode_infrared(npy(np.ones((50, 50)))[:-8], "x")
    buffer = io.BytesIO()
    np.save(buffer, np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match="object"):
        tf.decode_infrared(buffer.getvalue(), "x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decode", [tf.decode_visible, tf.decode_infrared, tf.decode_semantic])
def test_a_billion_pixels_are_refused_from_the_header(decode, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    for width, height in ((40000, 25000), (11000, 10000)):
        with pytest.raises(ValueError, match=r"big: .*pixels"):
            decode(png_of(width, height), "big")


@pytest.mark.parametrize("decode", [tf.decode_visible, tf.decode_infrared, tf.decode_semantic])
def test_no_image_makes_pil_run_a_program(decode, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript ran"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="x: not a readable image"):
        decode(eps, "x")


def test_a_billion_values_of_npy_are_refused_from_the_header():
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (40000, 25000)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with pytest.raises(ValueError, match="1,000,000,000"):
        tf.decode_infrared(buffer.getvalue(), "x")


@pytest.mark.parametrize("array, decode", [(RGB, tf.decode_visible), (COUNTS, tf.decode_infrared)])
def test_exif_orientation_turns_the_image_upright(array, decode):
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[274] = 6  # turn by 90 degrees clockwise to view
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode(buffer.getvalue(), "x"), np.rot90(array, -1))


def test_semantic_ids_and_palettes():
    ids = RNG.integers(0, 9, (12, 16)).astype(np.uint8)
    assert np.array_equal(tf.decode_semantic(encode(ids), "x"), ids)
    grey = np.repeat(ids[:, :, None], 3, axis=2)
    assert np.array_equal(tf.decode_semantic(encode(grey), "x"), ids)
    colours = np.asarray(PALETTES["msrs"], dtype=np.uint8)[:9]
    assert np.array_equal(tf.decode_semantic(encode(colours[ids]), "x", "msrs"), ids)
    with pytest.raises(ValueError, match="name its palette"):
        tf.decode_semantic(encode(colours[ids]), "x")
    with pytest.raises(ValueError, match=r"labels\.png"):
        tf.decode_semantic(encode(RGB), "labels.png", "msrs")


def test_sizes_that_differ_are_named():
    with pytest.raises(ValueError, match="16 x 12.*infrared is 12 x 16"):
        tf.make_pair(RGB, COUNTS.T, None, "row 3")


def make_pair():
    position = np.arange(40 * 60).reshape(40, 60)
    visible = np.stack([position % 256] * 3, axis=2).astype(np.uint8)
    return tf.Pair(visible, position.astype(np.uint16), (position % 251).astype(np.uint8))


def test_augmentation_moves_all_images_alike():
    cfg = tf.AugmentConfig(flip=0.5, crop_scale=[0.4, 1.0], brightness=0, contrast=0)
    flipped, sides = set(), []
    for seed in range(20):
        pair = tf.augment(make_pair(), cfg, np.random.default_rng(seed))
        assert np.array_equal(pair.visible[:, :, 0], pair.infrared % 256)
        assert np.array_equal(pair.semantic, pair.infrared % 251)
        flipped.add(bool(pair.infrared[0, 0] > pair.infrared[0, -1]))
        height, width = pair.infrared.shape
        sides.append(height)
        assert abs(width / height - 1.5) < 0.1
    assert flipped == {True, False} and 16 <= min(sides) < 22 and 34 < max(sides) <= 40


def test_exposure_changes_the_visible_only():
    cfg = tf.AugmentConfig(flip=0, crop_scale=[1.0, 1.0], brightness=0.5, contrast=0.5)
    pair = tf.augment(make_pair(), cfg, np.random.default_rng(1))
    assert np.array_equal(pair.infrared, make_pair().infrared)
    assert not np.array_equal(pair.visible, make_pair().visible)


def test_one_option_leaves_the_randomness_of_the_others():
    plain = tf.AugmentConfig(flip=0, brightness=0, contrast=0)
    other = tf.AugmentConfig(flip=1, brightness=0.3, contrast=0.3)
    a = tf.augment(make_pair(), plain, np.random.default_rng(7))
    b = tf.augment(make_pair(), other, np.random.default_rng(7))
    assert np.array_equal(a.infrared, b.infrared[:, ::-1])


@pytest.mark.parametrize(
    "options",
    [{"crop_scale": [0.0, 1.0]}, {"crop_scale": [1.0, 0.5]}, {"flip": 2.0}, {"contrast": -0.1}],
)
def test_augmentation_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError):
        tf.AugmentConfig(**options)


def test_resizing_to_the_same_size_changes_nothing():
    pair = make_pair()
    same = tf.resize(pair, (40, 60))
    assert all(a is b for a, b in zip(pair, same))


def test_resizing_keeps_16_bit_steps_and_does_not_mix_class_ids():
    infrared = np.repeat(np.arange(30000, 30040, dtype=np.uint16)[:, None], 60, axis=1)
    ids = np.where(np.arange(60) % 3 == 0, 200, 0).astype(np.uint8)[None].repeat(40, axis=0)
    pair = tf.resize(make_pair()._replace(infrared=infrared, semantic=ids), (20, 30))
    assert pair.infrared.dtype == np.float32
    # each output row is the antialiased mean around two input rows
    assert np.abs(pair.infrared[2:-2, 0] - np.arange(30004.5, 30036, 2)).max() < 0.01
    assert set(np.unique(pair.semantic)) == {0, 200}
    assert pair.visible.shape == (20, 30, 3)


def test_tensors_have_the_shapes_and_ranges_of_the_contract():
    sample = tf.to_tensors(make_pair(), tf.make_window(0, 2399))
    assert sample["visible"].shape == sample["infrared"].shape == (3, 40, 60)
    assert sample["visible"].dtype == sample["infrared"].dtype == torch.float32
    assert sample["infrared"].min() == 0 and sample["infrared"].max() == 1
    assert torch.equal(sample["infrared"][0], sample["infrared"][2])
    assert sample["semantic"].dtype == torch.int64 and sample["semantic"].shape == (40, 60)
    unlabelled = tf.to_tensors(make_pair()._replace(semantic=None), None)
    assert (unlabelled["semantic"] == 255).all()
    assert unlabelled["infrared"].min() == 0 and unlabelled["infrared"].max() == 1


def test_radiometric_files_decode_as_pil_reads_them(real_data):
    for path in sorted((real_data / "flir_radiometric" / "infrared").glob("*.png")):
        counts = tf.decode_infrared(path.read_bytes(), str(path))
        assert counts.dtype == np.uint16 and np.array_equal(counts, np.array(Image.open(path)))


def test_thermal_jpeg_of_three_channels_becomes_grey(real_data):
    path = next((real_data / "pv_aerial" / "infrared").glob("*.JPG"))
    assert tf.decode_infrared(path.read_bytes(), str(path)).ndim == 2


def test_a_16_bit_tiff_in_which_0_is_white_is_refused():
    counts = np.arange(12, dtype="<u2").reshape(3, 4)
    ends = {256: 4, 257: 3, 258: 16, 259: 1, 262: 0, 273: 8, 277: 1, 278: 3, 279: 24}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in ends.items())
    data = b"II*\0" + struct.pack("<I", 32) + counts.tobytes() + struct.pack("<H", 9) + tags
    with pytest.raises(ValueError, match="x: a 16-bit TIFF in which 0 is white"):
        tf.decode_infrared(data + bytes(4), "x")
    black = data.replace(struct.pack("<HHII", 262, 4, 1, 0), struct.pack("<HHII", 262, 4, 1, 1))
    assert np.array_equal(tf.decode_infrared(black + bytes(4), "x"), counts)
