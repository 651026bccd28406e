"""FLIR radiometric JPEG: the raw counts and Planck constants behind the picture.

The file is a JPEG of the camera's display; segments APP1 "FLIR" carry, in order, a container of
records (layout as documented by ExifTool's FLIR.pm). Every size in it is checked before use.
"""

import struct
from typing import NamedTuple

import numpy as np

from data import pieces
from data.decoding import open_image
from data.radiometry import Planck, make_planck

MOST_BYTES = 256 * 2**20  # of the container
MOST_RECORDS = 1000
MOST_SIDE = 20_000
RAW, CAMERA = 0x01, 0x20  # types of records
HEADER = 8  # "FLIR", 0, 1, number of this part, number of the last


class Thermal(NamedTuple):
    """(H,W) uint16 counts as stored, and the camera's constants if the file has them."""

    counts: np.ndarray
    planck: Planck | None


def is_thermal_jpeg(data: bytes) -> bool:
    """Whether a segment of FLIR's is there; looks at the headers of segments only."""
    return any(True for _ in _parts(data))


def read_thermal_jpeg(data: bytes, where: str) -> Thermal:
    """Counts and constants. Raises: ValueError naming `where`: damaged, or no raw image inside."""
    try:
        records = _records(_joined(data))
        if RAW not in records:
            raise ValueError("no raw image")
        return Thermal(_raw_image(records[RAW]), _planck(records.get(CAMERA), where))
    except Exception as error:  # struct's, numpy's, and the dozen types of PIL
        raise ValueError(f"{where}: damaged radiometric JPEG ({error})") from None


def _parts(data: bytes):
    """(number, number of the last, body) of each APP1 segment of FLIR's."""
    if data[:2] == b"\xff\xd8":
        for marker, body in pieces.jpeg_segments(data):
            if marker == 0xE1 and body[:5] == b"FLIR\0" and len(body) >= HEADER:
                yield body[6], body[7], body[HEADER:]


def _joined(data: bytes) -> bytes:
    parts = list(_parts(data))
    expected = parts[0][1] + 1
    bodies = {number: body for number, _, body in parts}
    if sorted(bodies) != list(range(expected)):
        raise ValueError(f"{len(bodies)} of its {expected} parts are there")
    whole = b"".join(bodies[number] for number in range(expected))
    if len(whole) > MOST_BYTES or whole[:4] not in (b"FFF\0", b"AFF\0"):
        raise ValueError("not FLIR's container")
    return whole


def _records(whole: bytes) -> dict[int, bytes]:
    """The first record of each type."""
    order = ">" if 100 <= struct.unpack_from(">I", whole, 20)[0] < 200 else "<"
    start, count = struct.unpack_from(order + "II", whole, 24)
    found: dict[int, bytes] = {}
    for i in range(min(count, MOST_RECORDS)):
        kind, _, _, _, offset, size = struct.unpack_from(order + "HHIIII", whole, start + 32 * i)
        if kind and size:
            if offset + size > len(whole):
                raise ValueError(f"record {kind:#x} ends behind the file")
            found.setdefault(kind, whole[offset : offset + size])
    return found


def _order(record: bytes) -> str:
    """Byte order of a record that begins with the number 2 (newer ones: a small number)."""
    return "<" if struct.unpack_from("<H", record)[0] < 256 else ">"


def _raw_image(record: bytes) -> np.ndarray:
    order = _order(record)
    width, height = struct.unpack_from(order + "HH", record, 2)
    if not (0 < width <= MOST_SIDE and 0 < height <= MOST_SIDE):
        raise ValueError(f"a raw image of {width} x {height}")
    body = record[32:]
    if body[:4] in (b"\x89PNG", b"II*\0", b"MM\0*"):
        image = open_image(body, "the raw image")
        if image.size != (width, height) or not image.mode.startswith("I"):
            raise ValueError(f"a raw image of {image.size} in {image.mode}, not {width} x {height}")
        counts = np.array(image).astype(np.uint16)
    elif len(body) >= 2 * width * height:
        counts = np.frombuffer(body, order + "u2", width * height).reshape(height, width)
        counts = counts.astype(np.uint16)
    else:
        raise ValueError(f"{len(body)} bytes of a raw image of {width} x {height}")
    # Most cameras write the bytes of a PNG the wrong way round: the order is that which is smooth.
    other = counts.byteswap()
    return other if _roughness(other) < _roughness(counts) else counts


def _roughness(counts: np.ndarray) -> float:
    return float(np.abs(np.diff(counts.astype(np.int32), axis=1)).mean())


def _planck(record: bytes | None, where: str) -> Planck | None:
    if record is None or len(record) < 0x310:
        return None
    order = _order(record)
    r1, b, f = struct.unpack_from(order + "fff", record, 0x58)
    o, r2 = struct.unpack_from(order + "if", record, 0x308)
    if r1 == 0 and b == 0:
        return None
    return make_planck({"R1": r1, "B": b, "F": f, "O": o, "R2": r2}, where)
