"""What a TIFF's first directory says about its numbers; pixels are read by PIL."""

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

BITS, DESCRIPTION, SAMPLE_FORMAT, GDAL_NODATA = 258, 270, 339, 42113
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
KINDS = {UNSIGNED: "unsigned integers", SIGNED: "signed integers", FLOAT: "floating-point numbers"}
READ = ("8- or 16-bit integers", "32-bit floating-point numbers")
CLASSIC: dict[bytes, Literal["little", "big"]] = {
    b"II*\0": "little",
    b"MM\0*": "big",
    b"II\0*": "little",  # wrong, but PIL reads these two as well
    b"MM*\0": "big",
}
BIG = (b"II+\0", b"MM\0+")
# Bytes of a value by its type's number; texts and bytes are copied, fractions cost the most.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
BYTES, FRACTIONS = (1, 2, 6, 7), (5, 10)
MOST_TAGS, MOST_NUMBERS, MOST_FRACTIONS, MOST_TEXT = 4096, 2**20, 2**16, 2**20


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
    """The text of the tag ImageDescription of a classic TIFF, "" without one; reads no pixels."""
    with open(path, "rb") as file:
        if (order := CLASSIC.get(file.read(4))) is None:
            return ""
        file.seek(int.from_bytes(file.read(4), order))
        count = min(int.from_bytes(file.read(2), order), MOST_TAGS)
        table = file.read(12 * count)
        for at in range(0, len(table), 12):
            tag, number, place = (
                int.from_bytes(table[at + first : at + last], order)
                for first, last in ((0, 2), (4, 8), (8, 12))
            )
            if tag == DESCRIPTION and 4 < number <= MOST_TEXT:
                file.seek(place)
                return file.read(number).partition(b"\0")[0].decode(errors="replace")
    return ""


def check_tags(data: bytes, where: str) -> None:
    """Raises: ValueError: tags that would cost PIL minutes, in the first directory of a TIFF."""
    total = 0
    for number, entry in enumerate(_entries(data)):
        most = MOST_FRACTIONS if entry.kind in FRACTIONS else MOST_NUMBERS
        if entry.kind not in BYTES and entry.number > most:
            raise ValueError(f"{where}: tag {entry.tag} of this TIFF has {entry.number:,} values")
        size = SIZES.get(entry.kind, 0) * entry.number
        total += size if entry.place + size <= len(data) else 0  # PIL passes over the others
        if total > len(data) or number >= MOST_TAGS:
            raise ValueError(f"{where}: the tags of this TIFF have more bytes than the file")


class _Entry(NamedTuple):
    tag: int
    kind: int
    number: int  # of values
    place: int  # of the first one


def _entries(data: bytes) -> Iterator[_Entry]:
    """The first directory of a TIFF or BigTIFF, as far as it is there."""
    big = data[:4] in BIG
    order = "<" if data[:2] == b"II" else ">"
    if data[:4] not in CLASSIC and not big:
        return
    start, head, value = ("Q", "Q", 8) if big else ("I", "H", 4)
    entry = struct.Struct(order + ("HHQ" if big else "HHI"))
    try:
        (at,) = struct.unpack_from(order + start, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + head, data, at)
        at += struct.calcsize(head)
        for _ in range(min(count, MOST_TAGS + 1)):
            tag, kind, number = entry.unpack_from(data, at)
            here = at + entry.size
            (place,) = struct.unpack_from(order + start, data, here)
            yield _Entry(tag, kind, number, here if SIZES.get(kind, 0) * number <= value else place)
            at = here + value
    except struct.error:  # truncated
        return


def _first_directory(data: bytes) -> dict[int, tuple[int, ...]]:
    """Tags of a few 16-bit numbers in the first directory, as far as it is there."""
    order, tags = "<" if data[:2] == b"II" else ">", {}
    for tag, kind, number, place in _entries(data):
        if kind == 3 and 0 < number <= 16 and place + 2 * number <= len(data):
            tags[tag] = struct.unpack_from(f"{order}{number}H", data, place)
    return tags
