"""Generated infrared as files: grey levels, 16-bit numbers with their unit, or temperatures."""

import io
import json
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import tiff
from data.decoding import encode_npy, encode_png
from data.radiometry import TEMPERATURES, Planck, kelvin_known, to_kelvin
from data.transforms import MOST, Window, holds_whole_counts, to_8_bits, to_16_bits

SUFFIXES = {"png8": ".png", "png16": ".png", "npy": ".npy", "tiff": ".tiff"}


class Format(NamedTuple):
    """How to write: a key of SUFFIXES, and what [0,1] means (None for png8)."""

    kind: str
    window: Window | None = None
    planck: Planck | None = None


def make_format(kind: str, window: Window | None, planck: Planck | None, whole: bool) -> Format:
    """A checked format. `whole`: 16-bit numbers must be the data set's own whole counts.

    Raises: ValueError: the window is missing, or does not suit whole counts or temperatures.
    """
    if kind == "png8":
        return Format(kind)
    asked = "--counts" if whole else f"--format {kind}"
    if window is None:
        raise ValueError(
            f"{asked} needs the window of the training data, and this run has none"
            f" (data.window=per_image)"
        )
    if whole and not holds_whole_counts(window):
        raise ValueError(
            f"--counts writes whole numbers from 0 to {MOST}, too few or too coarse for the"
            f" training data's window {window.low:g} to {window.high:g}; --format png16 scales them"
        )
    if kind == "npy" and not kelvin_known(window.unit, planck):
        raise ValueError(
            f"--format npy writes kelvin, and the unit of the training data is '{window.unit}',"
            f" not {', '.join(TEMPERATURES)}: prepare.py --unit, --scale and --offset say what"
            f" counts mean; --format png16 and tiff need no temperature"
        )
    return Format(kind, window, planck)


def encode(values: np.ndarray, to: Format) -> dict[str, bytes]:
    """(H,W) in [0,1] to the bytes of each file, by suffix.

    png8: grey. png16: number * scale + offset is in the unit that the sidecar .json names; whole
    counts stay what they were. npy: float32 kelvin. tiff: float32 kelvin, or the data set's unit
    where no temperature is known; the description says which.
    """
    if to.kind == "png8":
        return {".png": encode_png(to_8_bits(values))}
    assert to.window is not None  # every other kind has one
    if to.kind == "png16":
        numbers, scale, offset = to_16_bits(values, to.window)
        facts = {"unit": to.window.unit, "scale": scale, "offset": offset}
        if to.planck:
            facts["planck"] = to.planck._asdict()
        # in this order: an image that is there has its scale beside it
        return {".json": json.dumps(facts, indent=1).encode(), ".png": encode_png(numbers)}
    low, high, unit = to.window
    exact = np.clip(np.asarray(values, np.float64), 0, 1) * (high - low) + low
    if kelvin_known(unit, to.planck):
        exact, unit = to_kelvin(exact, unit, to.planck), "kelvin"
    exact = exact.astype(np.float32)
    if to.kind == "npy":
        return {".npy": encode_npy(exact)}
    buffer = io.BytesIO()
    description = {tiff.DESCRIPTION: json.dumps({"unit": unit})}
    Image.fromarray(exact).save(buffer, format="TIFF", tiffinfo=description)
    return {".tiff": buffer.getvalue()}
