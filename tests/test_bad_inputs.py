"""Bad inputs that no other test has: one sentence with the place, exit code 2, nothing left.

    pytest tests/test_bad_inputs.py

The tables below are SETS and OPTIONS of prepare.py, FILES of parquet for the other scripts. Further
kinds, each with a test of its own: truncated files, false colour, class ids out of range, names on
one side only, two files of one name, one image on both sides, files that change meanwhile, wrong
splits, links to nothing, images outside the window (test_prepare.py); NaN, shapes, transparency,
pickles, wide channels, lost digits, 0 as white, class ids in a JPEG (test_decoding.py);
radiometric files that are damaged or differ (test_ranges.py); layouts that do not fit
(test_layouts.py); rules of splits (test_splits.py); missing columns, text for bytes, units and
windows that differ, one content in two splits (test_pairs.py); camera raw, HEIC (test_outputs.py).
"""

import io
import os
import re
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import prepare
from tests import tiny_data as tiny
from tests.conftest import call_main
from utils.run import entry

NAMES = [f"a_{i}" for i in range(10)]


def encoded(array, form, mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def frames(array, form):
    return encoded(array, form, save_all=True, append_images=[Image.fromarray(255 - array)])


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def put(kind, data, name="a_3.png"):
    """Write a file in place of the fourth image of one side."""

    def change(root):
        (root / kind / "a_3.png").unlink()
        (root / kind / name).write_bytes(data)

    return change


def archive():
    buffer = io.BytesIO()
    np.savez(buffer, tiny.infrared(3))
    return buffer.getvalue()


def pipe(root):
    (root / "visible" / "a_3.png").unlink()
    os.mkfifo(root / "visible" / "a_3.png")


def directory(root):
    (root / "infrared" / "a_3.png").unlink()
    (root / "infrared" / "a_3.png").mkdir()


def emptied(root):
    for path in (root / "infrared").iterdir():
        path.unlink()


def few(root):
    for kind in ("visible", "infrared"):
        for name in NAMES[2:]:
            (root / kind / f"{name}.png").unlink()


def sidecars(text, count=10):
    def change(root):
        for name in NAMES[:count]:
            (root / "infrared" / f"{name}.json").write_text(text)

    return change


def semantic(data):
    def change(root):
        (root / "semantic").mkdir()
        (root / "semantic" / "a_3.png").write_bytes(data)

    return change


def no_change(root):
    pass


CLASSES = ["--semantic", "{root}/semantic", "--table", "msrs"]
GREY, COLOUR = tiny.infrared(3), tiny.visible(3)

# kind: (what is done to the folders, more arguments, the sentence)
SETS = {
    "empty file": (put("visible", b""), [], r"visible/a_3\.png: not a readable image"),
    "web page": (put("visible", b"<html>404</html>"), [], r"visible/a_3\.png: not a readable"),
    "zeros": (put("infrared", bytes(5000)), [], r"infrared/a_3\.png: not a readable image"),
    "CMYK": (
        put("visible", encoded(COLOUR, "JPEG", "CMYK"), "a_3.jpg"),
        [],
        r"visible/a_3\.jpg: the visible image has 4 channels \(CMYK\), expected 3",
    ),
    "moving picture": (
        put("visible", frames(COLOUR, "PNG")),
        [],
        r"visible/a_3\.png: several frames",
    ),
    "pages": (put("infrared", frames(GREY, "TIFF"), "a_3.tif"), [], r"a_3\.tif: several frames"),
    "one bit": (
        put("infrared", encoded(GREY, "PNG", "1")),
        [],
        r"a_3\.png: .* has 1 bit per pixel",
    ),
    "complex": (
        put("infrared", npy(GREY.astype(complex)), "a_3.npy"),
        [],
        r"a_3\.npy: infrared of type complex128, expected numbers",
    ),
    "truth values": (
        put("infrared", npy(GREY > 99), "a_3.npy"),
        [],
        r"a_3\.npy: infrared of type bool, expected numbers",
    ),
    "archive": (put("infrared", archive(), "a_3.npy"), [], r"a_3\.npy: not a readable image"),
    "records": (
        put("infrared", npy(np.zeros((24, 32), [("t", "f4")])), "a_3.npy"),
        [],
        r"a_3\.npy: infrared of type .*, expected numbers",
    ),
    "other size": (
        put("visible", tiny.png(tiny.visible(3, (20, 30)))),
        [],
        r"a_3\.png of source 'pairs': visible is 30 x 20 but infrared is 32 x 24",
    ),
    "heavy": (
        put("visible", tiny.png(COLOUR) + bytes(17 * 2**20)),
        [],
        r"a_3\.png: 17,\d+,\d+ bytes for 32 x 24 pixels",
    ),
    "pipe": (pipe, [], r"a_3\.png: a broken link, or not a regular file"),
    "folder": (directory, [], r"1 visible without infrared \(first: a_3\)"),
    "no images": (emptied, [], r"infrared: no image there"),
    "two pairs": (few, [], r"2 "),
    "class image of other size": (
        semantic(tiny.png(np.zeros((9, 9), np.uint8))),
        CLASSES,
        r"semantic/a_3\.png: semantic is 9 x 9 but infrared is 32 x 24",
    ),
    "class image damaged": (
        semantic(tiny.png(np.zeros((24, 32), np.uint8))[:45]),
        CLASSES,
        r"semantic/a_3\.png: (damaged|not a readable)",
    ),
    "scale in words": (
        sidecars('{"unit": "kelvin", "scale": "ten"}'),
        [],
        r"a_0\.png \(beside it\): scale and offset must be numbers",
    ),
    "scale of zero": (
        sidecars('{"unit": "kelvin", "scale": 0}'),
        [],
        r"a_0\.png \(beside it\): impossible scale 0",
    ),
    "some sidecars": (
        sidecars('{"unit": "kelvin", "scale": 0.1}', 5),
        [],
        r"a_5\.png has no unit beside it",
    ),
    "constants": (
        sidecars('{"unit": "counts", "planck": {"R1": "much"}}'),
        [],
        r"a_0\.png \(beside it\)",
    ),
}

OPTIONS = {
    "splits are a folder": (["--splits", "{root}/visible"], r"visible"),
    "splits are a device": (["--splits", "/dev/zero"], r"/dev/zero is a device"),
    "splits are nested": (["--splits", "{root}/deep.json"], r"deep\.json: not a JSON object"),
    "scale of zero": (["--scale", "0"], r"--scale"),
    "table": (
        ["--semantic", "{root}/visible", "--table", "nonsense"],
        r"nonsense|--table must say",
    ),
    "palette": (["--palette", "nonsense"], r"nonsense|--table must say"),
    "shares": (["--split_fractions", "nan", "0", "1"], r"--split_fractions"),
    "window": (["--window", "0", "inf"], r"a window needs two finite numbers"),
    "endings": (["--suffixes", "_rgb,_ir"], r"--suffixes takes three endings"),
    "a set that is no set": (
        ["--overwrite", "--out", "{root}/visible"],
        r"is no prepared data set",
    ),
    "no such set": (["--check", "{root}/none"], r"none: no such file or folder"),
    "images as a set": (["--check", "{root}/visible"], r"no \.parquet file there; prepare\.py"),
    "scenes of no size": (["--synthetic", "9", "--size", "0"], r"sides must be >= 16 pixels"),
    "few scenes": (["--synthetic", "-1"], r"--synthetic needs at least 3 scenes"),
    "nodata": (["--nodata", "nan"], r"--nodata"),
    "misspelt": (["--visibel", "x"], r"^error: unrecognized arguments: --visibel x; --help"),
    "no number": (["--gap", "much"], r"^error: argument --gap: invalid int value: 'much'; --help"),
}


def refused(work, capsys, message):
    """Runs a script's main as the command would: exit code 2 and one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        entry(work)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stop.value.code == 2
    (line,) = lines
    assert re.search(message, line), line


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.folders(tmp_path_factory.mktemp("good"), NAMES)


def arguments(root, more):
    given = ["--visible", f"{root}/visible", "--infrared", f"{root}/infrared"]
    given = [] if "--check" in more or "--synthetic" in more else given
    return [*given, "--out", f"{root}/out", "--num_workers", "1"] + [
        x.format(root=root) for x in more
    ]


@pytest.mark.parametrize("change, more, message", SETS.values(), ids=SETS)
def test_a_bad_set_is_one_sentence_and_leaves_nothing(
    good, tmp_path, capsys, change, more, message
):
    root = tmp_path / "set"
    shutil.copytree(good, root)
    change(root)
    before = sorted(root.rglob("*"))
    refused(partial(prepare.main, arguments(root, more)), capsys, message)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_all_damaged_files_are_named_at_once(good, tmp_path, capsys, workers):
    root = tmp_path / "set"
    shutil.copytree(good, root)
    for name in (NAMES[1], NAMES[3], NAMES[4]):
        file = root / "visible" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:-40])
    message = rf"{NAMES[1]}\.png: damaged.* \(faulty too: {NAMES[3]}, {NAMES[4]}\)$"
    more = ["--num_workers", str(workers)]
    refused(partial(prepare.main, arguments(root, more)), capsys, message)


@pytest.mark.parametrize("more, message", OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_is_one_sentence_and_leaves_nothing(good, tmp_path, capsys, more, message):
    root = tmp_path / "set"
    shutil.copytree(good, root)
    (root / "deep.json").write_text('{"train": ' + "[" * 10**5)
    before = sorted(root.rglob("*"))
    refused(partial(prepare.main, arguments(root, more)), capsys, message)
    assert sorted(root.rglob("*")) == before


def table(**columns):
    names = [f"p{i}" for i in range(10)]
    return pa.table({"visible": [b"x"] * 10, "infrared": [b"x"] * 10, "name": names} | columns)


def damaged_row():
    columns = tiny.rows(10)
    columns["infrared"][0] = columns["infrared"][0][:60]
    return pa.table(columns)


FILES = {
    "text": (b"visible,infrared\n", r"a\.parquet: not a readable parquet file"),
    "empty": (b"", r"a\.parquet: not a readable parquet file"),
    "no rows": (table().slice(0, 0), r"no pair in split 'train'"),
    "numbers": (table(visible=[1] * 10), r"a\.parquet: column 'visible' holds int64"),
    "lists": (table(name=[["a"]] * 10), r"a\.parquet: column 'name' holds list"),
    "scale": (table(ir_scale=[0.0] * 10), r"a\.parquet, row 0, 'p0': ir_scale is 0\.0"),
    "split": (table(split=["some"] * 10), r"a\.parquet, row 0, 'p0': split is 'some'"),
    "damaged row": (damaged_row(), r"a\.parquet, row 0, 'pair_0000', infrared: (damaged|not a)"),
}


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES)
def test_a_bad_file_stops_a_training_before_it_writes(tmp_path, capsys, content, message):
    path, out = tmp_path / "a.parquet", tmp_path / "run"
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, path)
    argv = ["--config", "configs/demo/pretrain.yaml", "--data_path", path, "--output_dir", out]
    refused(partial(call_main, "pretrain", *argv, "--device", "cpu"), capsys, message)
    assert not out.exists()
