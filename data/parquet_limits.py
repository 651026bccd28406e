"""Limits on how much of a parquet file is decoded: a few kB may hold gigabytes.

A value that many rows share may be stored once, as a dictionary with one entry, and 3 kB decode to
3 GiB. Read as dictionaries, columns take no more memory than the file says of itself.
"""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MOST_GROUP_BYTES = 2**30  # of a row group; larger ones are refused
MOST_TEXT_BYTES, TEXT_BYTES_A_ROW = 2**28, 4096  # of a file's names and other texts: the larger


def check(metadata: pq.FileMetaData, path: str, size: int) -> None:
    """Raises: ValueError: a row group beyond the limit, or more rows than the file has bytes."""
    for g in range(metadata.num_row_groups):
        if (found := metadata.row_group(g).total_byte_size) > MOST_GROUP_BYTES:
            raise ValueError(
                f"{path}: row group {g} has {found:,} bytes uncompressed, at most "
                f"{MOST_GROUP_BYTES:,} are read; write it with smaller row groups"
            )
    if metadata.num_rows > size:
        raise ValueError(f"{path}: {metadata.num_rows:,} rows in {size:,} bytes cannot be images")


def images_as_dictionaries(metadata: pq.FileMetaData, names: list[str]) -> list[str]:
    """Columns of images to read as dictionaries; [] if none has to be, which is faster."""
    found: set[str] = set()
    for g in range(metadata.num_row_groups):
        found |= _paths(metadata, g, names, MOST_GROUP_BYTES)
    return sorted(found)


def texts_as_dictionaries(metadata: pq.FileMetaData, names: list[str]) -> list[str]:
    """The same for the columns that are read whole, of all row groups together."""
    groups, found = metadata.num_row_groups, set()
    for g in range(groups):
        found |= _paths(metadata, g, names, _most_text(metadata.num_rows) // groups)
    return sorted(found)


def _most_text(rows: int) -> int:
    return max(MOST_TEXT_BYTES, TEXT_BYTES_A_ROW * rows)


def _paths(metadata: pq.FileMetaData, g: int, names: list[str], most: int) -> set[str]:
    """Paths in the schema of columns of bytes that may decode to more than `most` together."""
    group = metadata.row_group(g)
    if group.num_rows * group.total_byte_size <= most:
        return set()
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [c for c in chunks if c.path_in_schema.split(".")[0] in names]
    if group.num_rows * sum(c.total_uncompressed_size for c in chunks) <= most:
        return set()
    return {c.path_in_schema for c in chunks if c.physical_type == "BYTE_ARRAY"}


def decoded(table: pa.Table, path: str) -> pa.Table:
    """Dictionaries of texts to texts. Raises: ValueError: these would be beyond the limit."""
    size, most = 0, _most_text(table.num_rows)
    for column in table.columns:
        for chunk in column.chunks if pa.types.is_dictionary(column.type) else []:
            lengths = pc.binary_length(chunk.dictionary.cast(pa.large_binary()))
            size += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    if size > most:
        raise ValueError(
            f"{path}: {size:,} bytes of names and other texts, at most {most:,} are read"
        )
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(i, table.field(i).name, column.cast(column.type.value_type))
    return table
