"""Damaged, foreign and misnamed checkpoints: passed over and named, or one sentence.

pytest tests/faults/test_damaged_checkpoints.py    FAULTS=20000 asks for more damaged files
"""

import os
import random
import zipfile

import pytest
import torch

from assembly import checkpoints
from configs import schema
from utils import checkpoint, config

CASES = int(os.environ.get("FAULTS", 400))


def parts_of(value=1.0):
    return {"model": {"weight": torch.full((50,), value), "bias": torch.arange(3.0)}}


@pytest.fixture
def two(tmp_path):
    old, new = (tmp_path / f"checkpoint_{step:08d}.pth" for step in (9, 10))
    checkpoint.save(old, parts_of())
    checkpoint.save(new, parts_of(2.0))
    return old, new


def refused(path):
    with pytest.raises(ValueError, match=path.name) as said:
        checkpoint.load(path)
    assert "\n" not in str(said.value)


def test_every_flipped_bit_cut_and_added_byte_is_found(two):
    _, new = two
    whole, chance = new.read_bytes(), random.Random(0)
    for case in range(CASES):
        data = bytearray(whole)
        where = chance.randrange(len(data)) if case % 2 else len(data) - 1 - case // 2 % 200
        kind = case % 8
        if kind == 0:
            del data[where:]
        elif kind == 2:
            data += bytes([chance.randrange(256)] * (1 + case % 50))
        else:
            data[where] ^= 1 << chance.randrange(8)
        new.write_bytes(data)
        assert checkpoint.damaged(new), f"case {case}: byte {where}"
        refused(new)


def test_damage_to_a_file_without_a_hash_is_said_or_changes_no_value(two, capsys):
    old, new = two
    torch.save(parts_of(2.0), new)
    assert checkpoint.latest(old.parent) == new  # today's files are still read
    whole, chance = new.read_bytes(), random.Random(1)
    for _ in range(CASES):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        new.write_bytes(data)
        found = checkpoint.latest(old.parent)
        if found == new:
            model = checkpoint.load(new)["model"]
            assert all(torch.equal(model[k], v) for k, v in parts_of(2.0)["model"].items())
        else:
            assert found == old and f"passing over {new}" in capsys.readouterr().out
            refused(new)


# bytes of an entry in the zip's directory: (offset, value), as the zip format numbers them
COMPRESSED = [(10, 8)]
FOLDER = [(38, 16)]
TWO_SIZES = [(12, 1), (24, 201)]  # torch compares them only where the time is 0


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
@pytest.mark.parametrize(
    "changes", [COMPRESSED, FOLDER, TWO_SIZES], ids=["compressed", "folder", "sizes"]
)
def test_a_part_that_torch_would_not_read_is_refused(two, part, changes):
    _, new = two
    torch.save(parts_of(2.0), new)
    data = bytearray(new.read_bytes())
    name = f"{new.stem}/{part}".encode()
    entry = data.rindex(b"PK\1\2", 0, data.rindex(name))
    for offset, value in changes:
        data[entry + offset] = value
    new.write_bytes(data)
    assert checkpoint.damaged(new) == f"its entry for {name.decode()!r} is not as torch writes it"
    refused(new)


def test_a_line_break_in_the_name_of_a_part_stays_one_sentence(two):
    _, new = two
    torch.save(parts_of(2.0), new)
    new.write_bytes(new.read_bytes().replace(b"/data/0", b"/data/\n"))
    with zipfile.ZipFile(new) as archive:  # names agree, so the sum of the part is looked at
        where = archive.getinfo(f"{new.stem}/data/\n").header_offset
    data = bytearray(new.read_bytes())
    data[where + 150] ^= 1  # inside the 50 numbers behind its header
    new.write_bytes(data)
    assert "checksum of" in checkpoint.damaged(new)
    refused(new)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("data"),
        lambda raw: raw.update(data=None),
        lambda raw: raw.update(model=None),
        lambda raw: raw.update(model=3),
    ],
    ids=["no data", "data is nothing", "model is nothing", "model is a number"],
)
def test_a_checkpoint_whose_configuration_lacks_a_section_is_one_sentence(tmp_path, change):
    raw = config.to_dict(schema.TrainConfig())
    change(raw)
    checkpoint.save(tmp_path / "a.pth", {**parts_of(), "config": raw})
    with pytest.raises(ValueError, match="a.pth holds no configuration"):
        checkpoints.read(tmp_path / "a.pth")


def test_a_checkpoint_that_lacks_half_of_its_prompt_is_one_sentence(tmp_path):
    model = {"prompt.tokens": torch.zeros(4, 64)}
    raw = config.to_dict(schema.TrainConfig())
    checkpoint.save(tmp_path / "a.pth", {"model": model, "config": raw})
    with pytest.raises(ValueError, match="a.pth holds no prompt embedding: it lacks prompt.pooled"):
        checkpoints.load_translator(tmp_path / "a.pth", torch.device("cpu"))


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.parent / "nowhere"),
        lambda path: os.mkfifo(path),
        foreign_zip,
        lambda path: torch.save({"weight": torch.zeros(1)}, path),
        lambda path: torch.save({"model": {"weight": "text"}}, path),
        lambda path: torch.save([1, 2], path),
    ],
    ids=["folder", "dangling", "fifo", "foreign_zip", "no_model", "no_tensor", "list"],
)
def test_another_thing_of_that_name_is_passed_over_and_named(two, capsys, put):
    old, new = two
    new.unlink()
    put(new)
    assert checkpoint.latest(old.parent) == old
    assert f"passing over {new}" in capsys.readouterr().out
    refused(new)
    checkpoint.save(old.with_name("checkpoint_00000011.pth"), parts_of(), keep=1)  # and pruned past
