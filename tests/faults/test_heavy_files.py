"""A few pixels or rows with a gigabyte behind them: refused, or read in bounded time and memory.

pytest tests/faults/test_heavy_files.py
"""

import io
import os
import resource
import struct
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import decoding, thermal_jpeg
from data.infrared_files import facts_beside, read_infrared
from data.row_index import Rows
from data.shard_files import find_files
from data.shards import RowReader
from tests.faults import forks
from tests.tiny_data import png, visible

MIB = 2**20
SIZE = 12 * MIB  # of what is beside the pixels, little enough to be no reason by itself
SECONDS, MEMORY = 5, 256 * MIB


def saved(format):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(buffer, format)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def in_png(extra):
    whole = saved("PNG")
    return whole[:33] + extra + whole[33:]


def a_gigabyte():
    """A gigabyte of zeros, deflated: one block, which is repeated."""
    pack = zlib.compressobj(9, wbits=-15)
    block = pack.compress(bytes(MIB)) + pack.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">I", (2**30 % 65521) << 16 | 1)
    return b"\x78\xda" + block * 1024 + pack.flush() + checksum


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def in_jpeg(extra):
    whole = saved("JPEG")
    return whole[:2] + extra + whole[2:]


def many(piece):
    return piece * (SIZE // len(piece))


def tiff(tag, kind, number, body=b""):
    """4 x 4 grey pixels, and a tag whose values lie behind the directory."""
    tags = {256: (3, 1, 4), 257: (3, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    tags |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (3, 1, 4), 279: (4, 1, 16)}
    tags[tag] = (kind, number, 24 + 2 + 12 * len({*tags, tag}) + 4)
    entries = [struct.pack("<HHII", t, *tags[t]) for t in sorted(tags)]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + directory + body


def one_region_many_times():
    """3,000 tags of 6 MiB that are all the same bytes."""
    entries = [struct.pack("<HHII", 40000 + i, 1, SIZE // 2, 40000) for i in range(3000)]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(SIZE, b"\1")


def gif(extra, frames=1):
    whole = saved("GIF")
    at = whole.index(b",")
    return whole[:at] + extra + whole[at:-1] * frames + b";"


def npy(shape, descr="<f4"):
    buffer = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


HEAVY = {
    "png text": lambda: in_png(chunk(b"zTXt", b"a\0\0" + a_gigabyte())),
    "png international text": lambda: in_png(chunk(b"iTXt", b"a\0\1\0\0\0" + a_gigabyte())),
    "png profile": lambda: in_png(chunk(b"iCCP", b"a\0\0" + a_gigabyte())),
    "png pixels": lambda: saved("PNG")[:33] + chunk(b"IDAT", a_gigabyte()) + chunk(b"IEND", b""),
    "png chunks": lambda: in_png(many(chunk(b"abCd", b""))),
    "png texts": lambda: in_png(many(chunk(b"tEXt", b"a\0b"))),
    "png trailer": lambda: saved("PNG") + bytes(32 * MIB),
    "jpeg segments": lambda: in_jpeg(many(segment(0xEF, b""))),
    "jpeg comments": lambda: in_jpeg(many(segment(0xFE, b"x" * 60000))),
    "jpeg exif": lambda: in_jpeg(many(segment(0xE1, b"Exif\0\0" + b"x" * 1000))),
    "jpeg flir": lambda: in_jpeg(many(segment(0xE1, b"FLIR\0\1\0\xff"))),
    "jpeg profile": lambda: in_jpeg(many(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 1000))),
    "tiff claim": lambda: tiff(270, 2, 2**30),
    "tiff text": lambda: tiff(270, 2, 32 * MIB, b"a" * 32 * MIB),
    "tiff bits": lambda: tiff(258, 3, SIZE // 2, many(b"\10\0")),
    "tiff fractions": lambda: tiff(282, 5, SIZE // 8, many(struct.pack("<II", 1, 1))),
    "tiff offsets": lambda: tiff(273, 4, SIZE // 4, many(struct.pack("<I", 8))),
    "tiff regions": one_region_many_times,
    "gif comments": lambda: gif(many(b"!\xfe\1x\0")),
    "gif frames": lambda: gif(b"", SIZE // 40),
    "ppm comment": lambda: b"P5 " + many(b"# x\n") + b"4 4 255\n" + bytes(16),
    "npy shape": lambda: npy((10**9, 10**9)),
    "npy digits": lambda: npy((10**4000, 10**4000)),
    "npy of nothing": lambda: npy((2**60, 0)),
    "npy item": lambda: npy((4, 4), "|V2000000000"),
}


def bounded(work):
    """Do `work` in a child of little memory and time: 0 only if nothing but a sentence came up."""

    def limited():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        begun = time.perf_counter()
        try:
            work()
        except (ValueError, OSError) as error:
            assert "heavy" in str(error)
        assert time.perf_counter() - begun < SECONDS

    return forks.status(forks.start(limited)) == 0


@pytest.mark.parametrize("make", HEAVY.values(), ids=HEAVY)
def test_a_few_pixels_with_a_gigabyte_behind_them_cost_little(make):
    data = make()
    assert bounded(partial(read_infrared, data, "heavy"))
    assert bounded(partial(decoding.decode_visible, data, "heavy"))


def test_a_radiometric_jpeg_with_a_huge_image_inside_is_refused_from_its_header():
    header = chunk(b"IHDR", struct.pack(">II", 16000, 12000) + b"\x10\0\0\0\0")
    inside = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", a_gigabyte()) + chunk(b"IEND", b"")
    record = struct.pack("<HHH", 2, 16000, 12000).ljust(32, b"\0") + inside
    with pytest.raises(ValueError, match="192,000,000 pixels"):
        thermal_jpeg._raw_image(record)


def test_a_file_of_gigabytes_is_refused_without_being_read(tmp_path):
    path = tmp_path / "heavy.png"
    path.write_bytes(saved("PNG"))
    os.truncate(path, 2**33)
    assert bounded(partial(decoding.read_file, path))
    with pytest.raises(ValueError, match="heavy.png has more than 1,073,741,824 bytes"):
        decoding.read_file(path)


def test_the_description_of_a_tiff_is_read_without_its_pixels(tmp_path):
    path = tmp_path / "heavy.tif"
    path.write_bytes(tiff(270, 2, 18, b'{"unit": "kelvin"}'))
    os.truncate(path, 2**33)
    assert facts_beside(path) == {"unit": "kelvin"}


def shared(path, value, rows, **columns):
    """A parquet file in which all rows have one image, which is stored once."""
    once = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    names = [str(i) for i in range(rows)]
    table = pa.table({"visible": once, "infrared": once, "name": names, **columns})
    pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=rows)
    return Rows(find_files(str(path)), [0.8, 0.1, 0.1])


@pytest.mark.parametrize("struct_of", [False, True], ids=["bytes", "struct"])
def test_kilobytes_of_parquet_that_decode_to_gigabytes_are_read_as_they_are(tmp_path, struct_of):
    path, value = tmp_path / "heavy.parquet", png(visible(1)) + bytes(3 * MIB)
    rows = shared(path, value, 1024)
    if struct_of:  # as Hugging Face writes them
        table = pq.read_table(path, read_dictionary=["visible", "infrared"])
        for i in (0, 1):
            images = pa.StructArray.from_arrays([table[i].combine_chunks()], ["bytes"])
            table = table.set_column(i, table.schema.names[i], images)
        pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=1024)
        rows = Rows(find_files(str(path)), [0.8, 0.1, 0.1])
    assert path.stat().st_size < 100_000

    def read():
        found = RowReader(rows).read(1000)
        assert found["visible"] == found["infrared"] == value

    assert bounded(read)


def test_kilobytes_of_names_that_decode_to_gigabytes_are_refused(tmp_path):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 9999), pa.array(["s" * MIB]))
    with pytest.raises(ValueError, match=r"heavy.parquet: 10,\d+,\d+,\d+ bytes of names"):
        shared(tmp_path / "heavy.parquet", b"x", 9999, source=text)


def test_more_rows_than_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"heavy.parquet: 500,000 rows in [\d,]+ bytes"):
        rows = 500_000
        once = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([b"x"]))
        table = pa.table({"visible": once, "infrared": once})
        pq.write_table(table, tmp_path / "heavy.parquet", store_schema=False)
        Rows(find_files(str(tmp_path)), [0.8, 0.1, 0.1])
