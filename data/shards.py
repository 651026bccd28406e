"""Parquet files of encoded pairs: find them, know their rows and splits, read one row fast."""

import fnmatch
import json
import math
import os
import posixpath
import re
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from data import manifest as mf
from data import parquet_limits

# Accepted column names, ours first.
ALIASES = {
    "visible": ("visible", "src_img", "rgb"),
    "infrared": ("infrared", "edited_img", "ir"),
    "semantic": ("semantic", "panoptic_img"),
}
SMALL = ("name", "source", "split", "sha256", "ir_unit", "ir_scale", "ir_offset")
OPEN_FILES = 128  # handles a process keeps
GROUP_BYTES = 64 * 2**20  # decoded row groups a process keeps; at least one
MOST_MANIFEST_BYTES = 16 * 2**20
SLOW_GROUP_BYTES = 128 * 2**20  # random rows from larger groups are worth a warning


# ---------------------------------------------------------------------------- finding files


class Files(NamedTuple):
    """Sorted parquet files below a base folder; `whole` if the folder itself was asked for."""

    fs: pafs.FileSystem
    paths: list[str]
    base: str
    whole: bool


def find_files(path: str) -> Files:
    """The parquet files of a file, folder, glob or URI.

    Raises: ValueError: nothing there, or no parquet file in it.
    """
    wildcard = None if os.path.exists(path) else re.search(r"[*?\[]", path)
    fixed = path[: path.rfind("/", 0, wildcard.start()) + 1] if wildcard else path
    try:
        if "://" in path:
            fs, base = pafs.FileSystem.from_uri(fixed)
        else:
            fs, base = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(fixed or "."))
        info = fs.get_file_info(base)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data.path {path}: cannot be opened ({error})") from None
    if info.type == pafs.FileType.NotFound:
        raise ValueError(
            f"data.path {path}: no such file or folder; make one with prepare.py, or use "
            f"data.path=synthetic"
        )
    if info.type == pafs.FileType.File:
        return Files(fs, [base], posixpath.dirname(base), False)
    found = fs.get_file_info(pafs.FileSelector(base, recursive=True))
    files = sorted(f.path for f in found if f.type == pafs.FileType.File)
    inside = {f: posixpath.relpath(f, base) for f in files}
    if wildcard:
        rest = path[len(fixed) :]
        files = [f for f in files if _matches(inside[f], rest)]
    files = [f for f in files if f.endswith(".parquet") and not _hidden(inside[f])]
    if not files:
        raise ValueError(f"data.path {path}: no .parquet file there")
    return Files(fs, files, base, wildcard is None)


def _matches(name: str, pattern: str) -> bool:
    """fnmatch where * stays inside one folder and ** does not."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def load_manifests(found: Files) -> list[dict]:
    """The manifests beside these files; shard sizes are checked against them.

    Raises: ValueError: a shard is missing, unknown or not as long as it was written.
    """
    fs, files, manifests = found.fs, found.paths, []
    for folder in sorted({posixpath.dirname(f) for f in files}):
        path = f"{folder}/manifest.json"
        if fs.get_file_info(path).type != pafs.FileType.File:
            continue
        with fs.open_input_stream(path) as stream:
            text = stream.read(MOST_MANIFEST_BYTES + 1)
        if len(text) > MOST_MANIFEST_BYTES:
            raise ValueError(f"{path}: more than {MOST_MANIFEST_BYTES:,} bytes, no manifest")
        manifest = mf.parse(text.decode(errors="replace"), path)
        shards = {shard["file"]: shard for shard in manifest["shards"]}
        here = [f for f in files if posixpath.dirname(f) == folder]
        for info in fs.get_file_info(here):
            shard = shards.pop(info.base_name, None)
            if shard is None:
                raise ValueError(f"{info.path}: not listed in {path}; keep other files elsewhere")
            if info.size != shard["bytes"]:
                raise ValueError(
                    f"{info.path}: {info.size:,} bytes, but {path} says {shard['bytes']:,}: "
                    f"the file is truncated or was changed"
                )
        if found.whole and shards:
            raise ValueError(f"{folder}: {min(shards)} is listed in {path} but missing")
        manifests.append(manifest)
    return manifests


# ---------------------------------------------------------------------------- rows


class Columns(dict):
    """Name of the column in the file for `visible`, `infrared`, `semantic` and the small ones."""

    def __init__(self, schema: pa.Schema, where: str):
        super().__init__()
        for key, aliases in ALIASES.items():
            for alias in aliases:
                if alias in schema.names:
                    self[key] = alias
                    self._check_bytes(schema.field(alias), where)
                    break
            else:
                if key != "semantic":
                    raise ValueError(
                        f"{where}: no column '{key}' (also accepted: {', '.join(aliases[1:])}); "
                        f"the columns are {', '.join(schema.names)}"
                    )
        self.update({key: key for key in SMALL if key in schema.names})
        for key in SMALL:
            if key in schema.names:
                self._check_small(schema.field(key), where)

    @staticmethod
    def _check_small(column: pa.Field, where: str) -> None:
        kind, numbers = column.type, column.name in ("ir_scale", "ir_offset")
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
        named = column.name in ("name", "source") and number  # becomes text
        if not (pa.types.is_null(kind) or (number if numbers else text or named)):
            expected = "numbers" if numbers else "text"
            raise ValueError(
                f"{where}: column '{column.name}' holds {column.type}, expected {expected}"
            )

    @staticmethod
    def _check_bytes(column: pa.Field, where: str) -> None:
        kind = column.type
        if pa.types.is_struct(kind):
            names = [kind.field(i).name for i in range(kind.num_fields)]
            kind = kind.field(names.index("bytes")).type if "bytes" in names else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(
                f"{where}: column '{column.name}' holds {column.type}, expected encoded image "
                f"bytes or a struct with a field 'bytes'"
            )


class Rows:
    """What is known of every row without its images: a column of numpy objects per small key."""

    def __init__(self, found: Files, fractions: list[float]):
        self.fs, self.files = found.fs, found.paths
        self.columns: list[Columns] = []
        self.metadata: list[pq.FileMetaData] = []
        small: dict[str, list] = {key: [] for key in SMALL}
        file_ids, row_ids = [], []
        for file_id, path in enumerate(self.files):
            columns, metadata, table = self._read_small(path)
            self.columns.append(columns)
            self.metadata.append(metadata)
            rows = metadata.num_rows
            file_ids.append(np.full(rows, file_id, dtype=np.int32))
            row_ids.append(np.arange(rows, dtype=np.int32))
            for key in SMALL:
                small[key] += table[key].to_pylist() if key in columns else [None] * rows
        self.file_ids, self.row_ids = np.concatenate(file_ids), np.concatenate(row_ids)
        self.small = small
        self._name_rows(found.base)
        self._check_numbers()
        self.splits, self.split_rule = self._find_splits(found.base, fractions)

    def _read_small(self, path: str):
        try:
            with pq.ParquetFile(self.fs.open_input_file(path)) as file:
                columns = Columns(file.schema_arrow, path)
                keys = [key for key in SMALL if key in columns]
                parquet_limits.check(file.metadata, path, self.fs.get_file_info(path).size)
                texts = parquet_limits.texts_as_dictionaries(file.metadata, keys)
                if not texts:
                    return columns, file.metadata, file.read(columns=keys, use_threads=False)
            with pq.ParquetFile(self.fs.open_input_file(path), read_dictionary=texts) as file:
                table = file.read(columns=keys, use_threads=False)
                return columns, file.metadata, parquet_limits.decoded(table, path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from None

    def _name_rows(self, base: str) -> None:
        names, sources = self.small["name"], self.small["source"]
        for i, (file_id, row) in enumerate(zip(self.file_ids, self.row_ids)):
            if names[i] is None:
                stem = posixpath.relpath(self.files[file_id], base).removesuffix(".parquet")
                names[i] = f"{stem}_{row:06d}"
            names[i] = str(names[i])
            sources[i] = "" if sources[i] is None else str(sources[i])

    def _check_numbers(self) -> None:
        for key in ("ir_scale", "ir_offset"):
            for i, x in enumerate(self.small[key]):
                if x is not None and (not math.isfinite(x) or (key == "ir_scale" and x == 0)):
                    raise ValueError(f"{self.where(i)}: {key} is {x}")

    def where(self, i: int) -> str:
        return f"{self.files[self.file_ids[i]]}, row {self.row_ids[i]}, '{self.small['name'][i]}'"

    def _find_splits(self, base: str, fractions: list[float]) -> tuple[np.ndarray, str]:
        """Of every row train, val or test: by column, else file name, else contiguous blocks."""
        with_column = ["split" in columns for columns in self.columns]
        if all(with_column):
            words = self.small["split"]
            for i, word in enumerate(words):
                if word not in mf.SPLIT_ALIASES:
                    raise ValueError(
                        f"{self.where(i)}: split is {word!r}, expected train, val or test"
                    )
            return np.array([mf.SPLIT_ALIASES[w] for w in words], dtype="U5"), "column 'split'"
        if any(with_column):
            raise ValueError(
                f"{self.files[with_column.index(False)]}: no column 'split', other files have one"
            )
        by_file = [_split_of_file(posixpath.relpath(f, base)) for f in self.files]
        if len(fractions) != len(mf.SPLITS) or min(fractions) < 0 or sum(fractions) <= 0:
            raise ValueError(f"data.split_fractions needs three shares, got {list(fractions)}")
        if not all(by_file):
            splits = mf.in_blocks(len(self.file_ids), fractions, list(mf.SPLITS))
            return splits, f"contiguous blocks by data.split_fractions {list(fractions)}"
        splits = np.array(by_file, dtype="U5")[self.file_ids]
        # A set published with train alone, or train and test: the rest is cut from train.
        share = dict(zip(mf.SPLITS, fractions))
        missing = [s for s in mf.SPLITS if share[s] > 0 and s not in by_file]
        if not missing or "train" not in by_file or share["train"] <= 0:
            return splits, "file names"
        wanted = [s for s in mf.SPLITS if s == "train" or s in missing]
        train = np.flatnonzero(splits == "train")
        splits[train] = mf.in_blocks(len(train), [share[s] for s in wanted], wanted)
        text = f"file names; {' and '.join(missing)} cut from train"
        return splits, f"{text} by data.split_fractions {list(fractions)}"

    def check_disjoint(self) -> None:
        """Raises: ValueError: one (source, name), or one content hash, in two splits."""
        seen: dict = {}
        named = all("name" in columns for columns in self.columns)
        for i, split in enumerate(self.splits.tolist()):
            keys = [(self.small["source"][i], self.small["name"][i])] if named else []
            if self.small["sha256"][i]:
                keys.append(self.small["sha256"][i])
            for key in keys:
                other = seen.setdefault(key, i)
                if self.splits[other] != split:
                    what = "name" if isinstance(key, tuple) else "content"
                    raise ValueError(
                        f"the same {what} is in {self.splits[other]} ({self.where(other)}) and in "
                        f"{split} ({self.where(i)}); splits must be disjoint"
                    )

    def facts(self) -> dict:
        """Window and Planck constants that prepare.py wrote into every file, {} without them.

        Raises: ValueError: files differ, or their window is none.
        """
        found = [(file.metadata or {}).get(mf.KEY.encode(), b"{}") for file in self.metadata]
        for path, text in zip(self.files, found):
            if text != found[0]:
                raise ValueError(f"{path}: another window than {self.files[0]}; set data.window")
        try:
            facts = json.loads(found[0])
        except (ValueError, RecursionError):
            facts = {}
        if not isinstance(facts, dict) or "window" not in facts:
            return {}
        if wrong := mf.wrong_window(facts["window"]):
            raise ValueError(f"{self.files[0]}: {wrong}; set data.window")
        return facts

    def unit(self) -> str:
        """The one unit of the infrared values. Raises: ValueError: rows differ."""
        units = sorted({u or "counts" for u in self.small["ir_unit"]})
        if len(units) > 1:
            raise ValueError(f"rows are in different units ({', '.join(units)}); use one data set")
        return units[0]


def _split_of_file(name: str) -> str | None:
    words = [w for w in re.split(r"[^a-z]+", name.lower()) if w in mf.SPLIT_ALIASES]
    return mf.SPLIT_ALIASES[words[0]] if len({mf.SPLIT_ALIASES[w] for w in words}) == 1 else None


# ---------------------------------------------------------------------------- reading


class RowReader:
    """Encoded bytes of single rows. Handles belong to a process: a forked worker opens its own."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.starts = [
            np.cumsum([0, *(m.row_group(g).num_rows for g in range(m.num_row_groups))])
            for m in rows.metadata
        ]
        self._reset()

    def _reset(self) -> None:
        self.pid = os.getpid()
        self.handles: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self.groups: OrderedDict[tuple[int, int], tuple[dict, int]] = OrderedDict()
        self.bytes = 0

    def __getstate__(self):
        return {"rows": self.rows, "starts": self.starts, "pid": -1}

    def largest_group(self) -> int:
        """Bytes of the largest row group."""
        sizes = [
            m.row_group(g).total_byte_size
            for m in self.rows.metadata
            for g in range(m.num_row_groups)
        ]
        return max(sizes, default=0)

    def read(self, i: int) -> dict[str, Any]:
        """Image bytes or None, of row i by column. Raises: ValueError naming file and row."""
        if self.pid != os.getpid():
            self._reset()
        file_id, row = int(self.rows.file_ids[i]), int(self.rows.row_ids[i])
        group = int(np.searchsorted(self.starts[file_id], row, side="right")) - 1
        try:
            columns = self._group(file_id, group)
            inside = row - int(self.starts[file_id][group])
            return {key: _bytes(column, inside) for key, column in columns.items()}
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.rows.where(i)}: cannot be read ({error})") from None

    def _group(self, file_id: int, group: int) -> dict[str, pa.ChunkedArray]:
        key = (file_id, group)
        if key in self.groups:
            self.groups.move_to_end(key)
            return self.groups[key][0]
        names = {k: n for k, n in self.rows.columns[file_id].items() if k in ALIASES}
        table = self._handle(file_id).read_row_group(
            group, columns=list(names.values()), use_threads=False
        )
        columns = {}
        for our, name in names.items():
            column = table[name]
            if pa.types.is_struct(column.type):
                column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
            columns[our] = column
        self.groups[key] = (columns, table.nbytes)
        self.bytes += table.nbytes
        while self.bytes > GROUP_BYTES and len(self.groups) > 1:
            self.bytes -= self.groups.popitem(last=False)[1][1]
        return columns

    def _handle(self, file_id: int) -> pq.ParquetFile:
        if file_id in self.handles:
            self.handles.move_to_end(file_id)
            return self.handles[file_id]
        path = self.rows.files[file_id]
        stream = self.rows.fs.open_input_file(path)  # a memory map of a cut file is a SIGBUS
        metadata = self.rows.metadata[file_id]
        images = [name for key, name in self.rows.columns[file_id].items() if key in ALIASES]
        large = parquet_limits.images_as_dictionaries(metadata, images)
        handle = pq.ParquetFile(stream, metadata=metadata, read_dictionary=large)
        self.handles[file_id] = handle
        if len(self.handles) > OPEN_FILES:
            self.handles.popitem(last=False)[1].close()
        return handle


def _bytes(column: pa.ChunkedArray, row: int) -> bytes | None:
    value = column[row]
    if value.is_valid and pa.types.is_dictionary(value.type):
        value = value.value
    return value.as_buffer().to_pybytes() if value.is_valid else None
