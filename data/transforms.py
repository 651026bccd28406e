"""Decode, window, augment and resize a pair of images: the only place where ranges change."""

import copy
import io
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from data.materials import decode_palette

MAX_PIXELS = 100_000_000  # more is refused from the header, before any pixel is decoded
# Channels of a grey image that went through a JPEG differ by a few levels, palettes by tens.
GREY_MEAN_SPREAD, GREY_LARGE_SPREAD, GREY_LARGE_SHARE = 4.0, 32, 0.001
# PIL knows many more, among them EPS, which it hands to Ghostscript: a program that it runs.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
PNG = b"\x89PNG\r\n\x1a\n"
INFRARED_MODES = ("L", "LA", "RGB", "RGBA", "I", "F")  # of PIL, and I;16 in its byte orders

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we refuse instead


class Pair(NamedTuple):
    """One scene before it becomes tensors: arrays of one height and width.

    visible (H,W,3) uint8; infrared (H,W) uint8, uint16 or float32 counts; semantic (H,W) uint8
    class ids with 255 = unlabelled, or None where the row has none.
    """

    visible: np.ndarray
    infrared: np.ndarray
    semantic: np.ndarray | None = None


class Window(NamedTuple):
    """The counts (or unit values) that map to 0 and 1; a property of the data set."""

    low: float
    high: float
    unit: str = "counts"

    def normalise(self, counts: np.ndarray) -> np.ndarray:
        """Counts of any dtype to float32 in [0, 1]; what lies outside the window is clipped."""
        # float64 until the end: float32 would lose the last bits of large counts less a large low
        scaled = (counts.astype(np.float64) - self.low) / (self.high - self.low)
        return np.clip(scaled, 0.0, 1.0).astype(np.float32)

    def restore(self, values):
        """[0, 1] back to counts, for numpy arrays and tensors: the inverse of `normalise`."""
        if isinstance(values, torch.Tensor):
            return (values.double() * (self.high - self.low) + self.low).float()
        return (values.astype(np.float64) * (self.high - self.low) + self.low).astype(np.float32)


def make_window(low: float, high: float, unit: str = "counts") -> Window:
    """A checked window. Raises: ValueError: not finite, or high <= low."""
    if not (np.isfinite(low) and np.isfinite(high) and high > low):
        raise ValueError(f"a window needs two finite numbers, low < high; got {low} and {high}")
    return Window(float(low), float(high), unit)


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes of the pair as a whole, and of the visible image's exposure."""

    flip: float = 0.5  # probability of a left-right flip
    crop_scale: list[float] = field(default_factory=lambda: [0.7, 1.0])  # side kept, share
    brightness: float = 0.1  # visible only: factor in [1 - b, 1 + b]
    contrast: float = 0.1  # visible only: factor around mid grey in [1 - c, 1 + c]

    def __post_init__(self):
        low_high = list(self.crop_scale)
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
            raise ValueError(f"crop_scale needs 0 < low <= high <= 1, got {self.crop_scale}")
        for key in ("flip", "brightness", "contrast"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"augment.{key} must lie in [0, 1], got {getattr(self, key)}")


# ---------------------------------------------------------------------------- decoding


def _open(data: bytes, where: str) -> Image.Image:
    """Header only: sizes are checked here, pixels are decoded by `load`."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"{where}: more than {MAX_PIXELS:,} pixels, not decoded") from None
    except Exception as error:  # PIL raises a dozen types on foreign bytes
        raise ValueError(f"{where}: not a readable image ({_short(error)})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{where}: {width} x {height} = {width * height:,} pixels, more than "
            f"{MAX_PIXELS:,}; not decoded"
        )
    if width == 0 or height == 0:
        raise ValueError(f"{where}: empty image, {width} x {height}")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"{where}: {image.n_frames} frames in one file, expected 1")
    return image


def _load(data: bytes, where: str) -> Image.Image:
    """All pixels, turned upright as the EXIF orientation says."""
    image = _open(data, where)
    try:
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:
        raise ValueError(f"{where}: damaged or truncated image ({_short(error)})") from None


def _short(error: Exception) -> str:
    text = str(error).split("<_io")[0].strip().splitlines()
    return text[0][:80] if text and text[0] else type(error).__name__


def _is_npy(data: bytes) -> bool:
    return data[:6] == b"\x93NUMPY"


def decode_visible(data: bytes, where: str) -> np.ndarray:
    """Encoded bytes to (H,W,3) uint8 RGB. An opaque alpha channel is dropped, any other refused.

    Raises: ValueError naming `where`: unreadable, truncated, too large, not three channels.
    """
    image = _load(data, where)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "RGBA":
        if image.getextrema()[3][0] < 255:
            raise ValueError(f"{where}: the visible image is partly transparent; flatten it first")
        image = image.convert("RGB")
    if image.mode != "RGB":
        channels = len(image.getbands())
        raise ValueError(
            f"{where}: the visible image has {channels} channel{'s' * (channels != 1)} "
            f"({image.mode}), expected 3 (RGB)"
        )
    return np.asarray(image)


def decode_infrared(data: bytes, where: str) -> np.ndarray:
    """Encoded bytes (PNG, TIFF, JPEG, .npy, ...) to (H,W) uint8, uint16 or float32, without loss.

    Three channels that are equal, or equal but for JPEG noise, are averaged to one.
    Raises: ValueError naming `where`: unreadable, truncated, too large, NaN, false colour.
    """
    if _is_npy(data):
        return _as_counts(_decode_npy(data, where), where)
    if data[:8] == PNG and data[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        return _as_counts(_decode_wide_png(data, where), where)
    image = _load(data, where)
    if image.mode == "1":
        raise ValueError(f"{where}: the infrared image has 1 bit a pixel, expected 8 or more")
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode not in INFRARED_MODES and not image.mode.startswith("I;16"):
        raise ValueError(f"{where}: an infrared image in {image.mode}, expected one channel")
    bits = max(getattr(image, "tag_v2", {}).get(258, (8,)))  # PIL keeps 8 of several channels' 16
    if bits > 8 and len(image.getbands()) > 1:
        raise ValueError(f"{where}: an infrared TIFF of {bits} bits a channel; save it with one")
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0:
        raise ValueError(f"{where}: a 16-bit TIFF in which 0 is white; save it with 0 as black")
    return _as_counts(np.array(image), where)


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
    pixels = int(np.prod(shape, dtype=np.float64))
    if pixels > MAX_PIXELS:
        raise ValueError(f"{where}: {pixels:,} values, more than {MAX_PIXELS:,}; not decoded")
    if len(data) - stream.tell() < pixels * dtype.itemsize:
        raise ValueError(f"{where}: truncated .npy array, shape {shape} needs more bytes")
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[:, :, 0]
    return array


def _decode_wide_png(data: bytes, where: str) -> np.ndarray:
    """16-bit PNG of several channels: PIL would drop the low byte without a word."""
    from torchvision.io import ImageReadMode, decode_image

    _load(data, where)  # size and damage, with the same sentences as every other file
    try:
        image = decode_image(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED
        )
    except RuntimeError as error:
        raise ValueError(f"{where}: damaged or truncated image ({_short(error)})") from None
    return image.numpy().transpose(1, 2, 0)


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
            f"false-colour palette is not a temperature; export grey levels or raw counts"
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
        image = _load(data, where)
        if palette:
            try:
                return decode_palette(np.array(image.convert("RGB")), palette)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if image.format == "JPEG":
            raise ValueError(f"{where}: class ids in a JPEG, which changes them; save them as PNG")
        array = np.array(image)
        if data[:8] == PNG and data[25] == 0 and data[24] in (2, 4):
            array = array // (255 // (2 ** data[24] - 1))  # PIL spreads few bits over 0 to 255
    if array.ndim == 3 and array.shape[2] == 3:
        if (array[:, :, 0] != array[:, :, 1]).any() or (array[:, :, 0] != array[:, :, 2]).any():
            raise ValueError(f"{where}: the semantic image is coloured; name its palette")
        array = array[:, :, 0]
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(f"{where}: semantic of shape {array.shape}, {array.dtype}; expected ids")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 255:
        raise ValueError(f"{where}: class ids from {low} to {high}, expected 0 to 255")
    return array.astype(np.uint8)


def make_pair(visible, infrared, semantic, where: str) -> Pair:
    """Arrays to a Pair. Raises: ValueError naming both sizes where they differ."""
    height, width = visible.shape[:2]
    for key, other in (("infrared", infrared), ("semantic", semantic)):
        if other is not None and other.shape != (height, width):
            raise ValueError(
                f"{where}: visible is {width} x {height} but {key} is "
                f"{other.shape[1]} x {other.shape[0]} pixels; they must show the same view"
            )
    return Pair(visible, infrared, semantic)


def encode_png(array: np.ndarray) -> bytes:
    """(H,W,3) uint8, (H,W) uint8 or (H,W) uint16 to PNG bytes, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def augment(
    pair: Pair, cfg: AugmentConfig, rng: np.random.Generator, size: tuple[int, int] | None = None
) -> Pair:
    """All images cropped and flipped alike, resized to `size` if given; visible exposed anew."""
    # Six draws whatever the options: changing one leaves the others' randomness alone.
    flip, scale, top, left, brightness, contrast = rng.random(6)
    low, high = cfg.crop_scale
    side = low + (high - low) * scale
    height, width = pair.infrared.shape
    rows, columns = max(1, round(height * side)), max(1, round(width * side))
    y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    step = -1 if flip < cfg.flip else 1
    cut = np.s_[y : y + rows, x : x + columns]
    pair = Pair(*(None if image is None else image[cut][:, ::step] for image in pair))
    pair = pair if size is None else resize(pair, size)
    if cfg.brightness or cfg.contrast:
        levels = np.arange(256, dtype=np.float64)
        levels *= 1 + cfg.brightness * (2 * brightness - 1)
        levels = (levels - 127.5) * (1 + cfg.contrast * (2 * contrast - 1)) + 127.5
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        pair = pair._replace(visible=table[pair.visible])
    return pair


def will_flip(cfg: AugmentConfig, rng: np.random.Generator) -> bool:
    """Whether `augment` with this `rng` is going to flip the pair; draws nothing from it."""
    return bool(copy.deepcopy(rng).random() < cfg.flip)


def resize(pair: Pair, size: tuple[int, int]) -> Pair:
    """The whole pair plainly resized to (H,W): antialiased, semantic by nearest neighbour.

    The same rule for training and evaluation. Infrared becomes float32 counts where the size
    changes, so that 16-bit steps survive.
    """
    height, width = size
    if pair.infrared.shape == (height, width):
        return pair
    infrared = torch.from_numpy(pair.infrared.astype(np.float32))
    semantic = pair.semantic
    if semantic is not None:
        image = Image.fromarray(np.ascontiguousarray(semantic))
        semantic = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
    return Pair(
        resize_visible(pair.visible, size),
        _interpolate(infrared[None, None], size)[0, 0].numpy(),
        semantic,
    )


def resize_visible(visible: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H,W,3) uint8 to another (H,W), antialiased."""
    # channels stay last in memory: torch then takes its integer path, 3 times as fast as PIL
    image = torch.from_numpy(np.array(visible)).permute(2, 0, 1)[None]
    return _interpolate(image, size)[0].permute(1, 2, 0).numpy()


def _interpolate(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)


def to_tensors(pair: Pair, window: Window | None) -> dict[str, torch.Tensor]:
    """visible, infrared (3,H,W) float32 in [0,1], semantic (H,W) int64 (255 = unlabelled).

    `window` None stretches this image's own minimum and maximum to 0 and 1.
    """
    if window is None:
        low, high = float(pair.infrared.min()), float(pair.infrared.max())
        window = Window(low, high if high > low else low + 1.0)
    height, width = pair.infrared.shape
    visible = torch.from_numpy(np.ascontiguousarray(pair.visible.transpose(2, 0, 1)))
    infrared = torch.from_numpy(window.normalise(pair.infrared))
    if pair.semantic is None:
        semantic = torch.full((height, width), 255, dtype=torch.int64)
    else:
        semantic = torch.from_numpy(pair.semantic.astype(np.int64))
    return {
        "visible": visible.float().div_(255.0),
        "infrared": infrared.expand(3, height, width),
        "semantic": semantic,
    }
