"""Sizes of stored images, without decoding them."""

import numpy as np

from data.aspect import Shape
from data.manifest import KEY
from data.row_index import Rows


def stored_sizes(rows: Rows) -> dict[int, Shape]:
    """Height and width by row, of the files that prepare.py wrote with both as columns."""
    sizes: dict[int, Shape] = {}
    for file_id, (path, metadata) in enumerate(zip(rows.files, rows.metadata)):
        ours = KEY.encode() in (metadata.metadata or {})
        if not (ours and {"height", "width"} <= set(metadata.schema.names)):
            continue
        with rows.open(path) as file:
            table = file.read(columns=["height", "width"], use_threads=False)
        known = zip(table["height"].to_pylist(), table["width"].to_pylist())
        sizes |= zip(np.flatnonzero(rows.file_ids == file_id).tolist(), known)
    return sizes
