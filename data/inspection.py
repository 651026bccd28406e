"""One full look at every pair before anything is written: sizes, ranges, hashes, classes."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data import doctor, image_values
from data.affine import Affine
from data.decoding import decode_semantic, decode_visible, nodata_of, read_file, split_channels
from data.folders import Item, thumbnail
from data.infrared_files import read_infrared
from data.manifest import sha256
from data.materials import TABLES
from data.radiometry import Planck
from data.transforms import resize_visible
from utils.labels import IGNORE

# A change of width to height that a resize may make without a note.
ASPECT = 0.02
# Faulty pairs that one message names.
NAMED = 10


class Options(NamedTuple):
    """How the files are read; plain values, for worker processes."""

    resize_visible: bool = False
    palette: str = ""
    table: str = ""
    nodata: tuple[float, ...] = ()  # infrared values that are none, as stored
    colours: str = ""  # of infrared in false colour
    unit: str = "counts"


class Decoded(NamedTuple):
    """Encoded bytes and arrays of one pair at one size; `resized` if the visible was changed."""

    visible_bytes: bytes
    infrared_bytes: bytes
    visible: np.ndarray
    infrared: np.ndarray
    semantic: np.ndarray | None
    resized: bool
    stored_infrared: bytes  # the file's bytes, or what stands for them in a row
    planck: Planck | None
    visible_size: tuple[int, int]  # before a resize


class Inspection(NamedTuple):
    """What is kept of a pair: a few hundred numbers."""

    size: tuple[int, int]
    dtype: str
    values: image_values.Values
    visible_highest: int
    visible_hash: str
    infrared_hash: str
    visible_thumbnail: np.ndarray
    infrared_thumbnail: np.ndarray
    resized: bool
    converted: bool  # the row holds other infrared bytes than the file
    planck: Planck | None
    visible_size: tuple[int, int]
    finding: doctor.Finding
    move: Affine | None = None  # of the visible, where --align repairs the pair's source


def read_files(item: Item) -> tuple[bytes, bytes]:
    """Visible and infrared bytes; of one file with four channels, a PNG for each side."""
    if item.visible != item.infrared:
        return read_file(item.visible), read_file(item.infrared)
    return split_channels(read_file(item.visible), str(item.visible))


def decode_item(item: Item, options: Options) -> Decoded:
    """All files of a pair. Raises: ValueError naming the file, or both sizes where they differ."""
    where = item.where()
    visible_bytes, infrared_bytes = read_files(item)
    visible = decode_visible(visible_bytes, str(item.visible))
    read = read_infrared(infrared_bytes, str(item.infrared), options.unit, options.colours)
    infrared = read.values
    semantic = None
    if item.semantic is not None:
        data = read_file(item.semantic)
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
                    f" (it is probably not: {aspect_text(original, wanted)})"
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
    images = visible, infrared, semantic, resized
    return Decoded(visible_bytes, infrared_bytes, *images, read.stored, read.planck, original)


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
                f"'{source}' ({text}; first: {items[bad[0]].name}): the views probably differ; "
                f"crop the wider side first"
            )
    return notes


def inspect(task: tuple[Item, Options, bool]) -> Inspection:
    """Decode a pair and keep its numbers; with its registration where the task says so."""
    item, options, measured = task
    pair = decode_item(item, options)
    infrared = pair.infrared
    tag = nodata_of(pair.infrared_bytes)
    values = image_values.measure(
        infrared, options.nodata if tag is None else (*options.nodata, tag)
    )
    seen = without_ends(infrared, values)
    return Inspection(
        infrared.shape,
        str(infrared.dtype),
        values,
        int(pair.visible.max()),
        sha256(pair.visible_bytes),
        sha256(pair.infrared_bytes),
        thumbnail(pair.visible),
        thumbnail(seen),
        pair.resized,
        pair.stored_infrared is not pair.infrared_bytes,
        pair.planck,
        pair.visible_size,
        doctor.examine(item.name, item.source, pair.visible, seen, measured),
    )


def without_ends(infrared: np.ndarray, values: image_values.Values) -> np.ndarray:
    """Infrared without nodata and values apart: borders of one shape make all images look alike."""
    if values.apart or values.nodata:
        return np.clip(infrared.astype(np.float32), values.tail_low, values.tail_high)
    return infrared


def inspect_or_fault(task: tuple[Item, Options, bool]) -> Inspection | str:
    """`inspect`, or the sentence that refuses the pair: all of them are then named at once."""
    try:
        return inspect(task)
    except (ValueError, OSError) as error:
        return str(error)


def collected(items: list[Item], looked: Iterable[Inspection | str]) -> list[Inspection]:
    """What `inspect_or_fault` found of all pairs.

    Raises: ValueError: the first fault, and the names of further pairs that have one.
    """
    found: list[Inspection] = []
    faults: dict[str, str] = {}
    for item, each in zip(items, looked):
        if isinstance(each, Inspection):
            found.append(each)
        else:
            faults[item.name] = each
        if len(faults) > NAMED:  # a wrong option makes all pairs wrong: do not read them all
            break
    if not faults:
        return found
    first, *others = faults
    tail = ", ..." if len(faults) > NAMED else ""
    more = f" (faulty too: {', '.join(others[: NAMED - 1])}{tail})" if others else ""
    raise ValueError(f"{faults[first]}{more}")


def available() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_workers(function: Callable, tasks: list, workers: int, block: int = 256) -> Iterator:
    """function(task) in the tasks' order. At most `block` results wait, whoever is slower."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    with multiprocessing.get_context("fork").Pool(workers, begin_worker) as pool:
        for first in range(0, len(tasks), block):
            yield from pool.imap(function, tasks[first : first + block], chunksize=4)
        pool.close()  # all is done: let the workers end by themselves, without a signal
        pool.join()


def begin_worker() -> None:
    """Let this process end at SIGTERM, and be killed when its parent is.

    A handler that it inherits is Python's: one that arrives just before the worker waits for its
    next task would never run, and the pool would wait for the worker for ever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def sizes(found: list[Inspection]) -> dict[str, int]:
    """Pairs of each size, the most frequent first."""
    counts: dict[str, int] = {}
    for f in found:
        key = f"{f.size[1]}x{f.size[0]}"
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
