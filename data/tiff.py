"""What a TIFF's first directory says about its numbers; pixels are read by PIL."""

import math
import struct
from collections.abc import Callable
from pathlib import Path

from PIL import Image

BITS, DESCRIPTION, SAMPLE_FORMAT, GDAL_NODATA = 258, 270, 339, 42113
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
KINDS = {UNSIGNED: "unsigned integers", SIGNED: "signed integers", FLOAT: "floating-point numbers"}
READ = ("8- or 16-bit integers", "32-bit floating-point numbers")
MOST_TAGS = 4096


def layout(get: Callable) -> tuple[int, int]:
    """(bits, sample format) of the widest channel; `get(tag, default)` looks a tag up."""
    return max(get(BITS, (1,))), max(get(SAMPLE_FORMAT, (UNSIGNED,)))


def number_type(data: bytes) -> str:
    """Such as "64-bit floating-point numbers"; "" if these bytes do not begin with a TIFF."""
    tags = _first_directory(data)
    if BITS not in tags:
        return ""
    bits, kind = layout(tags.get)
    if (bits, kind) in ((8, UNSIGNED), (16, UNSIGNED), (8, SIGNED), (16, SIGNED)):
        return READ[0]
    return f"{bits}-bit {KINDS.get(kind, f'numbers of format {kind}')}"


def nodata(image) -> float | None:
    """The number in the tag GDAL_NODATA of PIL's image, as the pixels hold it; None without one.

    GDAL writes "nan" too; NaN pixels are refused where they are read.
    """
    try:
        value = float(str(image.tag_v2.get(GDAL_NODATA)).strip(" \0"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def description(path: Path) -> str:
    """The text of the tag ImageDescription, "" without one."""
    with Image.open(path, formats=("TIFF",)) as image:
        return str(image.tag_v2.get(DESCRIPTION, ""))


def _first_directory(data: bytes) -> dict[int, tuple[int, ...]]:
    """Tags of 16-bit numbers in the first directory of a classic TIFF, as far as it is there."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return {}
    tags = {}
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        for i in range(min(count, MOST_TAGS)):
            entry = start + 2 + 12 * i
            tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
            if kind == 3 and 0 < number <= 16:  # up to two fit into the entry, more are elsewhere
                place = struct.unpack_from(order + "I", data, entry + 8)[0]
                place = entry + 8 if number <= 2 else place
                tags[tag] = struct.unpack_from(f"{order}{number}H", data, place)
    except struct.error:  # truncated
        pass
    return tags
