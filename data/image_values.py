"""Statistics of one infrared image for choosing a data set's window: a few hundred numbers."""

from typing import NamedTuple

import numpy as np

TAIL = 1e-4  # of an image's pixels, at either end, may lie outside the window
APART = 0.05  # gap to the other values, as a share of what these span
FEWEST = 4  # pixels of one value that are more than chance
REST = 0.01  # of the pixels must be left when values are set aside
MOST_APART = 6  # values set aside in one image
MARGIN = 3  # pixels around them, which interpolation or sharpening may have touched

# Shares of an image's pixels at which its values are kept, close together at the ends.
_ENDS = [0, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.02]
LEVELS = np.array([*_ENDS, *np.linspace(0.04, 0.96, 47), *[1 - x for x in _ENDS[::-1]]])


class Values(NamedTuple):
    """Statistics of one infrared image; values as stored, shares of all its pixels."""

    pixels: int
    low: float  # without nodata, as all that follows
    high: float
    tail_low: float  # without the values in `apart` and the pixels around them
    tail_high: float
    apart: tuple[tuple[float, float], ...]  # (value, share)
    nodata: tuple[tuple[float, float], ...]  # (value, share)
    levels: np.ndarray  # (len(LEVELS),) float32, without the values in `apart`
    constant: bool  # all pixels, or nearly all, have one value
    roughness: tuple[float, float]  # mean step between neighbours, as stored and bytes swapped


def measure(infrared: np.ndarray, nodata: tuple[float, ...] = ()) -> Values:
    """(H,W) of any type to the numbers that `ranges.choose_window` needs."""
    valid, shares = np.ones(infrared.shape, bool), []
    for value in dict.fromkeys(nodata):
        # float32 holds -3.4028234663852886e+38 of a nodata tag, but no longer all its digits
        here = infrared == np.asarray(value, infrared.dtype if infrared.dtype.kind == "f" else None)
        shares.append((float(value), float(here.mean())))
        valid &= ~here
    inside = infrared if valid.all() else infrared[valid]
    if not inside.size:  # nothing but nodata: as useless as a constant image
        value = float(infrared.flat[0])
        levels = np.full(len(LEVELS), value, np.float32)
        return Values(
            infrared.size, value, value, value, value, (), tuple(shares), levels, True, (0.0, 0.0)
        )
    kept = valid if valid.all() else valid & ~_grown(~valid)
    apart, kept = _set_apart(infrared, kept if kept.any() else valid)
    tails = _quantiles(infrared[kept], [TAIL, 1 - TAIL])
    rest = inside[~np.isin(inside, [value for value, _ in apart])] if apart else inside
    levels = _quantiles(rest, LEVELS).astype(np.float32)
    return Values(
        infrared.size,
        float(inside.min()),
        float(inside.max()),
        float(tails[0]),
        float(tails[1]),
        tuple(apart),
        tuple(shares),
        levels,
        float((inside == _quantiles(inside, [0.5])[0]).mean()) > 1 - REST,
        _roughness(infrared),
    )


def _set_apart(image: np.ndarray, kept: np.ndarray) -> tuple[list[tuple[float, float]], np.ndarray]:
    """(value, share) of the end values apart from the others, and the pixels that are left."""
    found: list[tuple[float, float]] = []
    sides = [np.min, np.max]
    while sides and len(found) < MOST_APART:
        side = sides.pop(0)
        end = side(image[kept])
        here = kept & (image == end)
        count = int(here.sum())
        if count < TAIL * image.size:
            continue
        left = kept & ~_grown(here)
        if left.sum() < REST * image.size:
            continue
        low, high = _quantiles(image[left], [TAIL, 1 - TAIL]).astype(float)
        gap = low - float(end) if side is np.min else float(end) - high
        needed = (APART if count >= FEWEST else 1.0) * (high - low)
        if high > low and gap > needed:
            found.append((float(end), count / image.size))
            kept, sides = left, [np.min, np.max]  # another may have hidden behind it
    return found, kept


def _quantiles(values: np.ndarray, shares) -> np.ndarray:
    """Values that are nearest to these shares of the sorted ones; of 8 and 16 bit by counting."""
    if values.dtype not in (np.uint8, np.uint16):
        return np.quantile(values, shares, method="nearest")
    below = np.cumsum(np.bincount(values.ravel()))
    return np.searchsorted(below, np.rint(np.multiply(shares, values.size - 1)), side="right")


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and all pixels up to MARGIN beside, above or below it."""
    grown = mask
    for axis in (0, 1):
        grown = np.moveaxis(grown, axis, 0)
        wider = grown.copy()
        for step in range(1, MARGIN + 1):
            wider[step:] |= grown[:-step]
            wider[:-step] |= grown[step:]
        grown = np.moveaxis(wider, 0, axis)
    return grown


def _roughness(image: np.ndarray) -> tuple[float, float]:
    """Mean step between neighbouring 16-bit counts as they are and with their bytes swapped.

    (0, 0) where these say nothing: other types, and 8 bits in 16, which are smooth in both orders.
    """
    if image.dtype == np.float32 and image.min() >= -(2**15) and image.max() < 2**15:
        counts = image.astype(np.int16)
        if (counts != image).any():
            return 0.0, 0.0
    elif image.dtype == np.uint16:
        counts = image
    else:
        return 0.0, 0.0
    counts = counts[:: max(1, len(counts) // 128)]
    if any((half == half[0, 0]).all() for half in (counts & 0xFF, counts >> 8)):
        return 0.0, 0.0
    steps = (np.diff(x.astype(np.int32), axis=1) for x in (counts, counts.byteswap()))
    rough, smooth = (float(np.abs(step).mean()) for step in steps)
    return rough, smooth
