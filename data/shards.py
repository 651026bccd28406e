"""Reads single rows of parquet shards: one row group at a time, keeping the latest in memory."""

import math
import os
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import parquet_limits
from data.row_index import ALIASES, Rows

OPEN_FILES = 128  # handles a process keeps
GROUP_BYTES = 64 * 2**20  # row groups a process keeps; at least one, and all of a shuffle window
SLOW_GROUP_BYTES = 128 * 2**20  # random rows from larger groups are worth a warning


class RowReader:
    """Encoded bytes of single rows. Handles belong to a process: a forked worker opens its own."""

    def __init__(self, rows: Rows):
        self.rows, self.most_bytes = rows, GROUP_BYTES
        self._reset()

    def _reset(self) -> None:
        self.pid = os.getpid()
        self.handles: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self.groups: OrderedDict[tuple[int, int], tuple[dict, int]] = OrderedDict()
        self.bytes = 0

    def __getstate__(self):
        return {"rows": self.rows, "most_bytes": self.most_bytes, "pid": -1}

    def largest_group(self) -> int:
        """Bytes of the largest row group."""
        return int(max((sizes.max(initial=0) for sizes in self.rows.group_bytes), default=0))

    def groups_of(self, index: np.ndarray) -> np.ndarray:
        """A number for the row group of each of these rows."""
        counts = [len(sizes) for sizes in self.rows.group_bytes]
        firsts = np.cumsum([0, *counts])
        numbers = [
            np.repeat(np.arange(first, first + count, dtype=np.int32), np.diff(starts))
            for first, count, starts in zip(firsts, counts, self.rows.starts)
        ]
        return np.concatenate(numbers)[index]

    def keep(self, window: int, groups: np.ndarray) -> int:
        """Keep as many row groups as a window of rows may touch. Returns: bytes, about.

        groups: the row group of every row that is drawn.
        """
        used = np.unique(groups)
        sizes = np.concatenate(self.rows.group_bytes)[used]
        touched = min(len(used), math.ceil(window * len(used) / len(groups)) + 2)
        needed = math.ceil(touched * float(sizes.mean()))
        self.most_bytes = max(GROUP_BYTES, needed + int(sizes.max()))
        return needed

    def read(self, i: int) -> dict[str, Any]:
        """Image bytes or None, of row i by column. Raises: ValueError naming file and row."""
        if self.pid != os.getpid():
            self._reset()
        file_id, row = int(self.rows.file_ids[i]), int(self.rows.row_ids[i])
        starts = self.rows.starts[file_id]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        storage = self.rows.storage
        try:
            columns = storage.attempt(lambda: self._group(file_id, group))
            inside = row - int(starts[group])
            return {key: _bytes(column, inside) for key, column in columns.items()}
        except (pa.ArrowException, OSError) as error:
            reason = storage.reason(error)
            raise ValueError(f"{self.rows.where(i)}: cannot be read ({reason})") from None

    def _group(self, file_id: int, group: int) -> dict[str, pa.ChunkedArray]:
        key = (file_id, group)
        if key in self.groups:
            self.groups.move_to_end(key)
            return self.groups[key][0]
        columns, size = self._fetch(file_id, group)
        self.groups[key] = (columns, size)
        self.bytes += size
        while self.bytes > self.most_bytes and len(self.groups) > 1:
            self.bytes -= self.groups.popitem(last=False)[1][1]
        return columns

    def _fetch(self, file_id: int, group: int) -> tuple[dict[str, pa.ChunkedArray], int]:
        """The image columns of a row group, and their bytes."""
        names = {k: n for k, n in self.rows.columns[file_id].items() if k in ALIASES}
        try:
            table = self._handle(file_id).read_row_group(
                group, columns=list(names.values()), use_threads=False
            )
        except OSError:
            self.handles.pop(file_id, None)  # another attempt opens the file anew
            raise
        columns = {}
        for our, name in names.items():
            column = table[name]
            if pa.types.is_struct(column.type):
                column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
            columns[our] = column
        return columns, table.nbytes

    def _handle(self, file_id: int) -> pq.ParquetFile:
        if file_id in self.handles:
            self.handles.move_to_end(file_id)
            return self.handles[file_id]
        storage, path = self.rows.storage, self.rows.files[file_id]
        stream = storage.fs.open_input_file(path)  # a memory map of a cut file is a SIGBUS
        metadata = self.rows.metadata[file_id]
        images = [name for key, name in self.rows.columns[file_id].items() if key in ALIASES]
        handle = pq.ParquetFile(
            stream,
            metadata=metadata,
            pre_buffer=storage.remote,
            read_dictionary=parquet_limits.images_as_dictionaries(metadata, images),
        )
        self.handles[file_id] = handle
        if len(self.handles) > OPEN_FILES:
            self.handles.popitem(last=False)[1].close()
        return handle


def _bytes(column: pa.ChunkedArray, row: int) -> bytes | None:
    value = column[row]
    if value.is_valid and pa.types.is_dictionary(value.type):
        value = value.value
    return value.as_buffer().to_pybytes() if value.is_valid else None
