"""YAML as people write it: safe, without duplicate keys; `no` is a word and 1e-4 a number."""

import re
from pathlib import Path
from typing import Any

import yaml

from utils.files import read_limited

MOST_BYTES = 2**20  # of a file
DEEPEST = 40  # lists and mappings within each other
MOST_ALIASES = 20  # in a file: some dozens can stand for a billion values
MOST_DIGITS = 300  # of a number; a float holds 308


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Only plain values; a key given twice is refused.

    Raises:
        ValueError: not YAML, not a mapping, or beyond the limits above. OSError: cannot be read.
    """
    data = read_limited(path, MOST_BYTES)
    try:
        raw = parse_yaml(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict | None):
        raise ValueError(f"{path} must hold `section: values`, got {type(raw).__name__}")
    return raw or {}


def parse_yaml(text: str) -> Any:
    """The plain value of a YAML text. Raises: ValueError: not YAML, or beyond the limits above."""
    try:
        depth = aliases = 0
        for event in yaml.parse(text, Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            aliases += isinstance(event, yaml.AliasEvent)
            if aliases > MOST_ALIASES:
                raise ValueError(f"more than {MOST_ALIASES} aliases")
        return yaml.load(text, Loader)
    except ValueError:
        raise
    except Exception as error:  # SafeLoader raises several types at tags that do not fit
        raise ValueError(f"{type(error).__name__}: {error}") from error


class Loader(yaml.SafeLoader):
    """Safe YAML in which `no` and `off` are text, 1e-4 is a number and no key may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        names = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in names:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(str(node.value)) > MOST_DIGITS:
            raise ValueError(
                f"a number of {len(node.value)} digits, at most {MOST_DIGITS} are read"
            )
        return super().construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


class Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or `Loader` would read as something else."""


# YAML 1.1 reads `mixed_precision: no` as false, 12:30 as 750 and 1e-4 as text; 1.2 does not
_RULES = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _RULES.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )
