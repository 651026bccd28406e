"""Large sets: the order within windows, what is read for it, the index of rows, faults of shards.

pytest tests/test_shards.py
"""

import numpy as np
import pyarrow as pa
import pytest
import torch

import prepare
from data import order, shards
from data.pairs import DataConfig, LabelConfig, open_pairs
from data.row_index import Column
from data.stream import stream
from tests import tiny_data as tiny

COUNTS = (1, 13, 5, 8)  # rows of the shards


def config(path, **options) -> DataConfig:
    labels = LabelConfig(material_source="none")
    return DataConfig(
        **{"path": str(path), "size": 16, "labels": labels, "cache": "none", **options}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of unequal length in row groups of 4, all of them to train with."""
    folder, first = tmp_path_factory.mktemp("shards"), 0
    for part, count in enumerate(COUNTS):
        columns = tiny.rows(count, first=first, split=lambda i: "train")
        tiny.write(folder / f"part{part}.parquet", columns, row_group_size=4)
        first += count
    return folder


def take(batches, count: int) -> list[dict]:
    return [next(batches) for _ in range(count)]


# ---------------------------------------------------------------------------- order


@pytest.mark.parametrize("window", [1, 4, 10, 1000])
def test_a_windowed_epoch_holds_every_row_once_and_epochs_differ(window):
    groups = np.repeat([7, 3, 9, 1], [5, 1, 4, 8])  # any numbers: those of one group are together
    first, second = (order.windowed(0, epoch, groups, window) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(18))
    assert first.tolist() != second.tolist()
    assert first.tolist() == order.windowed(0, 0, groups, window).tolist()


def test_the_rows_of_a_window_come_from_the_groups_that_fill_it():
    groups = np.repeat(np.arange(100), 10)
    found = groups[order.windowed(1, 0, groups, 50)].reshape(-1, 50)
    assert all(len(set(window)) == 5 for window in found)
    assert any(np.diff(window).astype(bool).sum() > 30 for window in found)  # mixed, not in blocks
    firsts = [window.min() for window in found]
    assert firsts != sorted(firsts)  # and the groups are from anywhere in the set


def test_in_a_window_as_large_as_the_set_any_row_may_come_anywhere():
    groups = np.repeat(np.arange(4), 25)
    places = [np.argsort(order.windowed(0, epoch, groups, 100)) for epoch in range(400)]
    mean = np.mean(places, axis=0)
    assert abs(mean - 49.5).max() < 6  # 4 standard deviations of a mean of 400 uniform places


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("world_size, batch_size, workers", [(1, 3, 2), (2, 2, 0), (3, 1, 1)])
def test_ranks_and_workers_see_every_row_once_an_epoch(
    folder, window, world_size, batch_size, workers
):
    pairs = open_pairs(config(folder, shuffle_window=window), "train")
    n = len(pairs)
    batches = -(-2 * n // (world_size * batch_size))
    drawn = {}
    for rank in range(world_size):
        for batch in take(stream(pairs, batch_size, 5, rank, world_size, 0, workers), batches):
            assert not drawn.keys() & set(batch["draw"])
            drawn |= dict(zip(batch["draw"], batch["name"]))
    assert sorted(drawn) == list(range(len(drawn))) and len(drawn) >= 2 * n
    for epoch in (0, 1):
        assert sorted(drawn[epoch * n + i] for i in range(n)) == sorted(pairs.names)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_within_an_epoch_gives_the_same_bits(folder, workers):
    whole = take(stream(open_pairs(config(folder, shuffle_window=6), "train"), 4, seed=2), 12)
    for first in (3, 8):  # in the first epoch of 27 rows and in the second
        again = open_pairs(config(folder, shuffle_window=6), "train")
        for a, b in zip(whole[first:], stream(again, 4, 2, first=first, num_workers=workers)):
            assert a["name"] == b["name"] and a["draw"] == b["draw"]
            assert torch.equal(a["visible"], b["visible"])
            assert torch.equal(a["infrared"], b["infrared"])


def test_the_window_is_said_at_the_start_and_must_be_a_number_of_rows(folder):
    notes = open_pairs(config(folder, shuffle_window=6), "train").notes
    assert any("windows of 6 rows" in note and "MiB" in note for note in notes)
    assert any(
        "data.shuffle_window=0" in note for note in open_pairs(config(folder), "train").notes
    )
    with pytest.raises(ValueError, match="number of rows, or 0, got -1"):
        config(folder, shuffle_window=-1)


# ---------------------------------------------------------------------------- reading


@pytest.fixture
def groups_read(monkeypatch):
    """Every (file, row group) that is read, in order."""
    read, original = [], shards.RowReader._fetch

    def counted(self, file_id, group):
        read.append((file_id, group))
        return original(self, file_id, group)

    monkeypatch.setattr(shards.RowReader, "_fetch", counted)
    monkeypatch.setattr(shards, "GROUP_BYTES", 1)
    return read


def test_a_window_reads_every_row_group_about_once_an_epoch(folder, groups_read):
    groups = sum(-(-count // 4) for count in COUNTS)
    reads = {}
    for window in (0, 6):
        pairs = open_pairs(config(folder, shuffle_window=window), "train")
        groups_read.clear()
        names = [n for b in take(stream(pairs, 1, seed=0), len(pairs)) for n in b["name"]]
        assert sorted(names) == sorted(pairs.names)
        reads[window] = len(groups_read)
    assert reads[6] <= groups + 2 and reads[0] > 2 * groups


def test_no_more_than_the_groups_of_a_window_are_kept(folder, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_BYTES", 1)
    pairs = open_pairs(config(folder, shuffle_window=6), "train")
    reader = pairs.source.reader
    kept = []
    for i in pairs.order(0, 0):
        reader.read(i)
        kept.append(reader.bytes)
    assert 2 * reader.largest_group() < max(kept) <= reader.most_bytes
    assert reader.most_bytes < sum(sizes.sum() for sizes in reader.rows.group_bytes)


# ---------------------------------------------------------------------------- index


def test_a_column_is_a_sequence():
    for values in (
        pa.array(["a", "b", None, "a"]),
        pa.array(["a", "b", None, "a"]).dictionary_encode(),
    ):
        column = Column(values)
        assert column == ["a", "b", None, "a"] and column != ["a"] and len(column) == 4
        assert column[3] == column[np.int64(-1)] == "a" and column[1:3] == ["b", None]
        assert column.index("b") == 1 and column.count("a") == 2 and "c" not in column
        codes, different = column.codes()
        assert codes.tolist() == [0, 1, -1, 0] and different.to_pylist() == ["a", "b"]
        assert column.take(np.array([2, 0])) == [None, "a"]


def test_shards_of_different_column_types_are_one_set(tmp_path):
    columns = tiny.rows(4, split=lambda i: "train")
    tiny.write(tmp_path / "a.parquet", {**columns, "name": [1, 2, 3, 4]})
    columns = {**tiny.rows(4, first=4, split=lambda i: "train")}
    columns["infrared"] = [{"bytes": b, "path": ""} for b in columns["infrared"]]
    columns["name"] = pa.array(["a", "b", None, "d"]).dictionary_encode()
    tiny.write(tmp_path / "b.parquet", columns)
    columns = {**tiny.rows(2, first=8, split=lambda i: "train"), "name": [0.5, 1.0]}
    tiny.write(tmp_path / "c.parquet", {**columns, "source": ["x", "y"], "ir_scale": [1, 2]})
    pairs = open_pairs(config(tmp_path), "train")
    assert pairs.names == ["1", "2", "3", "4", "a", "b", "b_000002", "d", "0.5", "1.0"]
    assert pairs.sources == [""] * 8 + ["x", "y"]
    for i in range(8):
        assert np.array_equal(pairs.pair(i).infrared, tiny.infrared(i))
    assert np.array_equal(pairs.pair(9).infrared, 2.0 * tiny.infrared(9))


# ---------------------------------------------------------------------------- faults


def _bad_number(columns):
    columns["ir_scale"] = [1.0, None, float("inf")]


def _unknown_split(columns):
    columns["split"] = ["train", "train", "holdout"]


def _no_infrared(columns):
    del columns["infrared"]


def _text_for_images(columns):
    columns["visible"] = ["a.png", "b.png", "c.png"]


def _no_split(columns):
    del columns["split"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (_bad_number, r"b\.parquet, row 2, 'pair_0005': ir_scale is inf"),
        (_unknown_split, r"b\.parquet, row 2, 'pair_0005': split is 'holdout'"),
        (_no_infrared, r"b\.parquet: no column 'infrared'"),
        (_text_for_images, r"b\.parquet: column 'visible' holds string"),
        (_no_split, r"b\.parquet: no column 'split', other files have one"),
    ],
)
def test_a_shard_unlike_the_others_is_named(tmp_path, damage, message):
    tiny.write(tmp_path / "a.parquet", tiny.rows(3, split=lambda i: "train"))
    columns = tiny.rows(3, first=3, split=lambda i: "train")
    damage(columns)
    tiny.write(tmp_path / "b.parquet", columns)
    with pytest.raises(ValueError, match=message) as raised:
        open_pairs(config(tmp_path), "train")
    assert len(str(raised.value).splitlines()) == 1


def test_a_shard_that_vanishes_is_named_with_the_row(tmp_path):
    for part in range(2):
        columns = tiny.rows(3, first=3 * part, split=lambda i: "train")
        tiny.write(tmp_path / f"{part}.parquet", columns)
    pairs = open_pairs(config(tmp_path), "train")
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"1\.parquet, row 1, 'pair_0004': cannot be read"
    ) as raised:
        pairs.pair(4)
    assert len(str(raised.value).splitlines()) == 1


# ---------------------------------------------------------------------------- writing


def test_a_store_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="shards are written to a local folder"):
        prepare.main(["--synthetic", "3", "--out", "s3://bucket/set"])
    assert not list(tmp_path.iterdir())
