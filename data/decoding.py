"""Image files from bytes to arrays without loss, upright, checked; and PNG back to bytes."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from data import heif, pieces, tiff
from data.materials import decode_palette
from utils.files import read_limited

MAX_PIXELS = 100_000_000  # more is refused from the header, before any pixel is decoded
MOST_BYTES = 2**30  # of a file
# More bytes than these behind so many pixels are no image: 16 bits of 4 channels take 8 a pixel.
BYTES_A_PIXEL, BYTES_BESIDE = 32, 16 * 2**20
MOST_EXIF = 2**20  # bytes, of which PIL may unpack every one
# Channels of a grey image that went through a JPEG differ by a few levels, palettes by tens.
GREY_MEAN_SPREAD, GREY_LARGE_SPREAD, GREY_LARGE_SHARE = 4.0, 32, 0.001
# PIL knows many more, among them EPS, which it hands to Ghostscript: a program that it runs.
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
PNG = b"\x89PNG\r\n\x1a\n"
INFRARED_MODES = ("L", "LA", "RGB", "RGBA", "I", "F")  # of PIL, and I;16 in its byte orders

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we refuse instead


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises: ValueError: none, or too large. OSError: unreadable."""
    return read_limited(path, MOST_BYTES)


def open_image(data: bytes, where: str) -> Image.Image:
    """Header only: sizes are checked here, pixels are decoded by `load`.

    Raises: ValueError naming `where`: unreadable, too large, several frames, too much beside them.
    """
    formats = heif.formats_of(data, where) or FORMATS
    pieces.check(data, where)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise ValueError(f"{where}: more than {MAX_PIXELS:,} pixels, not decoded") from None
    except Exception as error:  # PIL raises a dozen types on foreign bytes
        kind = tiff.number_type(data)
        if kind not in ("", *tiff.READ):
            wanted = " or ".join(tiff.READ)
            raise ValueError(f"{where}: a TIFF of {kind}; save it as {wanted}") from None
        raise ValueError(f"{where}: not a readable image ({_short(error)})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{where}: {width} x {height} = {width * height:,} pixels, more than "
            f"{MAX_PIXELS:,}; not decoded"
        )
    if width == 0 or height == 0:
        raise ValueError(f"{where}: empty image, {width} x {height}")
    if len(data) > BYTES_BESIDE + BYTES_A_PIXEL * width * height:
        raise ValueError(f"{where}: {len(data):,} bytes for {width} x {height} pixels; not decoded")
    if len(image.info.get("exif", b"")) > MOST_EXIF:
        raise ValueError(f"{where}: more than {MOST_EXIF:,} bytes of EXIF; not decoded")
    if image.format != "MPO" and _second_frame(image, where):
        raise ValueError(f"{where}: several frames in one file, expected 1")
    return image


def _second_frame(image: Image.Image, where: str) -> bool:
    """Whether there is one; counting them all may take minutes."""
    if image.format not in ("TIFF", "GIF"):
        return getattr(image, "n_frames", 1) > 1  # from the header
    try:
        image.seek(1)
        return True
    except EOFError:
        image.seek(0)
        return False
    except Exception as error:
        raise ValueError(f"{where}: damaged or truncated image ({_short(error)})") from None


def _load(data: bytes, where: str) -> tuple[Image.Image, int]:
    """All pixels as stored, and the EXIF orientation (1 to 8), which is not yet applied."""
    image = open_image(data, where)
    try:
        image.load()  # before the orientation is asked for: PIL itself turns a TIFF while loading
        return image, _orientation(image)
    except Exception as error:
        raise ValueError(f"{where}: damaged or truncated image ({_short(error)})") from None


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where the EXIF is damaged or says nothing."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # PIL raises a dozen types on damaged EXIF
        return 1


def size_of(data: bytes, where: str) -> tuple[int, int]:
    """Height and width as viewed, from the header. Raises: ValueError: unreadable or too large."""
    image = open_image(data, where)
    return image.size if _orientation(image) in (5, 6, 7, 8) else image.size[::-1]


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H,W) or (H,W,C) as stored to as viewed: one rule for all decoders, whatever PIL does."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _short(error: Exception) -> str:
    text = str(error).split("<_io")[0].strip().splitlines()
    return text[0][:80] if text and text[0] else type(error).__name__


def _is_npy(data: bytes) -> bool:
    return data[:6] == b"\x93NUMPY"


def decode_visible(data: bytes, where: str) -> np.ndarray:
    """Encoded bytes to (H,W,3) uint8 RGB. An opaque alpha channel is dropped, any other refused.

    Raises: ValueError naming `where`: unreadable, truncated, too large, not three channels.
    """
    image, orientation = _load(data, where)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "RGBA":
        if np.asarray(image.getchannel("A")).min() < 255:
            raise ValueError(f"{where}: the visible image is partly transparent; flatten it first")
        image = image.convert("RGB")
    if image.mode != "RGB":
        channels = len(image.getbands())
        raise ValueError(
            f"{where}: the visible image has {channels} channel{'s' * (channels != 1)} "
            f"({image.mode}), expected 3 (RGB)"
        )
    return upright(np.asarray(image), orientation)


def decode_infrared(data: bytes, where: str) -> np.ndarray:
    """Encoded bytes (PNG, TIFF, JPEG, .npy, ...) to (H,W) uint8, uint16 or float32, without loss.

    Three channels that are equal, or equal but for JPEG noise, are averaged to one.
    Raises: ValueError naming `where`: unreadable, truncated, too large, NaN, false colour.
    """
    if _is_npy(data):
        return _as_counts(_decode_npy(data, where), where)
    if data[:8] == PNG and data[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        return _as_counts(_decode_wide_png(data, where), where)
    image, orientation = _load(data, where)
    if image.mode == "1":
        raise ValueError(f"{where}: the infrared image has 1 bit per pixel, expected 8 or more")
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode not in INFRARED_MODES and not image.mode.startswith("I;16"):
        raise ValueError(f"{where}: an infrared image in {image.mode}, expected one channel")
    # PIL keeps 8 of the 16 bits of several channels
    bits = max(getattr(image, "tag_v2", {}).get(tiff.BITS, (8,)))
    if bits > 8 and len(image.getbands()) > 1:
        raise ValueError(f"{where}: an infrared TIFF of {bits} bits per channel; save it with one")
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0:
        raise ValueError(f"{where}: a 16-bit TIFF in which 0 is white; save it with 0 as black")
    return _as_counts(upright(_numbers(image, data, where), orientation), where)


def decode_colours(data: bytes, where: str) -> np.ndarray:
    """(H,W,3) uint8 of an infrared image in false colour, upright."""
    image, orientation = _load(data, where)
    return upright(np.asarray(image.convert("RGB")), orientation)


def turned_as(array: np.ndarray, data: bytes, where: str) -> np.ndarray:
    """An image from inside a file turned as the file's own orientation says."""
    return upright(array, _orientation(open_image(data, where)))


def nodata_of(data: bytes) -> float | None:
    """The value that a TIFF's own tag (GDAL_NODATA) declares as no data; None without one."""
    if data[:2] not in (b"II", b"MM"):
        return None
    try:
        return tiff.nodata(Image.open(io.BytesIO(data), formats=("TIFF",)))
    except Exception:  # errors in the file are reported where its pixels are read
        return None


def _numbers(image: Image.Image, data: bytes, where: str) -> np.ndarray:
    """The pixels as numbers, with the sign and the digits that PIL would lose."""
    array = np.array(image)
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2")  # noqa: B009 - of TIFF images alone
        bits, kind = tiff.layout(tags.get)
        if kind == tiff.SIGNED and bits == 8:
            return array.view(np.int8)  # PIL reads them as 0 to 255
        if kind == tiff.UNSIGNED and bits == 32 and array.dtype == np.int32:
            return array.view(np.uint32)
    if image.format == "PPM" and array.dtype.kind == "i":
        # PIL stretches 16-bit values to 65535 by this factor, which can be undone exactly
        most = int(pieces.ppm_header(data)[3])
        return np.rint(array * (most / 65535)).astype(np.int32)
    return array


def _decode_npy(data: bytes, where: str) -> np.ndarray:
    """Shape and length are checked before memory is asked for."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = reader(stream)
        if dtype.hasobject:
            raise ValueError("object arrays are not images")
    except Exception as error:
        raise ValueError(f"{where}: not a readable .npy array ({_short(error)})") from None
    pixels = math.prod(shape)
    if min(shape, default=1) < 0 or pixels > MAX_PIXELS:
        number = f"{pixels:,}" if abs(pixels) < 10**30 else "far too many"
        raise ValueError(f"{where}: {number} values, more than {MAX_PIXELS:,}; not decoded")
    if len(data) - stream.tell() < pixels * dtype.itemsize:
        raise ValueError(f"{where}: truncated .npy array, shape {shape} needs more bytes")
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[:, :, 0]
    return array


def _decode_wide_png(data: bytes, where: str) -> np.ndarray:
    """16-bit PNG of several channels: PIL would silently drop the low byte."""
    from torchvision.io import ImageReadMode, decode_image

    _, orientation = _load(data, where)  # size and damage, in the sentences of every other file
    try:
        image = decode_image(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED
        )
    except RuntimeError as error:
        raise ValueError(f"{where}: damaged or truncated image ({_short(error)})") from None
    return upright(image.numpy().transpose(1, 2, 0), orientation)


def _as_counts(array: np.ndarray, where: str) -> np.ndarray:
    """One channel of a dtype that holds the counts exactly."""
    if array.ndim == 3 and array.shape[2] in (2, 4):
        opaque = 255 if array.dtype == np.uint8 else 65535
        if (array[:, :, -1] != opaque).any():
            raise ValueError(f"{where}: the infrared image is partly transparent; flatten it first")
        array = array[:, :, :-1]
    if array.ndim == 3 and array.shape[2] == 3:
        array = _average_grey(array, where)
    elif array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{where}: infrared of shape {array.shape}, expected (H, W)")
    if array.dtype.kind == "f":
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise ValueError(f"{where}: {bad} infrared values are NaN or infinite")
        with np.errstate(over="ignore"):
            values = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: infrared values exceed the range of float32")
        if array.dtype.itemsize > 4:
            _check_digits(array, values, where)
        return values
    if array.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: infrared of type {array.dtype}, expected numbers")
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high <= 65535:
        return array.astype(np.uint16)
    if max(-low, high) > 2**24:
        raise ValueError(f"{where}: integers from {low} to {high} do not fit float32 exactly")
    return array.astype(np.float32)


def _check_digits(exact: np.ndarray, values: np.ndarray, where: str) -> None:
    """Raises: ValueError: float32 is coarser than a 65535th of what the image spans."""
    span, lost = float(np.ptp(exact)), float(np.abs(exact - values).max())
    if lost * 65535 > span:
        raise ValueError(
            f"{where}: infrared from {exact.min():.17g} to {exact.max():.17g} differs by less than"
            f" float32 can tell apart (steps of {2 * lost:.2g}); subtract a constant first"
        )


def _average_grey(array: np.ndarray, where: str) -> np.ndarray:
    """Three nearly equal channels to one; colours of a palette have no order and are refused."""
    if (array[:, :, 0] == array[:, :, 1]).all() and (array[:, :, 0] == array[:, :, 2]).all():
        return array[:, :, 0]
    wide = array.astype(np.float32)
    unit = 257.0 if array.dtype == np.uint16 else 1.0
    if array.dtype.kind == "f":
        unit = max(float(np.ptp(wide)), 1e-30) / 255.0
    spread = np.ptp(wide, axis=2) / unit
    large = float((spread > GREY_LARGE_SPREAD).mean())
    if spread.mean() > GREY_MEAN_SPREAD or large > GREY_LARGE_SHARE:
        raise ValueError(
            f"{where}: the infrared image is coloured (channels differ by {spread.mean():.1f} of "
            f"255 on average, by more than {GREY_LARGE_SPREAD} in {large:.1%} of pixels): a "
            f"false-colour palette is not a temperature; export grey levels or raw counts, or give "
            f"prepare.py --palette NAME, the colormap of matplotlib with these colours"
        )
    mean = wide.mean(axis=2)
    return mean if array.dtype.kind == "f" else np.rint(mean).astype(array.dtype)


def decode_semantic(data: bytes, where: str, palette: str | None = None) -> np.ndarray:
    """Encoded bytes to (H,W) uint8 class ids; `palette` names the colour code of the image.

    Without a palette the pixel values (or palette indices) are the ids.
    Raises: ValueError naming `where`: unreadable, coloured without a palette, unknown colour.
    """
    if _is_npy(data):
        array = _decode_npy(data, where)
    else:
        image, orientation = _load(data, where)
        if palette:
            try:
                colours = upright(np.array(image.convert("RGB")), orientation)
                return decode_palette(colours, palette)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if image.format == "JPEG":
            raise ValueError(f"{where}: class ids in a JPEG, which changes them; save them as PNG")
        array = upright(np.array(image), orientation)
        if data[:8] == PNG and data[25] == 0 and data[24] in (2, 4):
            array = array // (255 // (2 ** data[24] - 1))  # PIL spreads few bits over 0 to 255
    if array.ndim == 3 and array.shape[2] == 3:
        if (array[:, :, 0] != array[:, :, 1]).any() or (array[:, :, 0] != array[:, :, 2]).any():
            raise ValueError(f"{where}: the class map is coloured; name its palette")
        array = array[:, :, 0]
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(f"{where}: class map of shape {array.shape}, {array.dtype}; expected ids")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 255:
        raise ValueError(f"{where}: class ids from {low} to {high}, expected 0 to 255")
    return array.astype(np.uint8)


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def encode_png(array: np.ndarray) -> bytes:
    """(H,W,3) uint8, (H,W) uint8 or (H,W) uint16 to PNG bytes, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def four_channels(path: Path) -> bool:
    """Whether a file is an 8-bit image of four channels."""
    try:
        return open_image(read_file(path), str(path)).mode == "RGBA"
    except (ValueError, OSError):
        return False


def split_channels(data: bytes, where: str) -> tuple[bytes, bytes]:
    """PNGs of the first three channels and of the fourth. Raises: ValueError: not four channels."""
    image, _ = _load(data, where)
    if image.mode != "RGBA":
        raise ValueError(
            f"{where}: visible and infrared in one file need 4 channels, has {image.mode}"
        )
    pixels = np.array(image)
    return encode_png(np.ascontiguousarray(pixels[..., :3])), encode_png(pixels[..., 3].copy())
