"""A shard that shrinks while it is read, and one that would cost too much memory.

pytest tests/faults/test_damaged_shards.py
"""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import parquet_limits, row_index
from data.shard_files import find_files

ROOT = Path(__file__).resolve().parents[2]
SHRINK = """
import os, sys
from data.shards import RowReader
from tests.faults.test_damaged_shards import rows_of
reader = RowReader(rows_of(sys.argv[1]))
reader.read(0)
os.truncate(sys.argv[1] + "/a.parquet", 5000)
try:
    reader.read(15)
except ValueError as error:
    print("said:", error)
"""


def rows_of(folder):
    return row_index.Rows(find_files(str(folder)), [0.8, 0.1, 0.1])


@pytest.fixture
def folder(tmp_path):
    images = [bytes([i]) * 20_000 for i in range(16)]
    table = pa.table({"visible": images, "infrared": images, "name": [str(i) for i in range(16)]})
    pq.write_table(
        table, tmp_path / "a.parquet", row_group_size=1, compression="none", use_dictionary=False
    )
    return tmp_path


def test_a_shard_cut_while_it_is_read_is_one_sentence(folder):
    done = subprocess.run(
        [sys.executable, "-c", SHRINK, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "said:" in done.stdout and "a.parquet" in done.stdout


def test_a_row_group_beyond_the_limit_is_refused(folder, monkeypatch):
    monkeypatch.setattr(parquet_limits, "MOST_GROUP_BYTES", 30_000)
    with pytest.raises(ValueError, match=r"a.parquet: row group 0 has 4\d,\d+ bytes uncompressed"):
        rows_of(folder)
