"""Rows to parquet shards with a manifest: streamed, hashed, renamed into place when complete."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data import doctor, splits
from data import manifest as mf
from data.decoding import encode_npy, encode_png
from data.folders import Item, thumbnail
from data.inspection import Inspection, Options, decode_item, read_files
from data.manifest import SPLITS, digest, dump, sha256
from data.materials import (
    CLASS_NAMES,
    NUM_MATERIALS,
    ClassBalance,
    material_table,
)
from data.pairs import DataConfig, open_pairs
from data.parquet_source import ParquetSource
from data.pseudo_labels import LabelConfig
from data.synthetic import render_scene
from utils.files import clear_remains, whole_folder
from utils.labels import IGNORE

SHARD_BYTES, SHARD_ROWS = 512 * 2**20, 2000
# A random row costs the reading of its group: few rows and few bytes, whichever comes first.
GROUP_BYTES, GROUP_ROWS = 2 * 2**20, 64
IMAGES = ("visible", "infrared", "semantic")
SCHEMA = pa.schema(
    [
        *((key, pa.binary()) for key in IMAGES),
        *((key, pa.string()) for key in ("name", "source", "split", "sha256", "ir_unit")),
        ("ir_scale", pa.float64()),
        ("ir_offset", pa.float64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)

REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/")  # what pathlib leaves of s3://
SYNTHETIC_COUNTS = 65535  # 16-bit counts of normalised radiance 1.0


def folder_row(task: tuple[Item, Inspection, str, Options, dict]) -> dict:
    """One row from files: bytes as they are, except what was resized, converted or class ids.

    Raises: ValueError: a file is not what was inspected.
    """
    item, found, split, options, radiometry = task
    visible, infrared = read_files(item)
    if (sha256(visible), sha256(infrared)) != (found.visible_hash, found.infrared_hash):
        raise ValueError(f"{item.where()}: a file changed while the data set was prepared")
    semantic = classes = None
    move = found.move
    if found.resized or found.converted or item.semantic is not None or move:
        pair = decode_item(item, options)
        infrared = pair.stored_infrared
        if move:
            heat = move.cropped(pair.infrared)
            whole = heat.dtype in (np.uint8, np.uint16)
            infrared = (encode_png if whole else encode_npy)(np.ascontiguousarray(heat))
        if found.resized or move:
            visible = encode_png(move.moved(pair.visible) if move else pair.visible)
        if pair.semantic is not None:  # drawn on the visible image
            ids = move.moved(pair.semantic, classes=True) if move else pair.semantic
            semantic, classes = encode_png(ids), _count(ids)
    return _hashed(
        {
            "visible": visible,
            "infrared": infrared,
            "semantic": semantic,
            "name": item.name,
            "source": item.source,
            "split": split,
            **radiometry,
            "height": found.size[0],
            "width": found.size[1],
            "classes": classes,
        }
    )


def synthetic_row(task: tuple[int, int, tuple[int, int], str, str]) -> dict:
    """One rendered scene: PNG visible, 16-bit PNG infrared, PNG class ids."""
    seed, index, size, split, name = task
    scene = render_scene(seed, index, size)
    counts = np.rint(scene.infrared.astype(np.float64) * SYNTHETIC_COUNTS).astype(np.uint16)
    return _hashed(
        {
            "visible": encode_png(np.rint(scene.visible * 255.0).astype(np.uint8)),
            "infrared": encode_png(counts),
            "semantic": encode_png(scene.semantic),
            "name": name,
            "source": "synthetic",
            "split": split,
            "ir_unit": "counts",
            "ir_scale": None,
            "ir_offset": None,
            "height": counts.shape[0],
            "width": counts.shape[1],
            "classes": _count(scene.semantic),
        }
    )


def _count(semantic: np.ndarray) -> np.ndarray:
    """(256,) pixels of each class id."""
    return np.bincount(semantic.ravel(), minlength=256)


def _hashed(row: dict) -> dict:
    return {**row, "sha256": sha256(b"".join(row[key] or b"" for key in IMAGES))}


class Balance:
    """How often classes and materials occur in one split, from the pixel counts of each image."""

    def __init__(self):
        self.classes = np.zeros(256, np.int64)
        self.material_images = np.zeros(256, np.int64)
        self.images = 0

    def add(self, classes: np.ndarray, lookup: np.ndarray) -> None:
        self.classes += classes
        self.material_images += np.bincount(lookup[classes > 0], minlength=256) > 0
        self.images += 1

    def to_dict(self, table: str, lookup: np.ndarray) -> dict:
        """Shares of the labelled pixels by class, and of pixels and images by material."""
        names = CLASS_NAMES[table]
        pixels = np.zeros(256, np.int64)
        np.add.at(pixels, lookup, self.classes)
        materials = ClassBalance(
            pixels[:NUM_MATERIALS],
            self.material_images[:NUM_MATERIALS],
            int(pixels[IGNORE]),
            self.images,
        )
        counts = self.classes[: len(names)]
        order = np.argsort(-counts, kind="stable")
        total = max(1, int(counts.sum()))
        return {
            "images": self.images,
            "classes": {names[i]: float(counts[i] / total) for i in order if counts[i]},
            "materials": materials.to_dict(),
        }


class ShardWriter:
    """Shards split-00000.parquet, ... of one split: a group of rows in memory, never more."""

    def __init__(self, folder: Path, split: str, facts: dict):
        self.folder, self.split = folder, split
        # the window goes with the rows, should they be moved without their manifest
        self.schema = SCHEMA.with_metadata({mf.KEY: json.dumps(facts)})
        self.shards: list[dict] = []
        self.hashes: list[tuple[str, str, str]] = []
        self.writer: Any = None  # a ParquetWriter, while a shard is open
        self.rows: list[dict] = []
        self.group_bytes = self.shard_bytes = self.shard_rows = 0

    def add(self, row: dict) -> None:
        self.rows.append(row)
        size = sum(len(row[key] or b"") for key in IMAGES)
        self.group_bytes += size
        self.shard_bytes += size
        self.shard_rows += 1
        self.hashes.append((row["source"], row["name"], row["sha256"]))
        if self.group_bytes >= GROUP_BYTES or len(self.rows) >= GROUP_ROWS:
            self._write_group()
        if self.shard_bytes >= SHARD_BYTES or self.shard_rows >= SHARD_ROWS:
            self.close()

    def _write_group(self) -> None:
        if not self.rows:
            return
        if self.writer is None:
            self.path = self.folder / f"{self.split}-{len(self.shards):05d}.parquet"
            # Images are compressed already; dictionaries and statistics of them are waste.
            self.writer = pq.ParquetWriter(
                self.path,
                self.schema,
                compression="none",
                use_dictionary=False,
                write_statistics=["name", "source", "split"],
            )
        self.writer.write_table(pa.Table.from_pylist(self.rows, schema=SCHEMA))
        self.rows, self.group_bytes = [], 0

    def close(self) -> None:
        """Finish the current shard and note its length and hash."""
        self._write_group()
        if self.writer is None:
            return
        self.writer.close()
        hasher = hashlib.sha256()
        with open(self.path, "rb") as file:
            while part := file.read(2**24):
                hasher.update(part)
            os.fsync(file.fileno())
        self.shards.append(
            {
                "file": self.path.name,
                "split": self.split,
                "rows": self.shard_rows,
                "bytes": self.path.stat().st_size,
                "sha256": hasher.hexdigest(),
            }
        )
        self.writer, self.shard_bytes, self.shard_rows = None, 0, 0


def check_out(out: Path, overwrite: bool) -> None:
    """Raises: ValueError: `out` exists and may not be replaced, or cannot be made."""
    if REMOTE.match(str(out)):
        raise ValueError(
            f"--out {out}: shards are written to a local folder; copy it to the store when it is "
            f"complete (aws s3 cp --recursive, gcloud storage cp -r)"
        )
    clear_remains(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; choose another --out or add --overwrite")
    if out.exists() and not (out / "manifest.json").is_file():
        raise ValueError(f"{out} exists and is no prepared data set; it is not overwritten")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{out} cannot be made: {above} is no folder that can be written to")


def write(
    out: Path,
    rows: Iterable[dict],
    manifest: dict,
    overwrite: bool = False,
    boxes: dict[str, str] | None = None,
) -> dict:
    """Write shards and manifest.json to `out` at once; the complete manifest.

    rows: dicts of SCHEMA's columns and `classes`, the row's pixels of each class id or None.
    manifest: what only the caller knows (window, table, ...).
    boxes: texts by name of the files to write to the folder `boxes`.
    """
    table = manifest["table"]
    lookup = material_table(table).numpy() if table else None
    check_out(out, overwrite)
    try:
        with whole_folder(out) as folder:
            for name, text in (boxes or {}).items():
                path = folder / "boxes" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            return _write_into(folder, rows, manifest, table, lookup)
    except OSError as error:
        raise OSError(f"{out} was not written: {error}") from error


def _write_into(
    folder: Path, rows: Iterable[dict], manifest: dict, table: str, lookup: np.ndarray | None
) -> dict:
    facts = {key: manifest[key] for key in ("window", "planck") if manifest.get(key)}
    writers = {split: ShardWriter(folder, split, facts) for split in SPLITS}
    balances = {split: Balance() for split in SPLITS}
    for row in rows:
        classes = row.pop("classes")
        if lookup is not None and classes is not None:
            balances[row["split"]].add(classes, lookup)
        writers[row["split"]].add(row)
    for split, writer in writers.items():
        writer.close()
        if not writer.hashes:
            raise ValueError(f"split '{split}' would be empty; each needs at least one pair")
    manifest = {
        **manifest,
        "balance": {
            s: b.to_dict(table, lookup)
            for s, b in balances.items()
            if b.images and lookup is not None
        },
        "columns": SCHEMA.names,
        "splits": {
            split: {
                "pairs": len(writer.hashes),
                "sha256": digest(writer.hashes),
                "names": [f"{source}/{name}" for source, name, _ in writer.hashes],
            }
            for split, writer in writers.items()
        },
        "shards": [shard for writer in writers.values() for shard in writer.shards],
    }
    path = folder / "manifest.json"
    path.write_text(dump(manifest))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return manifest


def check(path: str, report: Path | None = None) -> None:
    """Decode every pair of a prepared data set and say what may be wrong; a page if asked.

    Raises: ValueError: names the first pair that is bad; the page cannot be written.
    """
    labels = LabelConfig(material_source="none")  # class ids are held to the set's own table
    pairs = open_pairs(DataConfig(path=path, cache="none", labels=labels), "all")
    if report and not report.absolute().parent.is_dir():
        raise ValueError(f"--report {report}: no folder {report.absolute().parent}")
    names, sources = list(pairs.names), list(pairs.sources)
    found, thumbnails = [], []
    for index in tqdm(range(len(pairs)), "check", unit="pair"):
        pairs.check(index)
        pair = pairs.pair(index)
        seen = pair.infrared
        if pairs.window:  # borders without values would make all images look alike
            seen = np.clip(seen, pairs.window.low, pairs.window.high)
        found.append(doctor.examine(names[index], sources[index], pair.visible, seen))
        thumbnails.append((thumbnail(pair.visible), thumbnail(seen)))
    visible, infrared = (np.stack(side) for side in zip(*thumbnails))
    inverted = doctor.inversions(sources, infrared)
    lines = [
        *doctor.summary(found),
        *doctor.polarity_notes(names, sources, infrared, inverted),
    ]
    if isinstance(pairs.source, ParquetSource):
        there = pairs.source.rows.splits[pairs.source.index].tolist()
        lines += splits.torn_notes(names, visible, infrared, there)[1]
    print(f"{path}: {len(pairs)} pairs are as they were written")
    for line in lines:
        print(f"note: {line}")
    if report:
        chosen = [(i, why, pairs.pair(i)) for i, why in doctor.worst(found, inverted)]
        shown = [(names[i], why, p.visible, p.infrared) for i, why, p in chosen]
        page = doctor.report(f"Pairs of {path}", lines, shown)
        report.write_text(page, encoding="utf-8")
        print(f"report   {report}")
