"""Mutated images, rows, texts, command lines and files of weights: a right result or one sentence.

pytest tests/faults/test_fuzzing.py    FUZZ=20000 asks for more cases, shared by the kinds

Any exception but ValueError and OSError fails, as do more than 5 s, and more than 2 GiB.
"""

import io
import json
import os
import random
import resource
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import prepare
from assembly import bundle, checkpoints
from configs.schema import TrainConfig
from data import boxes, decoding, folders, infrared_files, latents, manifest, pairs
from tests import test_ranges
from tests import tiny_data as tiny
from tests.conftest import ROOT
from utils import checkpoint, config, objects, run

KINDS = 10
CASES = int(os.environ.get("FUZZ", 150)) // KINDS
SENTENCES = (ValueError, OSError)
fuzzed = settings(
    max_examples=CASES,
    derandomize=True,
    deadline=5000,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzing")


def tried(work, *arguments):
    """The result, or None after a sentence."""
    try:
        return work(*arguments)
    except SENTENCES as error:
        assert str(error).strip()
        return None


# ---------------------------------------------------------------------------- mutations

EDGES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xd8",
)
place = st.floats(0, 1, exclude_max=True)
edit = st.tuples(
    st.sampled_from(["set", "set", "head", "insert", "delete", "cut", "splice"]),
    place,
    st.one_of(st.sampled_from(EDGES), st.binary(min_size=1, max_size=8)),
)
edits = st.lists(edit, min_size=1, max_size=4)


def mutated(data: bytes, changes, other: bytes = b"") -> bytes:
    for kind, at, piece in changes:
        i = int(at * (min(len(data), 200) if kind == "head" else len(data)))
        if kind in ("set", "head"):
            data = data[:i] + piece + data[i + len(piece) :]
        elif kind == "insert":
            data = data[:i] + piece + data[i:]
        elif kind == "delete":
            data = data[:i] + data[i + len(piece) :]
        elif kind == "cut":
            data = data[:i]
        else:
            data = data[:i] + other[i:]
    return data


# ---------------------------------------------------------------------------- images


@cache
def images() -> list[bytes]:
    """One of each kind that is read."""
    grey, wide, colour = tiny.infrared(1), tiny.infrared(1, dtype=np.uint16), tiny.visible(1)
    made = [tiny.png(grey), tiny.png(wide), tiny.png(colour), decoding.encode_npy(wide)]
    for array, form, options in (
        (colour, "JPEG", {}),
        (colour, "JPEG", {"progressive": True, "exif": b"Exif\0\0" + exif()}),
        (wide, "TIFF", {}),
        (grey, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (grey.astype(np.float32), "TIFF", {"tiffinfo": {42113: "-9999"}}),
        (grey, "GIF", {}),
        (colour, "BMP", {}),
        (colour, "WEBP", {}),
        (wide, "PPM", {}),
        (colour, "JPEG2000", {}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, form, **options)
        made.append(buffer.getvalue())
    for kind in ("plain", "PNG"):
        record = test_ranges.raw_record(test_ranges.SCENE, "<", kind)
        made.append(test_ranges.container({1: record, 0x20: test_ranges.camera_record("<")}))
    return made


def exif() -> bytes:
    """An orientation."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 274, 3, 1, 6, 0) + bytes(4)


any_image = st.builds(
    lambda one, other, changes: mutated(images()[one], changes, images()[other]),
    st.integers(0, 16),
    st.integers(0, 16),
    edits,
)


@fuzzed
@given(any_image)
def test_infrared_images(data):
    if (read := tried(infrared_files.read_infrared, data, "x")) is not None:
        assert read.values.ndim == 2 and read.values.size <= decoding.MAX_PIXELS
        decoding.nodata_of(data)
        again = decoding.decode_infrared(read.stored, "row")
        assert np.array_equal(again, read.values)


@fuzzed
@given(any_image)
def test_visible_and_class_images(data):
    if (image := tried(decoding.decode_visible, data, "x")) is not None:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    tried(decoding.decode_semantic, data, "x")
    tried(decoding.decode_semantic, data, "x", "msrs")
    tried(infrared_files.read_infrared, data, "x", "kelvin", "jet")
    tried(decoding.split_channels, data, "x")


# ---------------------------------------------------------------------------- rows


@cache
def parquet() -> bytes:
    buffer = io.BytesIO()
    columns = tiny.rows(4, split=lambda i: ("train", "train", "val", "test")[i])
    tiny.pq.write_table(tiny.pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


@fuzzed
@given(edits, st.booleans())
def test_rows_of_parquet(folder, changes, footer):
    path, data = folder / "rows" / "a.parquet", parquet()
    path.parent.mkdir(exist_ok=True)
    if footer:  # where its own metadata are
        start = len(data) - 2500
        data = data[:start] + mutated(data[start:], changes)
    else:
        data = mutated(data, changes)
    path.write_bytes(data)

    def read():
        found = pairs.open_pairs(pairs.DataConfig(path=str(path)), "train")
        for index in range(len(found)):
            tried(found.check, index)

    tried(read)


# ---------------------------------------------------------------------------- texts

leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, -1, "../../x", "/etc/passwd", "!!python/name:os.system", [], {}]),
)
plain_values = st.recursive(
    leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def replaced(value, chance: random.Random, new):
    """`value` with one thing inside it replaced by `new`."""
    if chance.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = chance.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    copy[key] = replaced(copy[key], chance, new)
    return copy


MANIFEST = {
    "version": 1,
    "window": {"low": 0, "high": 255, "unit": "counts"},
    "table": "msrs",
    "planck": {"R1": 17000.0, "B": 1430.0, "F": 1.0, "O": -6500, "R2": 0.01},
    "splits": {split: {"pairs": 1, "sha256": "0" * 64} for split in manifest.SPLITS},
    "shards": [{"file": "a.parquet", "bytes": 1, "rows": 4, "sha256": "0" * 64}],
}
randoms = st.builds(random.Random, st.integers(0, 2**32))


@fuzzed
@given(randoms, plain_values, edits, st.booleans())
def test_manifests(folder, chance, new, changes, whole):
    path = folder / "set" / "a.parquet"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(parquet())
    content = {**MANIFEST, "shards": [{**MANIFEST["shards"][0], "bytes": len(parquet())}]}
    text = json.dumps(replaced(content, chance, new) if whole else content).encode()
    path.with_name("manifest.json").write_bytes(text if whole else mutated(text, changes))
    tried(lambda: pairs.open_pairs(pairs.DataConfig(path=str(path.parent)), "train")[0])


@fuzzed
@given(st.sampled_from(sorted(ROOT.glob("configs/*.yaml"))), randoms, plain_values, edits)
def test_yaml(folder, example, chance, new, changes):
    (folder / "a.yaml").write_bytes(mutated(example.read_bytes(), changes))
    tried(config.load, TrainConfig, ["--config", str(folder / "a.yaml")])
    tried(config.from_dict, TrainConfig, replaced(config.to_dict(TrainConfig()), chance, new))


WORDS = ["--config", "--lr", "--help=", "training.epochs=", "data.window=", "model.lora_config.r="]
WORDS += ["--out", "--window", "--nodata", "--synthetic", "--size", "--splits", "--split_fractions"]
WORDS += ["--palette", "--sequences", "--suffixes", "--gap", "--time_blocks", "--scale", "--unit"]
word = st.one_of(st.sampled_from(WORDS), st.text(max_size=6), st.sampled_from(["0", "-1", "1e999"]))


@fuzzed
@given(st.lists(st.tuples(word, st.text(max_size=6)).map("".join) | word, max_size=5))
def test_command_lines(folder, words):
    tried(config.load, TrainConfig, [word for word in words if "help" not in word])
    argv = ["--visible", str(folder), "--infrared", str(folder), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", io.StringIO())
        patch.setattr("sys.stdout", io.StringIO())
        patch.setattr(prepare.inspection, "in_workers", lambda *args: [])
        patch.setattr(prepare, "prepare_synthetic", lambda args: {}["never"])
        patch.setattr(prepare.writing, "check_out", lambda *args: None)
        try:
            prepare.main([*argv, *(w for w in words if w[:5] not in ("--che", "--syn", "--out"))])
        except SystemExit as stop:
            assert stop.code in (0, 2)
        except SENTENCES:
            pass


@fuzzed
@given(edits, randoms, plain_values)
def test_splits_boxes_metrics_and_units(folder, changes, chance, new):
    items = [folders.Item("s", f"a_{i}", folder / f"{i}.png", folder / f"{i}.png") for i in (0, 1)]
    table = {"s": {"train": ["a_0"], "val": ["a_1"], "test": []}}
    for text in (
        mutated(json.dumps(table).encode(), changes),
        json.dumps(replaced(table, chance, new)).encode(),
    ):
        (folder / "s.json").write_bytes(text)
        tried(folders.read_splits, folder / "s.json", items, True)
        (folder / "boxes").mkdir(exist_ok=True)
        (folder / "boxes" / "a.txt").write_bytes(text + mutated(b"0 .5 .5 .1 .1\n", changes))
        boxes._wrong(folder / "boxes" / "a.txt")
        tried(lambda: objects.Boxes(folder / "boxes").of("", "a"))
        (folder / "metrics.jsonl").write_bytes(text + b'\n{"step": 1}\n')
        tried(run._drop_rows_after, folder / "metrics.jsonl", 3)
        facts = mutated(
            json.dumps({"unit": "kelvin", "scale": 0.1, "planck": {}}).encode(), changes
        )
        (folder / "a.json").write_bytes(facts)
        args = type("Args", (), {"unit": None, "scale": 1.0, "offset": 0.0})
        one = [folders.Item("s", "a", folder / "a.png", folder / "a.png")]
        tried(infrared_files.given_radiometry, args, one)


# ---------------------------------------------------------------------------- weights


@fuzzed
@given(st.sampled_from(bundle.FILES), edits, randoms, plain_values)
def test_exports(folder, name, changes, chance, new):
    out = folder / "export"
    bundle.save_bundle(out, {"w": torch.ones(3)}, config.to_dict(TrainConfig()), {})
    path = out / name
    if path.is_file():
        data = path.read_bytes()
        path.write_bytes(mutated(data, changes))
        tried(checkpoints.read, out)
        if path.suffix == ".json":
            path.write_text(json.dumps(replaced(json.loads(data), chance, new)))
            tried(checkpoints.read, out)


@fuzzed
@given(edits)
def test_latents(folder, changes):
    out = folder / "latents"
    out.mkdir(exist_ok=True)
    key = latents.key_of("a", "b")
    data = save({f"{key}/{name}": torch.zeros(2, 3, 64) for name in latents.NAMES})
    path = out / "latents-0.safetensors"
    path.write_bytes(mutated(data, changes))
    tried(lambda: latents.Latents(out, [key]).get(0, True))


@fuzzed
@given(edits, randoms, plain_values, st.booleans())
def test_checkpoints(folder, changes, chance, new, hashed):
    raw = config.to_dict(TrainConfig())
    parts = {"model": {"weight": torch.ones(3)}, "state": {"step": 3}, "config": raw}
    path = folder / "checkpoint_00000003.pth"
    if not hashed:
        torch.save(parts, path)
        path.write_bytes(mutated(path.read_bytes(), changes))
    else:
        spoilt = replaced(parts, chance, new)
        checkpoint.save(path, spoilt if isinstance(spoilt, dict) else {"model": spoilt})
    tried(checkpoints.read, path)
    checkpoint.latest(folder)
