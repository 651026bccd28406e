"""The window of a data set: which infrared values become 0 and 1, by a rule robust to outliers.

One look at each image keeps a few hundred numbers (`measure`); the splits are known later, and then
`choose_window` takes the training images together:

1. Pixels of a nodata value (--nodata, or the file's own tag) and constant images do not count.
2. In each image, values at either end that many pixels share and that lie apart from all others
   (borders of an alignment, dead and saturated pixels) are set aside, with the pixels around them,
   which an interpolation may have mixed. They stay aside if they lie apart from the whole set too.
   Few such pixels (a dead one) stay aside only where most images have them.
3. Of what is left, the window spans all but a 10,000th of each image's pixels at either end.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from data.image_values import APART, FEWEST, LEVELS, Values
from data.radiometry import TEMPERATURES, to_kelvin
from data.transforms import Window, make_window

APART_IF_ORDINARY = 0.25  # as APART, for a value that nothing but the gap makes suspect
USUAL_GAPS = 4  # times the steps between the data set's values: large where few levels are in use
SWAPPED = 8  # times smoother with its two bytes swapped: an image in the wrong byte order
ALL_SWAPPED = 3  # the same of a whole set
MANY = 32  # levels in use; with fewer, smoothness says nothing
DEAD = 0.05  # of the usual span of an image; an image of less that lies apart is dead
OUTLIERS = 0.1  # of the images may set a window alone and be named for it
COLDEST, HOTTEST = 50.0, 5000.0  # kelvin; the sky and a furnace lie between
DARK = 63  # of 255: the highest level of visible images that use a fraction of their type


class Choice(NamedTuple):
    """The window in its unit, notes for the user, and the same facts for the manifest."""

    window: Window
    notes: list[str]
    facts: dict


def given_window(words: list[str], scale: float, offset: float) -> tuple[float, float] | None:
    """The numbers after --window, None for auto. Raises: ValueError: not a window."""
    if not (0 < scale < np.inf and np.isfinite(offset)):
        raise ValueError(f"--scale takes a positive number, --offset a number: {scale}, {offset}")
    if words == ["auto"]:
        return None
    try:
        low, high = map(float, words)
    except ValueError:
        raise ValueError(f"--window takes auto or LOW HIGH, got {' '.join(words)}") from None
    return make_window(low, high)[:2]


def choose_window(
    items: list,
    found: list,
    splits: list[str],
    window: tuple[float, float] | None,
    unit: str,
    scale: float,
    offset: float,
) -> Choice:
    """The window in `unit`: given, 0..255 for 8 bit, else from the training split.

    items, found: the pairs (where(), source) and what is known of each (dtype, values and
    visible_highest). Raises: ValueError: 8-bit and wider infrared mixed, only constant images,
    swapped bytes, or images outside of a given window.
    """
    images = [(item.where(), one.dtype, one.values) for item, one in zip(items, found)]
    train = [image for image, split in zip(images, splits) if split == "train"]
    notes, left_out = list(_name_constant(images)), dict[float, float]()
    types = {dtype for _, dtype, _ in images}
    if window is not None:
        _check_given(images, window, unit, scale, offset)
        low, high = ((x - offset) / scale for x in window)
    elif types == {"uint8"}:
        low, high = 0.0, 255.0
    elif "uint8" in types:
        narrow = sum(dtype == "uint8" for _, dtype, _ in images)
        raise ValueError(
            f"{narrow} of {len(images)} infrared images have 8 bit, the others more: one window "
            f"cannot serve both; prepare them as two data sets or give --window LOW HIGH"
        )
    else:
        _refuse_swapped(images)
        low, high, left_out, more = _automatic(
            train, lambda value: f"the value {value * scale + offset:g} {unit}"
        )
        notes += more
    below, above = _outside([v for _, _, v in train], low, high)
    low, high = low * scale + offset, high * scale + offset
    nodata = _nodata_shares(images)
    notes += [f"no infrared image has the value {x:g}" for x, y in nodata.items() if not y]
    facts = {
        "types": sorted(types),
        "min": min(v.low for _, _, v in images) * scale + offset,
        "max": max(v.high for _, _, v in images) * scale + offset,
        "train_pixels_outside_window": {"below": below, "above": above},
        "left_out_of_window": {
            f"{value * scale + offset:g}": share for value, share in left_out.items()
        },
        "nodata": {f"{value:g}": share for value, share in nodata.items()},
    }
    notes += _no_temperature(low, high, unit)
    notes += _dark_sources([i.source for i in items], [one.visible_highest for one in found])
    return Choice(make_window(low, high, unit), notes, facts)


def _nodata_shares(images) -> dict[float, float]:
    """Value of nodata -> share of all pixels that have it."""
    found: dict[float, float] = {}
    for _, _, values in images:
        for value, share in values.nodata:
            found[value] = found.get(value, 0.0) + share / len(images)
    return found


def _no_temperature(low: float, high: float, unit: str) -> Iterator[str]:
    """A note if a window in a unit of temperature cannot be that of a scene."""
    if unit not in TEMPERATURES:
        return
    if to_kelvin(low, unit) < COLDEST or to_kelvin(high, unit) > HOTTEST:
        yield (
            f"{low:g} to {high:g} {unit} cannot be the temperature of a scene: are these counts"
            f" that need --scale and --offset?"
        )


def _check_given(images, window, unit: str, scale: float, offset: float) -> None:
    low, high = sorted((x - offset) / scale for x in window)
    outside = [v for _, _, v in images if v.high < low or v.low > high]
    if outside:
        raise ValueError(
            f"{len(outside)} of {len(images)} infrared images lie wholly outside --window"
            f" {window[0]:g} {window[1]:g}, the first from {outside[0].low * scale + offset:g}"
            f" to {outside[0].high * scale + offset:g} {unit}"
        )


def _refuse_swapped(images) -> None:
    swapped = [name for name, _, v in images if _looks_swapped([v], SWAPPED)]
    if not swapped and _looks_swapped([v for _, _, v in images], ALL_SWAPPED):
        swapped = [name for name, *_ in images]
    if swapped:
        raise ValueError(
            f"{_names(swapped, len(images))} look as if the two bytes of every count were swapped:"
            f" neighbouring pixels agree far better the other way round; save them"
            f" in the other byte order, or give --window LOW HIGH if they are right"
        )


def _looks_swapped(values: list[Values], times: float) -> bool:
    """Whether neighbouring pixels agree so many times better with swapped bytes."""
    rough, smooth = np.sum([v.roughness for v in values], axis=0)
    if rough <= times * smooth or smooth == 0:
        return False
    return len(np.unique(np.concatenate([v.levels for v in values]))) >= MANY


def _name_constant(images) -> Iterator[str]:
    constant = [name for name, _, values in images if values.constant]
    if constant:
        yield f"{_names(constant, len(images))} are constant and are ignored for the window"


def _names(names: list[str], total: int) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} of {total} infrared images ({', '.join(names[:3])}{more})"


def _automatic(train, say: Callable) -> tuple[float, float, dict[float, float], list[str]]:
    """Low and high of the training images in counts, shares of values left out, and notes."""
    named = [(name, values) for name, _, values in train if not values.constant]
    if not named:
        raise ValueError(
            f"all {len(train)} infrared images of the training split are constant: there is no"
            f" window to find; are these the right files?"
        )
    named, notes = _without_dead(named, len(train))
    low = min(values.tail_low for _, values in named)
    high = max(values.tail_high for _, values in named)
    low, high, left_out, more = _leave_out([v for _, v in named], low, high, say)
    ends = [(name, *_ends(values, left_out)) for name, values in named]
    if alone := _set_the_window_alone(ends, low, high):
        text = f"{_names(alone, len(train))} alone make the window more than twice as wide; are"
        more.append(f"{text} their values right? --window LOW HIGH decides")
    return low, high, left_out, [*notes, *more]


def _without_dead(named, total: int) -> tuple[list, list]:
    """The images without those of mere noise around a value far from the others'."""
    lows, highs = (np.array([getattr(v, x) for _, v in named]) for x in ("tail_low", "tail_high"))
    spans = highs - lows
    alive = spans >= DEAD * np.median(spans)
    low, high = lows[alive].min(), highs[alive].max()
    margin = APART_IF_ORDINARY * (high - low)
    dead = ~alive & ((highs < low - margin) | (lows > high + margin))
    names = [name for (name, _), d in zip(named, dead) if d]
    if not names:
        return named, []
    text = f"{_names(names, total)} hold little but noise, far from the values of the others: left"
    return [x for x, d in zip(named, dead) if not d], [f"{text} out of the window"]


def _leave_out(values: list[Values], low: float, high: float, say: Callable):
    """The window with the values that are no outliers of the whole set; the others, and notes."""
    total: dict[float, list[float]] = {}
    few = set()
    for image in values:
        for value, share in image.apart:
            total.setdefault(value, []).append(share)
            if share * image.pixels < FEWEST:
                few.add(value)
    seen = np.unique(np.concatenate([v.levels for v in values])).astype(np.float64)
    step = USUAL_GAPS * float(np.quantile(np.diff(seen), 0.9)) if len(seen) > 1 else 0.0
    left_out, notes = {}, []
    for value in sorted(total, key=lambda x: max(low - x, x - high)):  # the nearest first
        gap = max(low - value, value - high)
        often = len(total[value]) > 1 and 2 * len(total[value]) >= len(values)
        suspect = value <= 0 or often or np.log2(value + 1) in range(10, 33)  # the end of a type
        needed = (APART if suspect else APART_IF_ORDINARY) * (high - low)
        if (value in few and not often) or gap <= max(needed, step):
            low, high = min(low, value), max(high, value)
            continue
        left_out[value] = sum(total[value]) / len(values)
        where = "below" if value < low else "above"
        extent = f"{left_out[value]:.2%} of the training pixels, in {len(total[value])} images"
        notes.append(
            f"{say(value)} ({extent}) lies far {where} all others and is left out of the window:"
            f" --nodata or --window LOW HIGH decides"
        )
    if len(notes) > 3:
        notes = [*notes[:3], f"and {len(notes) - 3} more such values"]
    return low, high, left_out, notes


def _ends(values: Values, left_out: dict) -> tuple[float, float]:
    """The lowest and highest value by which an image takes part in the window."""
    others = [value for value, _ in values.apart if value not in left_out]
    return min([values.tail_low, *others]), max([values.tail_high, *others])


def _set_the_window_alone(ends: list[tuple], low: float, high: float) -> list[str]:
    """Names of the few images without which the window would be less than half as wide."""
    if len(ends) < 3:
        return []
    few = max(1, int(OUTLIERS * len(ends)))
    usual_low = sorted(a for _, a, _ in ends)[few]
    usual_high = sorted(b for _, _, b in ends)[-1 - few]
    span = usual_high - usual_low
    far = [name for name, a, b in ends if a < usual_low - span or b > usual_high + span]
    if len(far) > max(1, 2 * OUTLIERS * len(ends)):
        return []
    rest = [(a, b) for name, a, b in ends if name not in set(far)]
    width = max(b for _, b in rest) - min(a for a, _ in rest) if rest else 0
    return far if 0 < 2 * width < high - low else []


def _outside(values: list[Values], low: float, high: float) -> tuple[float, float]:
    """About the shares of the pixels below and above, of images that are not constant."""
    below = above = 0.0
    images = [image for image in values if not image.constant]
    for image in images:
        rest = 1 - sum(share for _, share in (*image.apart, *image.nodata))
        below += rest * _share_below(image.levels, low)
        above += rest * _share_below(-image.levels[::-1], -high)
        below += sum(share for value, share in image.apart if value < low)
        above += sum(share for value, share in image.apart if value > high)
    return below / max(1, len(images)), above / max(1, len(images))


def _share_below(levels: np.ndarray, value: float) -> float:
    """About how many of an image's pixels are less than `value`, from its values at LEVELS."""
    k = int(np.searchsorted(levels, np.float32(value), side="left"))
    if k in (0, len(levels)):
        return float(k > 0)
    part = (value - levels[k - 1]) / (levels[k] - levels[k - 1])
    return float(LEVELS[k - 1] + min(1.0, max(0.0, part)) * (LEVELS[k] - LEVELS[k - 1]))


def _dark_sources(sources: list[str], highest: list[int]) -> Iterator[str]:
    """A note for each source whose visible images use a fraction of their type."""
    for source in dict.fromkeys(sources):
        most = max(high for s, high in zip(sources, highest) if s == source)
        if most <= DARK:
            yield (
                f"no visible image of '{source}' has a value above {most} of 255, as where"
                f" {8 + most.bit_length()}-bit values are stored in 16 bits: they are read"
                f" {256 >> most.bit_length()} times too dark; multiply them first"
            )


def describe(window: dict, facts: dict | None) -> str:
    """A manifest's window in words, with the share of the training pixels outside of it."""
    text = f"{window['low']:g} to {window['high']:g} {window['unit']}"
    outside = facts and facts["train_pixels_outside_window"]
    if not outside:
        return text
    return f"{text}; training pixels below {outside['below']:.2%}, above {outside['above']:.2%}"
