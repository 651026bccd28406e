"""Limits on the number of pieces in an image file: PIL would read each one in Python.

A 4 x 4 image with 16 MiB of empty chunks, segments or blocks would take it half a minute.
"""

import re
from collections.abc import Iterator

from data import tiff

FEW = 10_000  # chunks of a PNG or blocks of a GIF; more where they are of some size
BYTES_A_PIECE = 1024
MOST_SEGMENTS = 4096  # of a JPEG, each of up to 64 kB
MOST_EXIF_SEGMENTS = 16
MOST_SCANNED = 5 * 10**9  # pixels of all scans of a progressive JPEG together
MOST_HEADER = 4096  # bytes of a PPM, with its comments


def check(data: bytes, where: str) -> None:
    """Raises: ValueError naming `where`: more pieces than any real program writes."""
    if data[:4] == b"\x89PNG":
        _check_count(_png_chunks(data), len(data), f"{where}: this PNG")
    elif data[:4] == b"GIF8":
        _check_count(_gif_blocks(data), len(data), f"{where}: this GIF")
    elif data[:2] == b"\xff\xd8":
        _check_jpeg(data, where)
    elif data[:1] == b"P" and data[1:2] in b"123456fFy":
        if len(data) > MOST_HEADER and len(ppm_header(data)) < 4:  # PIL reads it byte by byte
            raise ValueError(f"{where}: a PPM header of more than {MOST_HEADER} bytes; not decoded")
    else:
        tiff.check_tags(data, where)


def _check_count(found: Iterator[int], size: int, what: str) -> None:
    most = FEW + size // BYTES_A_PIECE
    for count, _ in enumerate(found):
        if count >= most:
            raise ValueError(f"{what} has more than {most:,} pieces; not decoded")


def _png_chunks(data: bytes) -> Iterator[int]:
    at = 8
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        yield at
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Blocks of comments and the like before the first image, each of which PIL reads by itself."""
    at = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 128 else 0)
    while at + 2 < len(data) and data[at] == ord("!"):
        at += 2
        while at < len(data) and data[at]:
            yield at
            at += 1 + data[at]
        yield at
        at += 1


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, body) of each segment before the pixels; at most one more than are allowed."""
    at = 2
    for _ in range(MOST_SEGMENTS + 1):
        if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] in (0xD9, 0xDA):
            return
        size = max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        yield data[at + 1], data[at + 4 : at + 2 + size]
        at += 2 + size


def _check_jpeg(data: bytes, where: str) -> None:
    segments, exif, pixels = list(jpeg_segments(data)), 0, 0
    for marker, body in segments:
        exif += marker == 0xE1 and body[:4] == b"Exif"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            pixels = int.from_bytes(body[1:3], "big") * int.from_bytes(body[3:5], "big")
    if len(segments) > MOST_SEGMENTS or exif > MOST_EXIF_SEGMENTS:
        raise ValueError(
            f"{where}: this JPEG has more than {MOST_SEGMENTS:,} segments, or more"
            f" than {MOST_EXIF_SEGMENTS} of EXIF; not decoded"
        )
    if (scans := data.count(b"\xff\xda")) * pixels > MOST_SCANNED:
        raise ValueError(f"{where}: this JPEG has {scans} scans; not decoded")


def ppm_header(data: bytes) -> list[bytes]:
    """Up to 4 words at the beginning of a PPM, comments left out: P5, width, height, maximum."""
    return re.sub(rb"#[^\r\n]*", b" ", data[:MOST_HEADER]).split(maxsplit=4)[:4]
