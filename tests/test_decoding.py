"""Decoding without loss, one rule of orientation, refusal of bad files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from data import decoding
from data.materials import PALETTES

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
COUNTS = RNG.integers(0, 65536, (12, 16), dtype=np.uint16)
DECODERS = [decoding.decode_visible, decoding.decode_infrared, decoding.decode_semantic]


def encode(array, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=format, **options)
    return buffer.getvalue()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width, height, depth=8, colour=2, rows=b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_files_decode_exactly(format):
    decoded = decoding.decode_infrared(encode(COUNTS, format), "x")
    assert decoded.dtype == np.uint16 and np.array_equal(decoded, COUNTS)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i4", "<f4", "<f8", "<f2"])
def test_npy_of_every_number_type_decodes_exactly(dtype):
    values = (np.arange(12 * 16) % 200).reshape(12, 16).astype(dtype)
    for shape in ((12, 16), (12, 16, 1), (1, 12, 16)):
        decoded = decoding.decode_infrared(npy(values.reshape(shape)), "x")
        assert decoded.dtype in (np.uint8, np.uint16, np.float32)
        assert np.array_equal(decoded.astype(np.float64), values.astype(np.float64))


def test_float_tiff_keeps_kelvin():
    kelvin = RNG.uniform(250, 330, (12, 16)).astype(np.float32)
    assert np.array_equal(decoding.decode_infrared(encode(kelvin, "TIFF"), "x"), kelvin)


def test_sixteen_bit_png_of_three_equal_channels_keeps_its_low_bytes():
    decoded = decoding.decode_infrared(wide_png(COUNTS), "x")
    assert decoded.dtype == np.uint16 and np.array_equal(decoded, COUNTS)


def test_grey_infrared_in_three_channels_becomes_one():
    grey = np.clip(np.add.outer(np.arange(64) * 2, np.arange(96)), 0, 255).astype(np.uint8)
    equal = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(decoding.decode_infrared(encode(equal), "x"), grey)
    nearly = equal.copy()
    nearly[:, :, 0] = np.clip(nearly[:, :, 0].astype(int) + 2, 0, 255)
    decoded = decoding.decode_infrared(encode(nearly, "JPEG", quality=90), "x")
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
    with pytest.raises(ValueError, match="x: an infrared TIFF of 16 bits per channel"):
        decoding.decode_infrared(data, "x")


def test_class_ids_of_few_bits_are_read_as_stored_and_those_of_a_jpeg_refused():
    for depth, most in ((2, 3), (4, 8)):
        row = np.arange(most + 1, dtype=np.uint8)
        bits = "".join(f"{i:0{depth}b}" for i in row)
        packed = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))
        data = png_of(most + 1, 1, depth, 0, b"\0" + packed)
        assert np.array_equal(decoding.decode_semantic(data, "x"), row[None])
    with pytest.raises(ValueError, match="x: class ids in a JPEG"):
        decoding.decode_semantic(encode(np.zeros((16, 16), np.uint8), "JPEG"), "x")


def test_infrared_in_printing_colours_is_refused_by_its_name():
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="x: an infrared image in CMYK, expected one channel"):
        decoding.decode_infrared(buffer.getvalue(), "x")


def test_false_colour_infrared_is_refused_with_the_reason():
    ramp = np.arange(256, dtype=np.uint8)
    colour = np.tile(np.stack([ramp, np.roll(ramp, 80), 255 - ramp], axis=1), (8, 1, 1))
    with pytest.raises(ValueError, match=r"hot\.png: .*coloured.*false-colour palette"):
        decoding.decode_infrared(encode(colour), "hot.png")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_infrared_that_is_not_finite_is_refused(bad):
    values = np.ones((4, 4), dtype=np.float32)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"x\.npy: 1 infrared values are NaN"):
        decoding.decode_infrared(npy(values), "x.npy")


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2, 1), (5, 4, 6), (0, 4)])
def test_infrared_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"x: "):
        decoding.decode_infrared(npy(np.ones(shape, dtype=np.float32)), "x")


@pytest.mark.parametrize("array", [RGB[:, :, 0], COUNTS, np.dstack([RGB, RGB[:, :, :1]])])
def test_visible_of_another_channel_count_or_transparency_is_refused(array):
    with pytest.raises(ValueError, match=r"v\.png: the visible image"):
        decoding.decode_visible(encode(array), "v.png")


def test_opaque_alpha_is_dropped():
    opaque = np.dstack([RGB, np.full((12, 16), 255, np.uint8)])
    assert np.array_equal(decoding.decode_visible(encode(opaque), "x"), RGB)


@pytest.mark.parametrize(
    "decode, format",
    [
        (decode, format)
        for format in ("PNG", "JPEG", "TIFF")
        for decode in DECODERS
        if (decode, format) != (decoding.decode_semantic, "JPEG")
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
        decoding.decode_infrared(npy(np.ones((50, 50)))[:-8], "x")
    buffer = io.BytesIO()
    np.save(buffer, np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match="object"):
        decoding.decode_infrared(buffer.getvalue(), "x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decode", DECODERS)
def test_a_billion_pixels_are_refused_from_the_header(decode, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    for width, height in ((40000, 25000), (11000, 10000)):
        with pytest.raises(ValueError, match=r"big: .*pixels"):
            decode(png_of(width, height), "big")


@pytest.mark.parametrize("decode", DECODERS)
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
        decoding.decode_infrared(buffer.getvalue(), "x")


def exif(orientation) -> Image.Exif:
    made = Image.Exif()
    made[274] = orientation
    return made


def with_exif(png: bytes, orientation: int) -> bytes:
    """A PNG with a chunk eXIf behind its header."""
    return png[:33] + chunk(b"eXIf", exif(orientation).tobytes()[6:]) + png[33:]


def wide_png(counts: np.ndarray) -> bytes:
    """16-bit PNG of three equal channels, which PIL neither writes nor reads in full."""
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in counts)
    return png_of(counts.shape[1], counts.shape[0], 16, 2, rows)


def tiff(counts: np.ndarray, **tags) -> bytes:
    buffer = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(buffer, counts, photometric="minisblack", **tags)
    return buffer.getvalue()


ENCODED = {  # how each decoder is reached: bytes with an orientation, what they show unturned
    "8-bit PNG": (lambda o: encode(RGB[:, :, 0], exif=exif(o)), RGB[:, :, 0]),
    "16-bit PNG": (lambda o: encode(COUNTS, exif=exif(o)), COUNTS),
    "16-bit PNG of three channels": (lambda o: with_exif(wide_png(COUNTS), o), COUNTS),
    "16-bit TIFF": (lambda o: tiff(COUNTS, extratags=[(274, "H", 1, o, True)]), COUNTS),
    "lossless WebP": (
        lambda o: encode(np.repeat(RGB[:, :, :1], 3, 2), "WEBP", lossless=True, exif=exif(o)),
        RGB[:, :, 0],
    ),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ENCODED)
def test_every_decoder_turns_the_image_upright_by_one_rule(kind, orientation):
    encoded, shown = ENCODED[kind]
    turned = Image.fromarray(np.arange(12 * 16, dtype=np.uint8).reshape(12, 16))
    turned.getexif()[274] = orientation
    upright = shown.ravel()[np.array(ImageOps.exif_transpose(turned))]  # as PIL moves the pixels
    assert np.array_equal(decoding.decode_infrared(encoded(orientation), "x"), upright)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_photographs_and_class_images_are_turned_as_the_infrared_is(orientation):
    data = encode(RGB, exif=exif(orientation))
    assert np.array_equal(
        decoding.decode_visible(data, "x")[:, :, 0],
        decoding.decode_infrared(encode(RGB[:, :, 0], exif=exif(orientation)), "x"),
    )
    ids = RNG.integers(0, 9, (12, 16)).astype(np.uint8)
    colours = np.asarray(PALETTES["msrs"], dtype=np.uint8)[ids]
    plain = decoding.decode_semantic(encode(ids, exif=exif(orientation)), "x")
    assert np.array_equal(plain, decoding.upright(ids, orientation))
    coloured = decoding.decode_semantic(encode(colours, exif=exif(orientation)), "x", "msrs")
    assert np.array_equal(coloured, plain)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    data = with_exif(wide_png(COUNTS), orientation)
    assert np.array_equal(decoding.decode_infrared(data, "x"), COUNTS)


@pytest.mark.parametrize("dtype", ["i1", "u2", "i2", "i4", "f4"])
@pytest.mark.parametrize("order", "<>")
def test_numbers_of_a_tiff_keep_their_sign_and_digits(dtype, order):
    values = (np.arange(48).reshape(6, 8) * (2 if dtype == "i1" else 5)).astype(dtype)
    values -= np.array(0 if dtype == "u2" else 50, dtype)
    decoded = decoding.decode_infrared(tiff(values, byteorder=order), "x")
    assert np.array_equal(decoded.astype(np.float64), values.astype(np.float64))


@pytest.mark.parametrize(
    "dtype, message",
    [
        ("f8", "a TIFF of 64-bit floating-point numbers; save it as"),
        ("f2", "a TIFF of 16-bit floating-point numbers"),
        ("i8", "a TIFF of 64-bit signed integers"),
        ("u8", "a TIFF of 64-bit unsigned integers"),
        (">u4", "a TIFF of 32-bit unsigned integers"),
        ("<u4", "integers from 3000000000 to 3000000047 do not fit"),  # and not from -1294967296
    ],
)
def test_numbers_that_would_lose_digits_are_refused_by_name(dtype, message):
    values = np.arange(48).reshape(6, 8) + (3_000_000_000 if dtype[-2:] == "u4" else 0)
    data = tiff(values.astype(dtype), byteorder=">" if dtype[0] == ">" else "<")
    with pytest.raises(ValueError, match=f"x: {message}"):
        decoding.decode_infrared(data, "x")


@pytest.mark.parametrize("dtype", ["<i8", "<u8", "<i4"])
def test_integers_above_what_float32_holds_are_refused(dtype):
    values = np.arange(48).reshape(6, 8).astype(dtype) + np.array(2**25, dtype)
    with pytest.raises(ValueError, match="x: integers from 33554432 to 33554479"):
        decoding.decode_infrared(npy(values), "x")


def test_float64_that_differs_in_digits_float32_lacks_is_refused():
    kelvin = RNG.uniform(290, 310, (12, 16))
    assert np.abs(decoding.decode_infrared(npy(kelvin), "x") - kelvin).max() < 2e-5
    with pytest.raises(ValueError, match="x: infrared from .* less than float32 can tell apart"):
        decoding.decode_infrared(npy(1e9 + kelvin), "x")


@pytest.mark.parametrize("most", [255, 1023, 4095, 16383, 65535])
def test_a_pgm_keeps_its_counts_whatever_its_maximum(most):
    counts = (np.arange(48).reshape(6, 8) * (most // 47)).astype(np.uint16)
    pixels = counts.astype(">u2" if most > 255 else "u1").tobytes()
    data = b"P5\n# made by a camera 7\n8 6\n%d\n" % most + pixels
    assert np.array_equal(decoding.decode_infrared(data, "x"), counts)


def test_semantic_ids_and_palettes():
    ids = RNG.integers(0, 9, (12, 16)).astype(np.uint8)
    assert np.array_equal(decoding.decode_semantic(encode(ids), "x"), ids)
    grey = np.repeat(ids[:, :, None], 3, axis=2)
    assert np.array_equal(decoding.decode_semantic(encode(grey), "x"), ids)
    colours = np.asarray(PALETTES["msrs"], dtype=np.uint8)[:9]
    assert np.array_equal(decoding.decode_semantic(encode(colours[ids]), "x", "msrs"), ids)
    with pytest.raises(ValueError, match="name its palette"):
        decoding.decode_semantic(encode(colours[ids]), "x")
    with pytest.raises(ValueError, match=r"labels\.png"):
        decoding.decode_semantic(encode(RGB), "labels.png", "msrs")


def test_radiometric_files_decode_as_pil_reads_them(real_data):
    for path in sorted((real_data / "flir_radiometric" / "infrared").glob("*.png")):
        counts = decoding.decode_infrared(path.read_bytes(), str(path))
        assert counts.dtype == np.uint16 and np.array_equal(counts, np.array(Image.open(path)))


def test_thermal_jpeg_of_three_channels_becomes_grey(real_data):
    path = next((real_data / "pv_aerial" / "infrared").glob("*.JPG"))
    assert decoding.decode_infrared(path.read_bytes(), str(path)).ndim == 2


def test_a_16_bit_tiff_in_which_0_is_white_is_refused():
    counts = np.arange(12, dtype="<u2").reshape(3, 4)
    ends = {256: 4, 257: 3, 258: 16, 259: 1, 262: 0, 273: 8, 277: 1, 278: 3, 279: 24}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in ends.items())
    data = b"II*\0" + struct.pack("<I", 32) + counts.tobytes() + struct.pack("<H", 9) + tags
    with pytest.raises(ValueError, match="x: a 16-bit TIFF in which 0 is white"):
        decoding.decode_infrared(data + bytes(4), "x")
    black = data.replace(struct.pack("<HHII", 262, 4, 1, 0), struct.pack("<HHII", 262, 4, 1, 1))
    assert np.array_equal(decoding.decode_infrared(black + bytes(4), "x"), counts)
