"""Rows of parquet shards as a source of pairs: one split, decoded, in the unit of its window."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from data.decoding import decode_infrared, decode_semantic, decode_visible, size_of
from data.manifest import SPLITS, sha256
from data.radiometry import make_planck
from data.row_index import ALIASES, Rows
from data.shard_files import find_files, load_manifests
from data.shards import SLOW_GROUP_BYTES, RowReader
from data.stored_sizes import stored_sizes
from data.transforms import Pair, Window, make_pair, make_window

if TYPE_CHECKING:
    from data.pairs import DataConfig

PREPARE = "prepare.py makes such a data set from folders"


class ParquetSource:
    """Decoded rows of one split of parquet files. Column names: see row_index.ALIASES."""

    def __init__(self, cfg: "DataConfig", split: str):
        found = find_files(cfg.path)
        self.manifests = load_manifests(found)
        self.rows = Rows(found, cfg.split_fractions)
        self.rows.check_disjoint()
        pa.default_memory_pool().release_unused()  # of large sets' columns, joined and compared
        wanted = np.isin(self.rows.splits, SPLITS if split == "all" else [split])
        self.index = np.flatnonzero(wanted)
        if not len(self.index):
            counts = {s: int((self.rows.splits == s).sum()) for s in SPLITS}
            raise ValueError(
                f"data.path {cfg.path}: no pair in split '{split}' (rows: {counts}, by "
                f"{self.rows.split_rule}); {PREPARE}"
            )
        self.reader = RowReader(self.rows)
        small = self.rows.small
        self.names, self.sources = (small[key].take(self.index) for key in ("name", "source"))
        self.palette = cfg.palette
        self.table = _agreed(self.manifests, lambda m: m.get("table"), "table of classes")
        self.has_semantic = any("semantic" in columns for columns in self.rows.columns)
        self.notes = [f"splits by {self.rows.split_rule}"]
        self.groups = self.reader.groups_of(self.index)
        if split == "train":
            self.notes += self._order_notes(cfg.shuffle_window)
        if self.reader.largest_group() > SLOW_GROUP_BYTES:
            size = self.reader.largest_group() / 2**20
            self.notes.append(
                f"row groups of up to {size:.0f} MiB make random rows slow; write smaller ones, or "
                f"set data.shuffle_window"
            )
        if small["sha256"].values.null_count:
            self.notes.append(
                "no hashes (prepare.py writes them): images that are in two splits go unnoticed"
            )
        facts = [self.rows.facts()] if cfg.window == "auto" and not self.manifests else []
        self.stored = [*self.manifests, *facts]
        stored = _agreed(self.stored, lambda m: m.get("planck"), "Planck constants")
        self.planck = make_planck(stored, f"data.path {cfg.path}") if stored else None
        self.only_8_bit = False  # whether the window is a guess that suits no other type
        self.window = self._find_window(cfg)

    def _order_notes(self, window: int) -> list[str]:
        """A note on the order of the rows and its cost; makes the reader keep a window."""
        if window:
            kept = self.reader.keep(window, self.groups) / 2**20
            return [
                f"shuffled in windows of {window:,} rows from row groups at random "
                f"(data.shuffle_window); a worker keeps about {kept:.1f} MiB of row groups"
            ]
        notes = ["shuffled over the whole set (data.shuffle_window=0)"]
        if self.rows.storage.remote:
            most = self.reader.largest_group() / 2**20
            notes.append(
                f"every row drawn fetches its row group, up to {most:.1f} MiB, from the remote "
                f"store; data.shuffle_window=4096 fetches most groups once a worker"
            )
        return notes

    def _find_window(self, cfg: "DataConfig") -> Window | None:
        unit = self.rows.unit()
        if isinstance(cfg.window, list | tuple) and len(cfg.window) == 2:
            low, high = cfg.window
            return make_window(low, high, unit)
        if cfg.window == "per_image":
            return None
        if cfg.window != "auto":
            raise ValueError(
                f"data.window must be [low, high], auto or per_image, got {cfg.window}"
            )
        folders = {str(Path(file).parent) for file in self.rows.files}
        if 0 < len(self.manifests) < len(folders):
            raise ValueError(
                f"data.path {cfg.path}: {len(self.manifests)} of {len(folders)} folders have a"
                " manifest, so what the others' counts mean is unknown; set data.window"
            )
        stored = _agreed(self.stored, lambda m: m.get("window"), "window")
        if stored is not None:
            if stored["unit"] != unit:
                raise ValueError(
                    f"data.path {cfg.path}: the window is in {stored['unit']}, the rows in {unit}"
                )
            return make_window(stored["low"], stored["high"], unit)
        first = self.pair(0).infrared
        if first.dtype != np.uint8:
            raise ValueError(
                f"{self.where(0)}: {first.dtype} infrared without a manifest; set "
                f"data.window=[low,high] in {unit} (this row spans {first.min()} to {first.max()})"
            )
        self.only_8_bit = True
        return Window(0.0, 255.0, unit)

    def where(self, index: int) -> str:
        return self.rows.where(self.index[index])

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every pair, from columns that prepare.py writes, or each header."""
        known = stored_sizes(self.rows)
        return [known.get(row) or self._header(row) for row in self.index.tolist()]

    def _header(self, row: int) -> tuple[int, int]:
        where, data = self.rows.where(row), self.reader.read(row)
        if data["visible"] is None:
            raise ValueError(f"{where}: no visible bytes in this row")
        return size_of(data["visible"], f"{where}, visible")

    def check(self, index: int) -> None:
        """Raises: ValueError: the bytes do not have the hash in the row's column `sha256`."""
        row = self.index[index]
        data = self.reader.read(row)
        found = sha256(b"".join(data.get(key) or b"" for key in ALIASES))
        if self.rows.small["sha256"][row] not in (None, found):
            raise ValueError(f"{self.where(index)}: the images are not those that were written")

    def content(self, index: int) -> str:
        """Hash of what decides a pair's pixels: the bytes of both images, scale and offset."""
        row, small = self.index[index], self.rows.small
        data = self.reader.read(row)
        facts = [sha256(data[key]) for key in ("visible", "infrared")]
        return sha256(f"{facts} {small['ir_scale'][row]} {small['ir_offset'][row]}".encode())

    def pair(self, index: int) -> Pair:
        """The decoded pair at its own size, infrared in the unit of the rows."""
        row, where = self.index[index], self.where(index)
        data = self.reader.read(row)
        for key in ("visible", "infrared"):
            if data[key] is None:
                raise ValueError(f"{where}: no {key} bytes in this row")
        infrared = decode_infrared(data["infrared"], f"{where}, infrared")
        if self.only_8_bit and infrared.dtype != np.uint8:
            raise ValueError(
                f"{where}: {infrared.dtype} infrared, but the first row has 8 bit and there is no "
                f"manifest; set data.window=[low,high]"
            )
        scale = self.rows.small["ir_scale"][row]
        offset = self.rows.small["ir_offset"][row]
        if scale not in (None, 1.0) or offset not in (None, 0.0):
            scale, offset = 1.0 if scale is None else scale, 0.0 if offset is None else offset
            infrared = (infrared * np.float64(scale) + offset).astype(np.float32)
        semantic = None
        if data.get("semantic") is not None:
            semantic = decode_semantic(data["semantic"], f"{where}, semantic", self.palette or None)
        return make_pair(
            decode_visible(data["visible"], f"{where}, visible"), infrared, semantic, where
        )


def _agreed(manifests: list[dict], pick, what: str):
    """The value all manifests share, None without manifests. Raises: ValueError: they differ."""
    values = [pick(manifest) for manifest in manifests]
    if any(value != values[0] for value in values):
        raise ValueError(f"the data sets differ in their {what} ({values}); prepare them as one")
    return values[0] if values else None
