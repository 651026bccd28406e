"""The infrared side as prepare.py reads it: camera files, false colour, units beside the files."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import false_colour, radiometry, tiff
from data.decoding import decode_colours, decode_infrared, encode_npy, encode_png, turned_as
from data.materials import PALETTES
from data.thermal_jpeg import is_thermal_jpeg, read_thermal_jpeg

SIDECAR_BYTES = 2**20
FACTS = ("unit", "scale", "offset", "planck")


class Infrared(NamedTuple):
    """One image: its values, the bytes that a row keeps, and the camera's constants if known."""

    values: np.ndarray
    stored: bytes
    planck: radiometry.Planck | None = None


def read_infrared(data: bytes, where: str, unit: str = "counts", palette: str = "") -> Infrared:
    """Decode a file; what is no plain image of numbers is stored as one.

    A radiometric JPEG becomes a 16-bit PNG of its counts or, where `unit` is a temperature, a .npy
    of it. An image in the colours of `palette` becomes an 8-bit PNG of levels.
    Raises: ValueError naming `where`: see `decode_infrared`; no constants to make kelvin of counts.
    """
    if is_thermal_jpeg(data):
        counts, planck = read_thermal_jpeg(data, where)
        counts = turned_as(counts, data, where)
        if unit not in radiometry.TEMPERATURES:
            return Infrared(counts, encode_png(counts), planck)
        if planck is None:
            raise ValueError(
                f"{where}: no Planck constants in this file to convert counts to {unit}"
            )
        values = radiometry.from_kelvin(planck.to_kelvin(counts), unit).astype(np.float32)
        return Infrared(values, encode_npy(values))
    if palette:
        levels = false_colour.invert(decode_colours(data, where), palette, where)
        return Infrared(levels, encode_png(levels))
    return Infrared(decode_infrared(data, where), data)


def split_palettes(text: str) -> tuple[str, str]:
    """The names after --palette: of class images, and of false-colour infrared.

    Raises: ValueError: an unknown name, or two for one purpose.
    """
    names = [name for name in text.split(",") if name]
    classes = [name for name in names if name in PALETTES]
    thermal = [name for name in names if name not in PALETTES]
    for name in thermal:
        false_colour.check_name(name)
    if len(classes) > 1 or len(thermal) > 1:
        raise ValueError(f"--palette {text}: one name for class images, one for infrared")
    return (classes or [""])[0], (thermal or [""])[0]


class Radiometry(NamedTuple):
    """What a stored number means: number * scale + offset in `unit`, or counts of a camera."""

    unit: str = "counts"
    scale: float = 1.0
    offset: float = 0.0
    planck: radiometry.Planck | None = None

    def columns(self) -> dict:
        """A row's columns; no numbers where they change nothing."""
        plain = (self.scale, self.offset) == (1.0, 0.0)
        return {
            "ir_unit": self.unit,
            "ir_scale": None if plain else self.scale,
            "ir_offset": None if plain else self.offset,
        }


def given_radiometry(args, items: list) -> Radiometry:
    """From --unit, --scale and --offset, else from what lies beside the infrared files.

    Sidecars NAME.json and the descriptions of TIFFs are those that generate.py writes.
    Raises: ValueError: they differ from file to file, or only some files have one.
    """
    if (args.unit, args.scale, args.offset) != (None, 1.0, 0.0):
        return Radiometry(args.unit or "counts", args.scale, args.offset)
    found = [facts_beside(item.infrared) for item in items]
    if not any(found):
        return Radiometry()
    for item, facts in zip(items, found):
        if facts != found[0]:
            raise ValueError(
                f"{item.infrared} has {facts or 'no unit'} beside it, {items[0].infrared} has"
                f" {found[0] or 'none'}: a data set has one unit; give --unit, --scale and --offset"
            )
    where = f"{items[0].infrared} (beside it)"
    planck = found[0].get("planck")
    planck = radiometry.make_planck(planck, where) if planck is not None else None
    try:
        scale, offset = float(found[0].get("scale", 1)), float(found[0].get("offset", 0))
    except (TypeError, ValueError):
        raise ValueError(f"{where}: scale and offset must be numbers, got {found[0]}") from None
    if not (0 < scale < np.inf and np.isfinite(offset)):
        raise ValueError(f"{where}: impossible scale {scale} or offset {offset}")
    print(
        f"note: unit {found[0]['unit']}, scale {scale:g}, offset {offset:g} from beside the files"
    )
    return Radiometry(found[0]["unit"], scale, offset, planck)


def facts_beside(path: Path) -> dict:
    """Unit and scale from a file's sidecar or TIFF description; {} without."""
    sidecar = path.with_suffix(".json")
    try:
        if sidecar.is_file() and sidecar.stat().st_size <= SIDECAR_BYTES:
            text = sidecar.read_text(encoding="utf-8-sig")
        elif path.suffix.lower() in (".tif", ".tiff"):
            text = tiff.description(path)
        else:
            return {}
        facts = json.loads(text)
    except (ValueError, OSError, RecursionError):
        return {}  # another program's file
    if not isinstance(facts, dict) or not isinstance(facts.get("unit"), str):
        return {}
    return {key: facts[key] for key in FACTS if facts.get(key) is not None}


def agreed_radiometry(given: Radiometry, items: list, found: list) -> Radiometry:
    """With the constants that all camera files share, if they have any.

    Raises: ValueError: they differ, so that one window of counts would mean several temperatures;
    or counts that were converted already are to be scaled.
    """
    first = found[0].planck
    for item, one in zip(items, found):
        if one.planck != first:
            raise ValueError(
                f"{item.infrared} and {items[0].infrared} have different Planck constants, so equal"
                f" counts are unequal temperatures; --unit kelvin (or celsius) stores temperatures"
            )
        from_camera = first is not None or (one.converted and one.dtype == "float32")
        if from_camera and (given.scale, given.offset) != (1.0, 0.0):
            raise ValueError(
                f"{item.infrared} brings its own calibration; leave out --scale and --offset"
            )
    if first is None:
        return given
    print("note: infrared is the raw counts in the radiometric JPEGs (--unit kelvin: temperatures)")
    return given._replace(planck=first)
