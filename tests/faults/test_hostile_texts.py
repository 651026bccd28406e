"""Configurations and manifests made to break the reader: one sentence, in bounded time.

pytest tests/faults/test_hostile_texts.py
"""

import json
import os
import threading
from dataclasses import dataclass

import pytest

from data import manifest
from utils import config
from utils.yaml_text import read_yaml


@dataclass(kw_only=True)
class Small:
    count: int = 1
    scale: float = 1.0
    name: str = ""


HOSTILE = {
    "digits": "scale: " + "9" * 400,
    "digits of an int": "count: " + "9" * 5000,
    "hexadecimal": "scale: 0x" + "f" * 400,
    "tag": "count: !!python/object/apply:os.system [ls]",
    "int tag": "count: !!int x",
    "timestamp tag": "count: !!timestamp x",
    "binary tag": "count: !!binary é",
    "float tag": "scale: !!float x",
    "nested": "count: " + "[" * 3000 + "]" * 3000,
    "nested in blocks": "\n".join(" " * i + "a:" for i in range(2000)),
    "key of a list": "? [a]\n: 1",
    "aliases": "a0: &a0 [1]\n"
    + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
    "infinite": "count: .inf",
    "not a number": "count: .nan",
    "large": "# " + "x" * 2**21,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_configuration_is_one_sentence(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.yaml") as said:
        config.load(Small, ["--config", str(tmp_path / "a.yaml")])
    assert len(str(said.value)) < 2000


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "!!int x", "[" * 3000, ".inf", ".nan"])
def test_a_hostile_value_on_the_command_line_is_one_sentence(text):
    with pytest.raises(ValueError, match="count"):
        config.load(Small, [f"count={text}"])


def test_devices_and_pipes_are_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        said = []

        def read(path=path, said=said):
            try:
                read_yaml(path)
            except ValueError as error:
                said.append(str(error))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(5)
        assert said and "not a file" in said[0]


WINDOW = {"low": 0, "high": 1, "unit": "C"}
GOOD = {
    "version": 1,
    "window": WINDOW,
    "splits": {"train": {}},
    "shards": [{"file": "a", "bytes": 1}],
}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"version": ' + "9" * 5000 + "}",
        json.dumps({**GOOD, "window": 3}),
        json.dumps({**GOOD, "window": {**WINDOW, "low": "a"}}),
        json.dumps({**GOOD, "window": {**WINDOW, "high": 10**400}}),
        json.dumps({**GOOD, "splits": [1]}),
        json.dumps({**GOOD, "splits": {"train": 3}}),
        json.dumps({**GOOD, "shards": 3}),
        json.dumps({**GOOD, "shards": [3]}),
        json.dumps({**GOOD, "shards": [{"bytes": 1}]}),
        json.dumps({**GOOD, "shards": [{"file": "a", "bytes": None}]}),
        json.dumps({**GOOD, "table": "none of ours"}),
        json.dumps({**GOOD, "table": ["msrs"]}),
    ],
    ids=range(13),
)
def test_a_manifest_of_wrong_types_is_one_sentence(text):
    with pytest.raises(ValueError, match=r"set/manifest\.json"):
        manifest.parse(text, "set/manifest.json")
