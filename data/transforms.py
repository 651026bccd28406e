"""Window, augment and resize a pair of images: the only place where ranges change."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from utils.problems import Checked


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
        if counts.dtype == np.uint8 and counts.size > 256:  # each of 256 results once
            return np.take(self.normalise(np.arange(256, dtype=np.uint8)), counts)
        # float64 until the end: float32 would lose the last bits of large counts less a large low
        scaled = counts.astype(np.float64)
        scaled -= self.low
        scaled /= self.high - self.low
        return np.clip(scaled, 0.0, 1.0, out=scaled).astype(np.float32)

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


FEW = 250  # whole counts; a window of fewer, as in degrees, is spread over all 16 bits
MOST = 65535


def holds_whole_counts(window: Window) -> bool:
    """Whether the data set's own numbers, rounded to integers, should be written in 16 bits."""
    return window.low >= 0 and window.high <= MOST and window.high - window.low >= FEW


def to_16_bits(values: np.ndarray, window: Window) -> tuple[np.ndarray, float, float]:
    """[0, 1] to uint16 numbers, their scale and offset: number * scale + offset is in the unit.

    Whole counts stay what they were: scale 1, offset 0.
    """
    exact = _clipped(values) * (window.high - window.low) + window.low
    whole = holds_whole_counts(window)
    scale, offset = (1.0, 0.0) if whole else ((window.high - window.low) / MOST, window.low)
    return np.rint((exact - offset) / scale).astype(np.uint16), scale, offset


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """[0, 1] to grey levels, uint8."""
    return np.rint(_clipped(values) * 255).astype(np.uint8)


def _clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(np.asarray(values, np.float64), 0, 1)


@dataclass(kw_only=True)
class AugmentConfig(Checked):
    """Random changes of the pair as a whole, and of the visible image's exposure."""

    flip: float = 0.5  # probability of a left-right flip
    # smallest and largest share of the side that a crop keeps
    crop_scale: list[float] = field(default_factory=lambda: [0.7, 1.0])
    brightness: float = 0.1  # visible only: factor in [1 - b, 1 + b]
    contrast: float = 0.1  # visible only: factor around mid grey in [1 - c, 1 + c]

    def problems(self) -> Iterator[str]:
        low_high = list(self.crop_scale)
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
            yield f"crop_scale needs 0 < low <= high <= 1, got {self.crop_scale}"
        for key in ("flip", "brightness", "contrast"):
            if not 0 <= getattr(self, key) <= 1:
                yield f"augment.{key} must lie in [0, 1], got {getattr(self, key)}"


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


def largest_window(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(H,W) of the largest part of an image of `shape` that has the aspect of `size`."""
    (height, width), (rows, columns) = shape, size
    if height * columns > width * rows:
        return max(1, round(width * rows / columns)), width
    return height, max(1, round(height * columns / rows))


def cut(pair: Pair, top: int, left: int, height: int, width: int) -> Pair:
    """A part of every image of the pair."""
    part = np.s_[top : top + height, left : left + width]
    semantic = None if pair.semantic is None else pair.semantic[part]
    return Pair(pair.visible[part], pair.infrared[part], semantic)


def crop_centre(pair: Pair, size: tuple[int, int]) -> Pair:
    """The largest part around the middle that has the aspect of `size`; not resized."""
    height, width = pair.infrared.shape
    rows, columns = largest_window((height, width), size)
    return cut(pair, (height - rows) // 2, (width - columns) // 2, rows, columns)


def augment(
    pair: Pair,
    cfg: AugmentConfig,
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
    squash: bool = False,
) -> Pair:
    """Crop and flip all images alike, resize to `size` if given, and vary the visible exposure.

    The crop has the aspect of `size`, or, to be squashed, that of the pair. Its place is random;
    with crop_scale [1, 1] it is the middle.
    """
    # Six draws whatever the options: changing one leaves the others' randomness alone.
    flip, scale, top, left, brightness, contrast = rng.random(6)
    low, high = cfg.crop_scale
    side = low + (high - low) * scale
    if size is not None and not squash and low == high == 1:  # no place is left to chance
        pair = crop_centre(pair, size)
    height, width = pair.infrared.shape
    most = (height, width) if size is None or squash else largest_window((height, width), size)
    rows, columns = (max(1, round(length * side)) for length in most)
    y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    pair = cut(pair, y, x, rows, columns)
    if flip < cfg.flip:
        # numpy copies reversed rows of 3 bytes a pixel 10 times slower than torch
        visible = torch.from_numpy(np.array(pair.visible)).flip(1).numpy()
        semantic = None if pair.semantic is None else pair.semantic[:, ::-1]
        pair = Pair(visible, pair.infrared[:, ::-1], semantic)
    pair = pair if size is None else resize(pair, size)
    if cfg.brightness or cfg.contrast:
        levels = np.arange(256, dtype=np.float64)
        levels *= 1 + cfg.brightness * (2 * brightness - 1)
        levels = (levels - 127.5) * (1 + cfg.contrast * (2 * contrast - 1)) + 127.5
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        pair = pair._replace(visible=_looked_up(table, pair.visible))
    return pair


def _looked_up(table: np.ndarray, image: np.ndarray) -> np.ndarray:
    """table[image] of (256,) and (H,W,3) uint8: by bytes, 4 times as fast as numpy's indices."""
    planes = image.transpose(2, 0, 1)
    stored = planes if planes.flags.c_contiguous else image  # `resize` leaves one plane a channel
    looked_up = bytearray(stored.tobytes()).translate(table.tobytes())
    found = np.frombuffer(looked_up, np.uint8).reshape(stored.shape)
    return found.transpose(1, 2, 0) if stored is planes else found


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
        semantic = torch.tensor(255).expand(height, width)
    else:
        semantic = torch.from_numpy(pair.semantic.astype(np.int64))
    return {
        "visible": visible.float().div_(255.0),
        "infrared": infrared.expand(3, height, width),
        "semantic": semantic,
    }
