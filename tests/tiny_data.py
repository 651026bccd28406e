"""Small images, folders and parquet files for the tests of data/ and prepare.py."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def visible(i: int, size=(24, 32)) -> np.ndarray:
    """A smooth scene of its own for each i."""
    rng = np.random.default_rng([i, 1])
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.array(coarse.resize(size[::-1], Image.Resampling.BILINEAR))


def infrared(i: int, size=(24, 32), dtype=np.uint8) -> np.ndarray:
    """Smooth counts that use the whole range of the type."""
    rng = np.random.default_rng([i, 2])
    coarse = Image.fromarray(rng.random((6, 8), dtype=np.float32))
    values = np.array(coarse.resize(size[::-1], Image.Resampling.BILINEAR))
    values = (values - values.min()) / np.ptp(values)
    return np.rint(values * np.iinfo(dtype).max).astype(dtype)


def semantic(i: int, size=(24, 32), classes: int = 9) -> np.ndarray:
    return np.random.default_rng([i, 3]).integers(0, classes, size).astype(np.uint8)


def folders(root, names, size=(24, 32), dtype=np.uint8, classes: int = 0):
    """root/visible, root/infrared (and root/semantic) with one PNG a name."""
    kinds = ["visible", "infrared", *(["semantic"] if classes else [])]
    for kind in kinds:
        for name in names:
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (root / "visible" / f"{name}.png").write_bytes(png(visible(i, size)))
        (root / "infrared" / f"{name}.png").write_bytes(png(infrared(i, size, dtype)))
        if classes:
            (root / "semantic" / f"{name}.png").write_bytes(png(semantic(i, size, classes)))
    return root


def rows(count: int, first: int = 0, dtype=np.uint8, split=None) -> dict[str, list]:
    """Columns of `count` rows; `split` gives each row its own split."""
    numbers = range(first, first + count)
    columns = {
        "visible": [png(visible(i)) for i in numbers],
        "infrared": [png(infrared(i, dtype=dtype)) for i in numbers],
        "name": [f"pair_{i:04d}" for i in numbers],
    }
    return columns if split is None else {**columns, "split": [split(i) for i in numbers]}


def by_tens(i: int) -> str:
    """train, except one val and one test in ten."""
    return {8: "val", 9: "test"}.get(i % 10, "train")


def write(path, columns: dict, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path
