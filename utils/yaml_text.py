"""YAML as people write it: safe, no key twice, `no` is a word and 1e-4 a number."""

import re
from pathlib import Path

import yaml


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Only plain values; a key given twice is refused.

    Raises:
        ValueError: not YAML, or not a mapping. OSError: cannot be read.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict | None):
        raise ValueError(f"{path} must hold `section: values`, got {type(raw).__name__}")
    return raw or {}


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
