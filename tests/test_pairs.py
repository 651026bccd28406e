"""Reading pairs: columns, splits, windows, damage, caches, synthetic scenes."""

import os
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch

import prepare
from data import shards
from data.pairs import DataConfig, LabelConfig, describe, open_pairs
from data.transforms import AugmentConfig
from tests import tiny_data as tiny


def config(path, **options) -> DataConfig:
    labels = LabelConfig(material_source=options.pop("material_source", "none"))
    return DataConfig(**{"path": str(path), "size": 16, "labels": labels, **options})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return tiny.write(folder / "pairs.parquet", tiny.rows(20, split=tiny.by_tens), row_group_size=7)


def test_a_sample_follows_the_contract(file):
    pairs = open_pairs(config(file), "train")
    sample = pairs.get(3)
    assert len(pairs) == 16 and sample["name"] == pairs.names[3] == "pair_0003"
    assert sample["visible"].shape == sample["infrared"].shape == (3, 16, 16)
    assert sample["semantic"].shape == (16, 16) and (sample["semantic"] == 255).all()
    assert 0 <= sample["infrared"].min() < sample["infrared"].max() <= 1


def test_every_row_is_the_image_that_was_written(file):
    for cache in ("ram", "none"):
        pairs = open_pairs(config(file, size=[24, 32], cache=cache), "all")
        for i in np.random.default_rng(0).permutation(20).tolist() * 2:
            visible = np.rint(pairs.get(i)["visible"].numpy().transpose(1, 2, 0) * 255)
            assert np.array_equal(visible, tiny.visible(i))
            restored = pairs.window.restore(pairs.get(i)["infrared"][0]).numpy()
            assert np.array_equal(np.rint(restored), tiny.infrared(i))


def test_only_the_wanted_row_group_is_kept_in_memory(file, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_BYTES", 1)
    pairs = open_pairs(config(file, cache="none"), "all")
    for i in (0, 19, 8, 1):
        assert np.array_equal(pairs.pair(i).infrared, tiny.infrared(i))
        assert len(pairs.source.reader.groups) == 1


@pytest.mark.parametrize("names", [("src_img", "edited_img", "panoptic_img"), ("rgb", "ir", None)])
@pytest.mark.parametrize("struct", [False, True])
def test_other_column_names_and_huggingface_structs_are_read(tmp_path, names, struct):
    columns = tiny.rows(10, split=tiny.by_tens)
    columns["semantic"] = [tiny.png(tiny.semantic(i)) for i in range(10)]
    renamed = {"name": columns["name"], "split": columns["split"]}
    for ours, theirs in zip(("visible", "infrared", "semantic"), names):
        if theirs:
            values = columns[ours]
            renamed[theirs] = [{"bytes": v, "path": "a.png"} for v in values] if struct else values
    pairs = open_pairs(config(tiny.write(tmp_path / "a.parquet", renamed), size=[24, 32]), "val")
    assert np.array_equal(pairs.pair(0).infrared, tiny.infrared(8))
    wanted = tiny.semantic(8) if names[2] else np.full((24, 32), 255)
    assert np.array_equal(pairs.get(0)["semantic"].numpy(), wanted)


def test_file_folder_glob_and_uri_give_the_same_pairs(tmp_path):
    for part in range(2):
        tiny.write(
            tmp_path / "set" / f"part{part}.parquet",
            tiny.rows(10, first=10 * part, split=tiny.by_tens),
        )
    (tmp_path / "set" / ".part9.parquet").write_bytes(b"left by another program")
    paths = [
        tmp_path / "set",
        tmp_path / "set" / "*.parquet",
        f"file://{tmp_path}/set",
        f"file://{tmp_path}/set/part*.parquet",
        tmp_path / "**" / "*.parquet",
    ]
    for path in paths:
        assert open_pairs(config(path), "test").names == ["pair_0009", "pair_0019"], path
    assert len(open_pairs(config(tmp_path / "set" / "part1.parquet"), "test")) == 1
    (tmp_path / "set").rename(tmp_path / "a [b]")
    assert len(open_pairs(config(tmp_path / "a [b]"), "test")) == 2


def test_file_names_give_the_split_and_otherwise_blocks_do(tmp_path):
    for number, name in enumerate(["train-00000", "validation-00000", "test-00000"]):
        tiny.write(tmp_path / "named" / f"{name}-of-00001.parquet", tiny.rows(3, first=3 * number))
    val = open_pairs(config(tmp_path / "named"), "val")
    assert val.names == ["pair_0003", "pair_0004", "pair_0005"]
    plain = tiny.write(tmp_path / "plain.parquet", tiny.rows(10))
    names = [open_pairs(config(plain), split).names for split in ("train", "val", "test")]
    assert [len(n) for n in names] == [8, 1, 1] and names[2] == ["pair_0009"]
    assert "blocks" in open_pairs(config(plain), "train").notes[0]
    for wrong in ([0.9, 0.1], [1.0, -0.5, 0.5], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="three shares"):
            open_pairs(config(plain, split_fractions=wrong), "train")


def test_one_name_in_two_splits_is_refused(tmp_path):
    columns = tiny.rows(10, split=tiny.by_tens)
    columns["name"][9] = columns["name"][0]
    file = tiny.write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=r"same name.*row 0.*row 9.*disjoint"):
        open_pairs(config(file), "train")


def test_one_content_in_two_splits_is_refused(tmp_path):
    columns = {**tiny.rows(10, split=tiny.by_tens), "sha256": [str(i // 2) for i in range(10)]}
    with pytest.raises(ValueError, match="same content"):
        open_pairs(config(tiny.write(tmp_path / "a.parquet", columns)), "train")


@pytest.mark.parametrize(
    "drop, message",
    [("visible", "no column 'visible'.*src_img"), ("infrared", "no column 'infrared'.*edited_img")],
)
def test_a_missing_column_is_named_with_its_other_names(tmp_path, drop, message):
    columns = tiny.rows(3, split=tiny.by_tens)
    columns[f"some_{drop}"] = columns.pop(drop)
    with pytest.raises(ValueError, match=message):
        open_pairs(config(tiny.write(tmp_path / "a.parquet", columns)), "train")


def test_a_column_of_text_is_refused(tmp_path):
    columns = {**tiny.rows(3, split=tiny.by_tens), "visible": ["a.png"] * 3}
    with pytest.raises(ValueError, match="'visible' holds string"):
        open_pairs(config(tiny.write(tmp_path / "a.parquet", columns)), "train")


def test_an_empty_split_is_refused_with_the_counts(tmp_path):
    file = tiny.write(tmp_path / "a.parquet", tiny.rows(3, split=lambda i: "train"))
    with pytest.raises(ValueError, match="no pair in split 'val'.*'train': 3"):
        open_pairs(config(file), "val")


def test_nothing_there_is_one_sentence(tmp_path):
    for path in (tmp_path / "none", tmp_path / "*.parquet", tmp_path):
        with pytest.raises(ValueError, match=r"data\.path"):
            open_pairs(config(path), "train")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a readable parquet"):
        open_pairs(config(tmp_path), "train")


@pytest.mark.parametrize("column", ["visible", "infrared"])
def test_a_truncated_image_is_named_by_file_row_and_name(tmp_path, column):
    columns = tiny.rows(10, split=lambda i: "train")
    columns[column][5] = columns[column][5][:-40]
    pairs = open_pairs(config(tiny.write(tmp_path / "a.parquet", columns)), "train")
    pairs.get(4)
    with pytest.raises(ValueError, match=rf"a\.parquet, row 5, 'pair_0005', {column}: damaged"):
        pairs.get(5)
    with pytest.raises(ValueError, match="row 5"):
        pairs.check(5)


def test_the_first_row_is_decoded_at_open(tmp_path):
    columns = tiny.rows(3, split=lambda i: "train")
    columns["visible"][0] = b"nothing"
    with pytest.raises(ValueError, match=r"row 0, 'pair_0000', visible: not a readable image"):
        open_pairs(config(tiny.write(tmp_path / "a.parquet", columns), window=[0, 255]), "train")


def test_sizes_that_differ_and_missing_bytes_are_refused_with_the_row(tmp_path):
    columns = tiny.rows(4, split=lambda i: "train")
    columns["infrared"][2] = tiny.png(tiny.infrared(2, size=(32, 32)))
    columns["visible"][3] = None
    pairs = open_pairs(config(tiny.write(tmp_path / "a.parquet", columns)), "train")
    with pytest.raises(ValueError, match="row 2.*visible is 32 x 24 but infrared is 32 x 32"):
        pairs.get(2)
    with pytest.raises(ValueError, match="row 3, .*no visible bytes"):
        pairs.get(3)


def test_a_class_id_outside_the_table_is_refused_with_the_row(tmp_path):
    columns = tiny.rows(3, split=lambda i: "train")
    maps = [np.zeros((24, 32), np.uint8) for _ in range(3)]
    maps[1][0, 0], maps[2][3, 4] = 255, 9
    columns["semantic"] = [tiny.png(m) for m in maps]
    pairs = open_pairs(
        config(tiny.write(tmp_path / "a.parquet", columns), material_source="msrs"), "train"
    )
    pairs.get(1)
    with pytest.raises(ValueError, match=r"row 2, 'pair_0002': class id 9 \(1 pix.* 9 classes"):
        pairs.get(2)


def test_wide_infrared_needs_a_window_and_keeps_its_counts(tmp_path):
    file = tiny.write(
        tmp_path / "a.parquet", tiny.rows(3, dtype=np.uint16, split=lambda i: "train")
    )
    with pytest.raises(ValueError, match=r"uint16 infrared without a manifest; set data\.window"):
        open_pairs(config(file), "train")
    pairs = open_pairs(config(file, window=[0, 65535], size=[24, 32]), "train")
    restored = pairs.window.restore(pairs.get(1)["infrared"])
    assert np.array_equal(np.rint(restored[1].numpy()), tiny.infrared(1, dtype=np.uint16))
    stretched = open_pairs(config(file, window="per_image"), "train")
    assert stretched.window is None and stretched.get(0)["infrared"].max() == 1
    for wrong in ("minmax", [1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="window"):
            open_pairs(config(file, window=wrong), "train")


def test_rows_scale_counts_to_their_unit(tmp_path):
    columns = tiny.rows(3, dtype=np.uint16, split=lambda i: "train")
    columns |= {"ir_unit": ["kelvin"] * 3, "ir_scale": [0.01] * 3, "ir_offset": [10.0] * 3}
    file = tiny.write(tmp_path / "a.parquet", columns)
    pairs = open_pairs(config(file, window=[0, 700], size=[24, 32]), "train")
    kelvin = tiny.infrared(0, dtype=np.uint16) * 0.01 + 10
    assert pairs.window.unit == "kelvin"
    assert np.allclose(pairs.window.restore(pairs.get(0)["infrared"][0].numpy()), kelvin, atol=1e-3)
    columns["ir_unit"][1] = None
    with pytest.raises(ValueError, match="different units"):
        open_pairs(config(tiny.write(file, columns), window=[0, 700]), "train")


def test_cache_stops_at_its_bound_and_changes_nothing(file):
    plain = open_pairs(config(file, cache="none"), "train")
    small = open_pairs(config(file, cache_gib=4000 / 2**30), "train")
    for _ in range(2):
        for i in range(len(plain)):
            a, b = plain.get(i, np.random.default_rng(i)), small.get(i, np.random.default_rng(i))
            assert all(torch.equal(a[k], b[k]) for k in ("visible", "infrared", "semantic"))
    assert (small.cache.entries[:, 0] > 0).sum() == 1


@pytest.mark.parametrize("gib", [float("nan"), float("inf"), -1.0])
def test_a_cache_of_no_size_is_refused(file, gib):
    with pytest.raises(ValueError, match="cache_gib must be a number of GiB"):
        open_pairs(config(file, cache_gib=gib), "train")


def test_cached_pairs_are_not_decoded_again(file, monkeypatch):
    pairs = open_pairs(config(file), "train")
    first = pairs.get(5)
    monkeypatch.setattr(pairs.source, "pair", lambda i: pytest.fail("decoded again"))
    assert torch.equal(pairs.get(5)["visible"], first["visible"])


def test_a_forked_process_opens_its_own_files_and_shares_the_cache(file):
    pairs = open_pairs(config(file), "train")
    handles = pairs.source.reader.handles
    pid = os.fork()
    if pid == 0:
        ok = np.array_equal(pairs.pair(9).infrared, tiny.infrared(int(pairs.names[9][-4:])))
        os._exit(0 if ok and pairs.source.reader.handles is not handles else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert pairs.cache.entries[9, 0] > 0
    assert np.array_equal(pairs.pair(9).infrared, tiny.infrared(int(pairs.names[9][-4:])))


def test_pairs_survive_pickling(file):
    pairs = open_pairs(config(file), "train")
    copy = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(copy.get(7)["infrared"], pairs.get(7)["infrared"])


def test_synthetic_splits_share_no_scene_and_stay_the_same():
    cfg = DataConfig(size=32, synthetic_scenes={"train": 3, "val": 2, "test": 2})
    splits = {s: open_pairs(cfg, s) for s in ("train", "val", "test")}
    names = [n for pairs in splits.values() for n in pairs.names]
    assert len(set(names)) == 7
    again = open_pairs(cfg, "val").get(1)
    sample = splits["val"].get(1)
    assert torch.equal(sample["visible"], again["visible"])
    assert sample["semantic"].max() < 255 and sample["infrared"].shape == (3, 32, 32)
    with pytest.raises(ValueError, match="synthetic_scenes"):
        open_pairs(DataConfig(synthetic_scenes={"train": 3}), "val")


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": [16]}, {"size": [16, -1]}, {"cache": "disk"}]
)
def test_bad_options_are_refused(file, options):
    with pytest.raises(ValueError, match=r"data\."):
        open_pairs(config(file, **options), "train")
    with pytest.raises(ValueError, match="split must be one of"):
        open_pairs(config(file), "valid")


def test_description_names_counts_sizes_and_ranges(file):
    told = describe(open_pairs(config(file), "train"))
    assert told["pairs"] == 16 and told["stored_sizes"] == [(24, 32)]
    assert told["infrared_type"] == ["uint8"] and told["infrared_range"] == [0.0, 255.0]


def test_augmentation_is_a_function_of_the_generator(file):
    pairs = open_pairs(config(file, augment=AugmentConfig(crop_scale=[0.5, 0.9])), "train")
    a, b, c = (pairs.get(2, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(a["visible"], b["visible"]) and not torch.equal(a["visible"], c["visible"])


def test_large_binary_columns_are_read(tmp_path):
    columns = tiny.rows(3, split=lambda i: "train")
    columns["visible"] = pa.array(columns["visible"], pa.large_binary())
    pairs = open_pairs(config(tiny.write(tmp_path / "a.parquet", columns)), "train")
    assert np.array_equal(pairs.pair(1).visible, tiny.visible(1))


def test_wider_infrared_after_a_first_row_of_8_bit_is_refused_with_the_row(tmp_path):
    columns = tiny.rows(10, split=tiny.by_tens)
    columns["infrared"][3] = tiny.png(tiny.infrared(3, dtype=np.uint16))
    pairs = open_pairs(config(tiny.write(tmp_path / "p.parquet", columns)), "train")
    with pytest.raises(ValueError, match=r"row 3, 'pair_0003': uint16 infrared.*data.window"):
        pairs.get(3)


def test_rows_without_a_name_are_told_apart_by_folder(tmp_path):
    for folder in ("a", "b"):
        columns = {k: x for k, x in tiny.rows(2).items() if k != "name"}
        tiny.write(tmp_path / folder / "test-00000.parquet", columns)
    names = open_pairs(config(tmp_path), "test").names
    assert names == [f"{f}/test-00000_{i:06d}" for f in "ab" for i in range(2)]


def test_a_window_that_no_image_reaches_is_refused(tmp_path):
    file = tiny.write(tmp_path / "a.parquet", tiny.rows(6, split=lambda i: "train"))
    with pytest.raises(ValueError, match="no infrared value of 5 pairs .* 7000 to 1"):
        open_pairs(config(file, window=[7000, 10000]), "train")
    assert len(open_pairs(config(file, window=[-100, 100]), "train")) == 6


def test_a_folder_without_a_manifest_does_not_get_anothers_window(tmp_path):
    prepare.main(["--synthetic", "10", "--size", "32", "--out", str(tmp_path / "sets" / "a")])
    columns = {**tiny.rows(4, split=lambda i: "train"), "source": ["b"] * 4}
    (tmp_path / "sets" / "b").mkdir()
    tiny.write(tmp_path / "sets" / "b" / "b.parquet", columns)
    with pytest.raises(ValueError, match="1 of 2 folders have a manifest.* set data.window"):
        open_pairs(config(tmp_path / "sets"), "train")


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("ir_unit", [1, 2, 1], "'ir_unit' holds int64, expected text"),
        ("ir_offset", ["a", "b", "c"], "'ir_offset' holds string, expected numbers"),
        ("split", [["train"]] * 3, "'split' holds list.*, expected text"),
        ("ir_scale", [1.0, float("nan"), 1.0], "row 1, 'pair_0001': ir_scale is nan"),
        ("ir_scale", [1.0, 1.0, 0.0], "row 2, 'pair_0002': ir_scale is 0"),
    ],
)
def test_columns_of_another_kind_are_refused_by_name(tmp_path, column, values, message):
    file = tiny.write(tmp_path / "a.parquet", {**tiny.rows(3), column: values})
    with pytest.raises(ValueError, match=message):
        open_pairs(config(file), "train")


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_of_few_rows_every_split_gets_one(tmp_path, count):
    file = tiny.write(tmp_path / "a.parquet", tiny.rows(count))
    found = [len(open_pairs(config(file), split)) for split in ("train", "val", "test")]
    assert found == [count - 2, 1, 1]
