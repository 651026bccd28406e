"""Everything about the rows of the shards except their images, in memory shared by forks."""

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data import manifest as mf
from data import parquet_limits
from data.shard_files import Files

# Accepted column names, ours first.
ALIASES = {
    "visible": ("visible", "src_img", "rgb"),
    "infrared": ("infrared", "edited_img", "ir"),
    "semantic": ("semantic", "panoptic_img"),
}
NUMBERS = ("ir_scale", "ir_offset")
SMALL = ("name", "source", "split", "sha256", "ir_unit", *NUMBERS)
REPEATED = ("source", "split", "ir_unit")  # few values for many rows
READERS = 16  # files whose small columns are read at a time: a remote store answers slowly


class Column(Sequence):
    """One value per row, in Arrow's memory: workers reading a list would copy all its objects."""

    def __init__(self, values: pa.Array):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i].to_pylist() if isinstance(i, slice) else self.values[int(i)].as_py()

    def __iter__(self) -> Iterator:
        for start in range(0, len(self), 2**16):
            yield from self.values[start : start + 2**16].to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, indices: np.ndarray) -> "Column":
        return Column(self.values.take(pa.array(indices)))

    def codes(self) -> tuple[np.ndarray, pa.Array]:
        """For every row the number of its value among the different ones, which are returned too;
        -1 for None."""
        values = self.values
        if not pa.types.is_dictionary(values.type):
            values = values.dictionary_encode()
        codes = values.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return codes, values.dictionary


class FileColumns(dict):
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
        kind, numbers = column.type, column.name in NUMBERS
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


class Shard(NamedTuple):
    """One file: its columns, what its footer says, and its small columns."""

    columns: FileColumns
    metadata: pq.FileMetaData
    starts: np.ndarray  # (groups + 1,) first row of every row group, and the end
    group_bytes: np.ndarray  # (groups,) uncompressed
    small: pa.Table


class Rows:
    """All rows of the files found, in the order of files and rows: `small` has a Column a key."""

    def __init__(self, found: Files, fractions: list[float]):
        self.storage, self.files, self.sizes = found.storage, found.paths, found.sizes
        with ThreadPoolExecutor(min(READERS, len(self.files))) as pool:
            shards = list(pool.map(self._read, self.files))
        self.columns = [shard.columns for shard in shards]
        self.metadata = [shard.metadata for shard in shards]
        self.starts = [shard.starts for shard in shards]
        self.group_bytes = [shard.group_bytes for shard in shards]
        counts = [shard.metadata.num_rows for shard in shards]
        self.file_ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.row_ids = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
        self.small = _joined([shard.small for shard in shards])
        self._name_rows(found.base)
        self._check_numbers()
        self.splits, self.split_rule = self._find_splits(found.base, fractions)

    def _read(self, path: str) -> Shard:
        where = self.storage.name(path)
        try:
            return self.storage.attempt(lambda: self._read_once(path, where))
        except (pa.ArrowException, OSError) as error:
            reason = self.storage.reason(error)
            raise ValueError(f"{where}: not a readable parquet file ({reason})") from None

    def open(self, path: str, as_dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        stream = self.storage.fs.open_input_file(path)
        remote, texts = self.storage.remote, list(as_dictionaries)
        return pq.ParquetFile(stream, pre_buffer=remote, read_dictionary=texts)

    def _read_once(self, path: str, where: str) -> Shard:
        with self.open(path) as file:
            columns, metadata = FileColumns(file.schema_arrow, where), file.metadata
            parquet_limits.check(metadata, where, self.sizes[path])
            groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
            starts = np.cumsum([0, *(g.num_rows for g in groups)])
            sizes = np.array([g.total_byte_size for g in groups], dtype=np.int64)
            keys = [key for key in SMALL if key in columns]
            texts = parquet_limits.texts_as_dictionaries(metadata, keys)
            table = None if texts else file.read(columns=keys, use_threads=False)
        if table is None:
            with self.open(path, texts) as file:
                table = parquet_limits.decoded(file.read(columns=keys, use_threads=False), where)
        absent = pa.chunked_array([pa.nulls(metadata.num_rows)])
        small = {key: _of_one_type(key, table[key] if key in columns else absent) for key in SMALL}
        return Shard(columns, metadata, starts, sizes, pa.table(small))

    def _name_rows(self, base: str) -> None:
        names, text = self.small["name"].values, pa.large_string()
        if names.null_count:
            stems = [posixpath.relpath(f, base).removesuffix(".parquet") for f in self.files]
            files = pa.array(stems, text).take(pa.array(self.file_ids))
            numbers = pc.utf8_lpad(pa.array(self.row_ids).cast(text), 6, "0")
            made = pc.binary_join_element_wise(files, numbers, pa.scalar("_", text))
            self.small["name"] = Column(pc.coalesce(names, made))
        sources = self.small["source"].values
        if sources.null_count:
            filled = pc.fill_null(sources.cast(text), pa.scalar("", text))
            self.small["source"] = Column(filled.dictionary_encode())

    def _check_numbers(self) -> None:
        for key in NUMBERS:
            values = self.small[key].values
            wrong = pc.invert(pc.is_finite(values))
            if key == "ir_scale":
                wrong = pc.or_(wrong, pc.equal(values, 0.0))
            bad = np.flatnonzero(wrong.fill_null(False).to_numpy(zero_copy_only=False))
            if len(bad):
                raise ValueError(f"{self.where(bad[0])}: {key} is {self.small[key][bad[0]]}")

    def where(self, i: int) -> str:
        file = self.storage.name(self.files[self.file_ids[i]])
        return f"{file}, row {self.row_ids[i]}, '{self.small['name'][i]}'"

    def _find_splits(self, base: str, fractions: list[float]) -> tuple[np.ndarray, str]:
        """train, val or test for every row: by column, else file name, else contiguous blocks."""
        with_column = ["split" in columns for columns in self.columns]
        if all(with_column):
            return self._splits_by_column(), "column 'split'"
        if any(with_column):
            without = self.storage.name(self.files[with_column.index(False)])
            raise ValueError(f"{without}: no column 'split', other files have one")
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

    def _splits_by_column(self) -> np.ndarray:
        codes, words = self.small["split"].codes()
        names = np.array(
            [mf.SPLIT_ALIASES.get(w, "") for w in words.to_pylist()] + [""], dtype="U5"
        )
        splits = names[codes]  # the last for None
        if len(bad := np.flatnonzero(splits == "")):
            word = self.small["split"][bad[0]]
            raise ValueError(
                f"{self.where(bad[0])}: split is {word!r}, expected train, val or test"
            )
        return splits

    def check_disjoint(self) -> None:
        """Raises: ValueError: one (source, name), or one content hash, in two splits."""
        text = pa.large_string()
        if all("name" in columns for columns in self.columns):
            sources = self.small["source"].values.cast(text)
            both = pc.binary_join_element_wise(
                sources, self.small["name"].values, pa.scalar("\0", text)
            )
            self._check_in_one_split("name", Column(both))
        hashes = self.small["sha256"].values
        known = pc.if_else(pc.equal(hashes, ""), None, hashes)
        self._check_in_one_split("content", Column(known))

    def _check_in_one_split(self, what: str, keys: Column) -> None:
        codes, different = keys.codes()
        first = np.full(len(different) + 1, len(codes))
        np.minimum.at(first, codes, np.arange(len(codes)))
        torn = self.splits[first[codes]] != self.splits
        if len(bad := np.flatnonzero(torn & (codes >= 0))):
            here, other = bad[0], first[codes[bad[0]]]
            raise ValueError(
                f"the same {what} is in {self.splits[other]} ({self.where(other)}) and in "
                f"{self.splits[here]} ({self.where(here)}); splits must be disjoint"
            )

    def facts(self) -> dict:
        """Window and Planck constants that prepare.py wrote into every file, {} without them.

        Raises: ValueError: files differ, or their window is none.
        """
        found = [(file.metadata or {}).get(mf.KEY.encode(), b"{}") for file in self.metadata]
        names = [self.storage.name(path) for path in self.files]
        for name, text in zip(names, found):
            if text != found[0]:
                raise ValueError(f"{name} has another window than {names[0]}; set data.window")
        try:
            facts = json.loads(found[0])
        except (ValueError, RecursionError):
            facts = {}
        if not isinstance(facts, dict) or "window" not in facts:
            return {}
        if wrong := mf.wrong_window(facts["window"]):
            raise ValueError(f"{names[0]}: {wrong}; set data.window")
        return facts

    def unit(self) -> str:
        """The one unit of the infrared values. Raises: ValueError: rows differ."""
        units = sorted({u or "counts" for u in self.small["ir_unit"].values.unique().to_pylist()})
        if len(units) > 1:
            raise ValueError(f"rows are in different units ({', '.join(units)}); use one data set")
        return units[0]


def _of_one_type(key: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """float64 for numbers, otherwise text: shards may store one column in different types."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if key in NUMBERS:
        return column.cast(pa.float64())
    if pa.types.is_floating(column.type):  # Arrow would write 1.0 as 1
        texts = [None if x is None else str(x) for x in column.to_pylist()]
        return pa.chunked_array([texts], pa.large_string())
    return column.cast(pa.large_string())


def _joined(tables: list[pa.Table]) -> dict[str, Column]:
    table, columns = pa.concat_tables(tables), {}
    for key in SMALL:
        column = table[key]
        if key in REPEATED:
            column = column.dictionary_encode().unify_dictionaries()
        columns[key] = Column(column.combine_chunks())
    return columns


def _split_of_file(name: str) -> str | None:
    words = [w for w in re.split(r"[^a-z]+", name.lower()) if w in mf.SPLIT_ALIASES]
    return mf.SPLIT_ALIASES[words[0]] if len({mf.SPLIT_ALIASES[w] for w in words}) == 1 else None
