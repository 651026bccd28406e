"""Typed configuration: nested dataclasses whose values come from YAML and the command line.

    cfg = load(TrainConfig, flags={"lr": "optimizer.params.lr"}, default="configs/train.yaml")
    python train.py --config my.yaml --lr 2e-4 training.epochs=3

Later values win: dataclass defaults, then the file, then the command line from left to right.
All errors are reported at once: unknown keys and flags, values of a wrong type or out of range,
contradictions, missing files (utils/problems.py has the two checks of a dataclass). EXCLUSIVE of a
dataclass names keys of which one replaces the others.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from utils import command_line
from utils.config_types import MISSING, UNIONS, default_of, keys, mapping_of, section_of, sections
from utils.config_values import Builder
from utils.problems import refuse, sentences_of
from utils.yaml_text import Dumper, parse_yaml, read_yaml

Config = TypeVar("Config")
RUN_FLAGS = {"resume": "run.resume", "dry_run": "run.dry_run"}
ARGV = "on the command line"


def load(
    cls: type[Config],
    argv: list[str] | None = None,
    flags: dict[str, str] | None = None,
    default: str | None = None,
    starts: bool = True,
) -> Config:
    """The configuration of one script: a `cls` from a YAML file and the command line.

    Args:
        argv: arguments without the program's name; None: those of this process.
        flags: short flag -> dotted key, {"lr": "optimizer.params.lr"}. A key of type bool gives the
            pair --flag and --no_flag. Flags whose key `cls` lacks are not offered, so that one
            table may serve all scripts.
        default: the file to read where --config is not given; None: only the defaults of `cls`.
        starts: the script starts now, so that files it needs must be there (`Checked.obstacles`).

    Raises:
        Problems (a ValueError): every key, flag, value and file that cannot be used; says which,
            where, and what can.
        SystemExit: after -h and --completion.
    """
    source = _Source(cls, argv, flags, default)
    builder = Builder(cls, source.where)
    builder.found, builder.unread = source.found, source.unread
    if source.found and source.raw is None:  # what the file says is not known
        refuse(source.found)
    cfg = builder.build(cls, source.raw or {}, "")
    if starts and not builder.incomplete:
        for prefix, section in _instances(cfg):
            if hasattr(section, "obstacles"):
                builder.found += builder.understood(section.obstacles(), prefix)
    refuse(builder.found)
    return cfg


def given(
    cls: type,
    argv: list[str] | None = None,
    flags: dict[str, str] | None = None,
    default: str | None = None,
) -> dict:
    """The values of file and command line that `load` fills up with defaults.

    Raises: Problems: as `load`.
    """
    source = _Source(cls, argv, flags, default)
    refuse(source.found)
    return source.raw or {}


def from_dict(cls: type[Config], raw: dict, where: str = "in the configuration") -> Config:
    """Build a `cls` from plain values, as `to_dict` made them or YAML gave them.

    Raises: Problems (a ValueError): unknown or missing keys, and values that cannot be; `where` is
        quoted.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a mapping of keys to values, got {raw!r:.40}")
    builder = Builder(cls, lambda key: where)
    cfg = builder.build(cls, raw, "")
    refuse(builder.found)
    return cfg


def to_dict(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, paths as text: what YAML and checkpoints can hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(cfg: Any) -> str:
    """The resolved configuration as YAML text that `load` reads back to the same values."""
    return yaml.dump(to_dict(cfg), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _instances(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, instance) of the sections of a configuration, itself the last."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            yield from _instances(value, f"{prefix}.{field.name}" if prefix else field.name)
    yield prefix, cfg


class _Source:
    """Plain values from the file and the command line, and what is wrong with them.

    raw: what `from_dict` takes; None: the file cannot be read. unread: see Builder.
    """

    def __init__(self, cls: type, argv: list[str] | None, flags: Any, default: str | None):
        argv = sys.argv[1:] if argv is None else argv
        known = {key.name: key.hint for key in keys(cls)}
        flags = {f: key for f, key in {**RUN_FLAGS, **(flags or {})}.items() if key in known}
        command_line.answer(cls, argv, flags, default)
        typed = command_line.read(argv, flags, known)
        self.cls, self.file = cls, typed.file or default
        self.found = typed.found
        self.unread: list[str] = []
        self.typed = [key for key, _ in typed.assignments]
        self.raw: dict | None = {}
        if self.file:
            try:
                self.raw = read_yaml(self.file)
            except (ValueError, OSError) as error:
                self.raw = None
                missing = isinstance(error, FileNotFoundError)
                self.found.append(f"--config {self.file}: no such file" if missing else str(error))
        raw = self.of_file = self.raw or {}
        for key, text in typed.assignments:
            raw = self._assigned(raw, key, text)
        if self.raw is not None:
            self.raw = self._without_replaced(raw)

    def where(self, key: str) -> str:
        """Where the value of a key or section comes from; '': the whole."""
        below = f"{key}." if key else ""
        typed = [t for t in self.typed if t.startswith(below) or f"{key}.".startswith(f"{t}.")]
        exact = any(f"{key}.".startswith(f"{t}.") for t in typed)
        if exact or not self.file or (typed and not self._in_file(key)):
            return ARGV
        return f"in {self.file}" + (f" and {ARGV}" if typed else "")

    def _in_file(self, key: str) -> bool:
        found: Any = self.of_file
        for name in key.split(".") if key else []:
            found = found.get(name) if isinstance(found, dict) else None
        return bool(found)

    def _assigned(self, raw: dict, key: str, text: str) -> dict:
        """`raw` with a value of the command line put in, unless it cannot be."""
        try:
            return _assign(self.cls, raw, key.split("."), text, key, MISSING)
        except _UnknownKeyError:
            builder = Builder(self.cls, lambda key: ARGV)
            builder.add_unknown(key)
            self.found += builder.found
            self.unread += builder.unread
        except ValueError as error:
            self.found += sentences_of(error)
            self.unread.append(key)
        return raw

    def _without_replaced(self, raw: dict) -> dict:
        """`raw` without the file's values that exclude one which was typed."""
        for prefix, section in sections(self.cls):
            group = getattr(section, "EXCLUSIVE", ())
            path = prefix.split(".") if prefix else []
            values: Any = raw
            for name in path:
                values = values.get(name) if isinstance(values, dict) else None
            if not isinstance(values, dict):
                continue
            names = {f"{prefix}.{name}": name for name in group}
            chosen = [k for k, n in names.items() if k in self.typed and values.get(n) is not None]
            if len(chosen) > 1:
                self.found.append(f"{' and '.join(chosen)} {ARGV}: one excludes the other")
                self.unread += chosen
            elif chosen:
                for key in names.keys() - set(self.typed):
                    values.pop(names[key], None)
        return raw


# values of the command line


class _UnknownKeyError(Exception):
    pass


def _assign(hint: Any, raw: Any, path: list[str], text: str, key: str, default: Any) -> Any:
    """`raw`, plain values for the type `hint`, with `text` put in at `path` below it."""
    if not path:
        return _from_text(hint, text, key)
    section, mapping = section_of(hint), mapping_of(hint)
    name, *rest = path
    if section:
        fields = {field.name: field for field in dataclasses.fields(section)}
        if name not in fields:
            raise _UnknownKeyError(key)
        default = default_of(fields[name], default)
        below = get_type_hints(section)[name]
    elif mapping:
        if raw is None and default is not MISSING:
            raw = to_dict(default)  # the other entries stay
        name, below, default = _from_text(mapping[0], name, key), mapping[1], MISSING
    else:
        raise _UnknownKeyError(key)
    if raw is not None and not isinstance(raw, dict):
        return raw  # wrong in the file: reported with it
    return {**(raw or {}), name: _assign(below, (raw or {}).get(name), rest, text, key, default)}


def _from_text(hint: Any, text: str, key: str) -> Any:
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    members = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    if isinstance(value, str) and str in members and not text.startswith(("'", '"')):
        value = text  # also with " #" in it
    builder = Builder(hint, lambda key: ARGV, checks=False)
    try:
        made = to_dict(builder.convert(hint, value, key))
        refuse(builder.found)
        return made
    except ValueError:
        nested = isinstance(value, (dict, list)) and any(map(get_origin, members))
        if str not in members or nested:
            raise
        return text  # `name=007` is text, not the number 7
