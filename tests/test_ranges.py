"""prepare.py on values that people have: orientation, windows of counts, radiometry."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import prepare
from data.pairs import DataConfig, LabelConfig, open_pairs
from tests import tiny_data as tiny


def run(root, *options, out="out") -> dict:
    """Prepare root/visible and root/infrared into root/out, in this process; the manifest."""
    folders = ("--visible", root / "visible", "--infrared", root / "infrared")
    argv = [*folders, "--out", root / out, "--num_workers", 1, *options]
    prepare.main([str(a) for a in argv])
    return json.loads((root / out / "manifest.json").read_text())


def opened(root, split="all"):
    labels = LabelConfig(material_source="none")
    return open_pairs(DataConfig(path=str(root / "out"), labels=labels), split)


def wide_png_with_exif(counts: np.ndarray, orientation: int) -> bytes:
    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    exif = Image.Exif()
    exif[0x112] = orientation
    height, width = counts.shape
    rows = (b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in counts)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
            chunk(b"eXIf", exif.tobytes()[6:]),
            chunk(b"IDAT", zlib.compress(b"".join(rows))),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize("orientation, back", [(3, 2), (6, 1), (8, 3)])  # back: np.rot90's turns
def test_sides_turned_by_exif_are_both_upright_in_the_set(tmp_path, orientation, back):
    names = [f"s{i}" for i in range(6)]
    tiny.folders(tmp_path, names)
    exif = Image.Exif()
    exif[0x112] = orientation
    for i, name in enumerate(names):
        visible = Image.fromarray(np.rot90(tiny.visible(i), back).copy())
        visible.save(tmp_path / "visible" / f"{name}.png", exif=exif)
        counts = np.rot90(tiny.infrared(i, dtype=np.uint16), back)
        path = tmp_path / "infrared" / f"{name}.png"
        path.write_bytes(wide_png_with_exif(counts, orientation))
    run(tmp_path)
    pairs = opened(tmp_path)
    for k, name in enumerate(pairs.names):
        i = names.index(name)
        assert np.array_equal(pairs.pair(k).visible, tiny.visible(i))
        assert np.array_equal(pairs.pair(k).infrared, tiny.infrared(i, dtype=np.uint16))
