"""One full look at every pair before anything is written: sizes, ranges, hashes, classes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from data.folders import Item, thumbnail
from data.manifest import sha256
from data.materials import IGNORE, TABLES
from data.transforms import (
    Window,
    decode_infrared,
    decode_semantic,
    decode_visible,
    make_window,
    resize_visible,
)

# Auto window: all but this share of the pixels of every training image, on either side.
TAIL = 1e-4
ASPECT = 0.02  # a change of width to height that a resize may make without a note


class Options(NamedTuple):
    """How the files are read; plain values, for worker processes."""

    resize_visible: bool = False
    palette: str = ""
    table: str = ""


class Decoded(NamedTuple):
    """Encoded bytes and arrays of one pair at one size; `resized` if the visible was changed."""

    visible_bytes: bytes
    infrared_bytes: bytes
    visible: np.ndarray
    infrared: np.ndarray
    semantic: np.ndarray | None
    resized: bool
    visible_size: tuple[int, int]  # before a resize


class Inspection(NamedTuple):
    """What is kept of a pair: a few hundred numbers."""

    size: tuple[int, int]
    dtype: str
    low: float
    high: float
    tail_low: float
    tail_high: float
    visible_hash: str
    infrared_hash: str
    visible_thumbnail: np.ndarray
    infrared_thumbnail: np.ndarray
    resized: bool
    visible_size: tuple[int, int]


def decode_item(item: Item, options: Options) -> Decoded:
    """All files of a pair. Raises: ValueError naming the file, or both sizes where they differ."""
    where = item.where()
    visible_bytes, infrared_bytes = item.visible.read_bytes(), item.infrared.read_bytes()
    visible = decode_visible(visible_bytes, str(item.visible))
    infrared = decode_infrared(infrared_bytes, str(item.infrared))
    semantic = None
    if item.semantic is not None:
        data = item.semantic.read_bytes()
        semantic = decode_semantic(data, str(item.semantic), options.palette or None)
        _check_ids(semantic, options.table, str(item.semantic))
    original, wanted = visible.shape[:2], infrared.shape
    resized = original != wanted
    if resized:
        if not options.resize_visible:
            raise ValueError(
                f"{where}: visible is {original[1]} x {original[0]} but infrared is {wanted[1]} x "
                f"{wanted[0]} pixels; --resize_visible resizes the visible if the view is the same"
                + (
                    f" (it is hardly: {aspect_text(original, wanted)})"
                    if squeezed(original, wanted)
                    else ""
                )
            )
        visible = resize_visible(visible, wanted)
        if semantic is not None and semantic.shape == original:
            rows = (np.arange(wanted[0]) + 0.5) * original[0] / wanted[0]
            columns = (np.arange(wanted[1]) + 0.5) * original[1] / wanted[1]
            semantic = semantic[rows.astype(int)][:, columns.astype(int)]
    if semantic is not None and semantic.shape != wanted:
        raise ValueError(
            f"{item.semantic}: semantic is {semantic.shape[1]} x {semantic.shape[0]} but infrared "
            f"is {wanted[1]} x {wanted[0]} pixels"
        )
    return Decoded(visible_bytes, infrared_bytes, visible, infrared, semantic, resized, original)


def _check_ids(semantic: np.ndarray, table: str, where: str) -> None:
    if not table:
        return
    outside = semantic[(semantic >= len(TABLES[table])) & (semantic != IGNORE)]
    if outside.size:
        raise ValueError(
            f"{where}: class id {int(outside[0])} ({outside.size} pixels) is outside the "
            f"{len(TABLES[table])} classes of '{table}'"
        )


def squeezed(original: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether a resize changes the aspect by more than ASPECT and by more than a pixel's worth."""
    ratio = original[1] * wanted[0] / (original[0] * wanted[1])
    pixel = 1 / min(*original, *wanted)
    return max(ratio, 1 / ratio) - 1 > max(ASPECT, pixel)


def aspect_text(original: tuple[int, int], wanted: tuple[int, int]) -> str:
    """Both sides' width to height, as 1.78:1 and 1.25:1."""
    first, second = (f"{width / height:.2f}:1" for height, width in (original, wanted))
    return f"the visible is {first} wide, the infrared {second}"


def aspect_notes(items: list[Item], found: list[Inspection]) -> list[str]:
    """One note a source on the visible images whose aspect --resize_visible changed."""
    notes = []
    for source in dict.fromkeys(item.source for item in items):
        own = [i for i, item in enumerate(items) if item.source == source]
        bad = [i for i in own if squeezed(found[i].visible_size, found[i].size)]
        if bad:
            text = aspect_text(found[bad[0]].visible_size, found[bad[0]].size)
            notes.append(
                f"--resize_visible squeezed {len(bad)} of {len(own)} visible images of source "
                f"'{source}' ({text}; first: {items[bad[0]].name}): the view is hardly the same; "
                f"crop the wider side before"
            )
    return notes


def inspect(task: tuple[Item, Options]) -> Inspection:
    """Decode a pair and keep its numbers."""
    item, options = task
    pair = decode_item(item, options)
    infrared = pair.infrared
    tails = np.quantile(infrared, [TAIL, 1 - TAIL], method="nearest")
    return Inspection(
        infrared.shape,
        str(infrared.dtype),
        float(infrared.min()),
        float(infrared.max()),
        float(tails[0]),
        float(tails[1]),
        sha256(pair.visible_bytes),
        sha256(pair.infrared_bytes),
        thumbnail(pair.visible),
        thumbnail(infrared),
        pair.resized,
        pair.visible_size,
    )


def available() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def in_workers(function: Callable, tasks: list, workers: int, block: int = 256) -> Iterator:
    """function(task) in the tasks' order. At most `block` results wait, whoever is slower."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for first in range(0, len(tasks), block):
            yield from pool.imap(function, tasks[first : first + block], chunksize=4)


def given_window(words: list[str], scale: float, offset: float) -> tuple[float, float] | None:
    """The numbers after --window, None for auto. Raises: ValueError: words that are no window."""
    if not (0 < scale < np.inf and np.isfinite(offset)):
        raise ValueError(f"--scale takes a positive number, --offset a number: {scale}, {offset}")
    if words == ["auto"]:
        return None
    try:
        low, high = map(float, words)
    except ValueError:
        raise ValueError(f"--window takes auto or LOW HIGH, got {' '.join(words)}") from None
    return make_window(low, high)[:2]


def find_window(
    found: list[Inspection],
    splits: list[str],
    window: tuple[float, float] | None,
    unit: str,
    scale: float,
    offset: float,
) -> Window:
    """The window of a data set in its unit: given, 0..255 for 8 bit, else from the training split.

    Raises: ValueError: 8-bit and wider infrared mixed, constant infrared, or images outside of it.
    """
    if window is not None:
        low, high = sorted((x - offset) / scale for x in window)  # in counts
        outside = [f for f in found if f.high < low or f.low > high]
        if outside:
            raise ValueError(
                f"{len(outside)} of {len(found)} infrared images lie wholly outside --window"
                f" {window[0]:g} {window[1]:g}, the first from {outside[0].low * scale + offset:g}"
                f" to {outside[0].high * scale + offset:g} {unit}"
            )
        return make_window(*window, unit)
    types = sorted({f.dtype for f in found})
    if types == ["uint8"]:
        return make_window(offset, 255.0 * scale + offset, unit)
    if "uint8" in types:
        narrow = sum(f.dtype == "uint8" for f in found)
        raise ValueError(
            f"{narrow} of {len(found)} infrared images have 8 bit, the others more: one window "
            f"cannot serve both; prepare them as two data sets or give --window LOW HIGH"
        )
    train = [f for f, split in zip(found, splits) if split == "train"]
    low = min(f.tail_low for f in train) * scale + offset
    high = max(f.tail_high for f in train) * scale + offset
    return make_window(low, high, unit)


def sets_window_alone(found: list[Inspection], splits: list[str]) -> int | None:
    """The training image without which the window of all would be less than half as wide."""
    train = [i for i, split in enumerate(splits) if split == "train"]
    if len(train) < 3 or any(found[i].dtype == "uint8" for i in train):
        return None
    lows, highs = ([getattr(found[i], x) for i in train] for x in ("tail_low", "tail_high"))
    span = max(highs) - min(lows)
    for place in {lows.index(min(lows)), highs.index(max(highs))}:
        rest = [x for k, x in enumerate(zip(lows, highs)) if k != place]
        if 0 < 2 * (max(h for _, h in rest) - min(low for low, _ in rest)) < span:
            return train[place]
    return None


def summary(found: list[Inspection], scale: float, offset: float) -> dict:
    """Type and range of the infrared in its unit, for the manifest."""
    return {
        "types": sorted({f.dtype for f in found}),
        "min": min(f.low for f in found) * scale + offset,
        "max": max(f.high for f in found) * scale + offset,
    }


def sizes(found: list[Inspection]) -> dict[str, int]:
    """Pairs of each size, the most frequent first."""
    counts: dict[str, int] = {}
    for f in found:
        key = f"{f.size[1]}x{f.size[0]}"
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
