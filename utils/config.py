"""Typed configuration: nested dataclasses whose values come from YAML and the command line.

    cfg = load(TrainConfig, flags={"lr": "optimizer.params.lr"}, default="configs/train.yaml")
    python train.py --config my.yaml --lr 2e-4 training.epochs=3

Later values win: dataclass defaults, then the file, then the command line from left to right.
"""

import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from utils.yaml_text import Dumper, parse_yaml, read_yaml

Config = TypeVar("Config")
RUN_FLAGS = {"resume": "run.resume", "dry_run": "run.dry_run"}
MISSING = dataclasses.MISSING
UNIONS = (Union, types.UnionType)
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
MOST = 2**64  # of whole numbers
ARGV = "on the command line"


def load(
    cls: type[Config],
    argv: list[str] | None = None,
    flags: dict[str, str] | None = None,
    default: str | None = None,
) -> Config:
    """The configuration of one script: a `cls` from a YAML file and the command line.

    Args:
        argv: arguments without the program's name; None: those of this process.
        flags: short flag -> dotted key, {"lr": "optimizer.params.lr"}. A key of type bool gives the
            pair --flag and --no_flag. Flags whose key `cls` lacks are not offered, so that one
            table may serve all scripts.
        default: the file to read where --config is not given; None: only the defaults of `cls`.

    Raises:
        ValueError: a key, flag or value that `cls` cannot take; says which, where, and what it can.
        OSError: the file cannot be read.
        SystemExit: after -h.
    """
    return from_dict(cls, *given(cls, argv, flags, default))


def given(
    cls: type,
    argv: list[str] | None = None,
    flags: dict[str, str] | None = None,
    default: str | None = None,
) -> tuple[dict, str]:
    """What `load` reads before defaults fill it up, and where it is from; the same arguments."""
    argv = sys.argv[1:] if argv is None else argv
    known = {key: hint for key, hint, _ in keys(cls)}
    flags = {f: key for f, key in {**RUN_FLAGS, **(flags or {})}.items() if key in known}
    if "-h" in argv or "--help" in argv:
        print(_help(cls, flags, default))
        raise SystemExit(0)

    file, assignments = _read_argv(argv, flags, known)
    file = file or default
    raw = read_yaml(file) if file else {}
    try:
        for key, text in assignments:
            raw = _assign(cls, raw, key.split("."), text, key, MISSING)
    except _UnknownKeyError as error:
        raise ValueError(error.explain(cls)) from None
    return raw, f"in {file}" if file else ARGV


def from_dict(cls: type[Config], raw: dict, where: str = "in the configuration") -> Config:
    """Build a `cls` from plain values, as `to_dict` made them or YAML gave them.

    Raises:
        ValueError: unknown or missing key, or a value of the wrong type; `where` is quoted.
    """
    try:
        return _convert(cls, raw, "", where)
    except _UnknownKeyError as error:
        raise ValueError(error.explain(cls)) from None


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


def keys(cls: type, prefix: str = "", default: Any = MISSING) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, default) of every value in `cls`; MISSING where one must be given."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint, value = prefix + field.name, hints[field.name], _default(field, default)
        if section := _section(hint):
            yield from keys(section, name + ".", value)
        else:
            yield name, hint, value


# the command line


def _read_argv(
    argv: list[str], flags: dict[str, str], known: dict[str, Any]
) -> tuple[str | None, list[tuple[str, str]]]:
    """-> (file after --config or None, [(dotted key, text)] in the order given)."""
    file, assignments, tokens = None, [], iter(argv)
    switches = {
        prefix + flag: (key, text)
        for flag, key in flags.items()
        if known[key] is bool
        for prefix, text in (("", "true"), ("no_", "false"))
    }
    valued = {"config": None, **{f: key for f, key in flags.items() if known[key] is not bool}}
    for token in tokens:
        name, equals, text = token.partition("=")
        flag = name[2:].replace("-", "_")
        if not name.startswith("--"):
            if not equals:
                raise ValueError(f"cannot read {token!r}; write section.key=value or --flag value")
            assignments.append((name, text))
        elif flag in switches:
            if equals:
                raise ValueError(f"{name} takes no value; there are --flag and --no_flag")
            assignments.append(switches[flag])
        elif flag in valued:
            text = text if equals else next(tokens, "--")
            if text.startswith("--"):
                raise ValueError(f"{name} needs a value")
            if (key := valued[flag]) is None:  # --config
                file = text
            else:
                assignments.append((key, text))
        else:
            nearest = _nearest(flag, [*switches, *valued])
            hint = f"write {flag}=VALUE" if flag in known else f"did you mean --{nearest}?"
            raise ValueError(f"unknown flag {name}; {hint}")
    return file, assignments


def _assign(hint: Any, raw: Any, path: list[str], text: str, key: str, default: Any) -> Any:
    """`raw`, plain values for the type `hint`, with `text` put in at `path` below it."""
    if not path:
        return _from_text(hint, text, key)
    section, mapping = _section(hint), _mapping(hint)
    name, *rest = path
    if section:
        fields = {field.name: field for field in dataclasses.fields(section)}
        if name not in fields:
            raise _UnknownKeyError(key, ARGV)
        default = _default(fields[name], default)
        below = get_type_hints(section)[name]
    elif mapping:
        if raw is None and default is not MISSING:
            raw = to_dict(default)  # the other entries stay
        name, below, default = _from_text(mapping[0], name, key), mapping[1], MISSING
    else:
        raise _UnknownKeyError(key, ARGV)
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
    try:
        return to_dict(_convert(hint, value, key, ARGV))
    except ValueError:
        nested = isinstance(value, (dict, list)) and any(map(get_origin, members))
        if str not in members or nested:
            raise
        return text  # `name=007` is text, not the number 7


def _help(cls: type, flags: dict[str, str], default: str | None) -> str:
    types = {key: hint for key, hint, _ in keys(cls)}
    raw = read_yaml(default) if default and Path(default).is_file() else {}
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE] [--flag VALUE] [section.key=value]",
        "",
        f"  {'--config FILE':34} default: {default or 'none, only the values below'}",
    ]
    for flag, key in flags.items():
        shown = f"--{flag} / --no_{flag}" if types[key] is bool else f"--{flag} VALUE"
        lines.append(f"  {shown:34} sets {key}")
    lines += ["", f"keys (type) = value{f' in {default}' if raw else ''}"]
    for key, hint, value in keys(cls):
        found = raw
        for name in key.split("."):
            found = found.get(name, dataclasses.MISSING) if isinstance(found, dict) else value
        value = value if found is dataclasses.MISSING else to_dict(found)
        shown = "(must be given)" if value is dataclasses.MISSING else repr(to_dict(value))
        lines.append(f"  {key} ({type_name(hint)}) = {shown}")
    return "\n".join(lines)


# values


def _convert(hint: Any, value: Any, key: str, where: str, default: Any = MISSING) -> Any:
    """`value` as the type `hint`, or ValueError naming the key, what was expected, what came."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, key, where, default)
    if origin in UNIONS:
        return _convert_union(args, hint, value, key, where, default)
    if origin is Literal and value in args and type(value) in {type(a) for a in args}:
        return value
    if origin is dict and isinstance(value, dict):
        return {
            _convert(args[0], k, f"{key}.{k}", where): _convert(args[1], v, f"{key}.{k}", where)
            for k, v in value.items()
        }
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(args[0], v, f"{key}[{i}]", where) for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)):
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(each) == len(value):
            return tuple(
                _convert(a, v, f"{key}[{i}]", where) for i, (a, v) in enumerate(zip(each, value))
            )
    simple = _simple(hint, value)
    if hint is float and simple is not None and not math.isfinite(simple):
        raise ValueError(f"{key} {where}: expected a finite number, got {value}")
    if simple is not None or (hint in (None, type(None)) and value is None):
        return simple
    got = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
    raise ValueError(f"{key or 'the whole'} {where}: expected {type_name(hint)}, got {got}")


def _simple(hint: Any, value: Any) -> Any:
    """`value` as bool, int, float, str or Path; None where it is none. 1e-4 may come as text."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool and isinstance(value, str):
        return WORDS.get(value.lower())
    if hint in (int, float) and isinstance(value, str):
        try:
            return _simple(hint, float(value))
        except ValueError:
            return None
    if number and not abs(value) < MOST and hint is int:
        return None  # also infinity and NaN
    if hint is int and number and value == value // 1:
        return int(value)
    if hint is float and number:
        return float(value) if abs(value) < 10**308 or isinstance(value, float) else None
    if hint is Path and isinstance(value, str):
        return Path(value)
    return value if hint in (bool, str, Path) and isinstance(value, hint) else None


def _convert_union(args: tuple, hint: Any, value: Any, key: str, where: str, default: Any) -> Any:
    """The first member that takes the value unchanged, else the first that takes it at all."""
    taken = []
    for arg in args:
        try:
            taken.append(_convert(arg, value, key, where, default))
        except ValueError:
            if _section(arg) and isinstance(value, dict):
                raise  # says which key of the section is wrong
    for result in taken:
        if type(result) is type(value):
            return result
    if taken:
        return taken[0]
    raise ValueError(
        f"{key} {where}: expected {type_name(hint)}, got {value!r} ({type(value).__name__})"
    )


def _build(cls: Any, raw: dict, prefix: str, where: str, default: Any) -> Any:
    """A dataclass from a mapping; what the mapping lacks comes from `default` or the class."""
    hints, values = get_type_hints(cls), {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in raw:
        if name not in fields:
            raise _UnknownKeyError(f"{prefix}.{name}" if prefix else str(name), where)
    for name, field in fields.items():
        key = f"{prefix}.{name}" if prefix else name
        fallback = _default(field, default)
        if name in raw:
            values[name] = _convert(hints[name], raw[name], key, where, fallback)
        elif fallback is not MISSING:
            values[name] = fallback
        elif section := _section(hints[name]):
            values[name] = _build(section, {}, key, where, MISSING)
        else:
            raise ValueError(f"missing key {key} {where}: expected {type_name(hints[name])}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{prefix or 'the values'} {where}: {error}") from error


# types


def _section(hint: Any) -> Any:
    """The dataclass that `hint` is, or may be (`Section | None`)."""
    found = [arg for arg in (hint, *get_args(hint)) if dataclasses.is_dataclass(arg)]
    return found[0] if len(found) == 1 and get_origin(hint) in (None, *UNIONS) else None


def _mapping(hint: Any) -> tuple[Any, Any] | None:
    """(key type, value type) where `hint` is a dict, or may be."""
    for arg in (hint, *get_args(hint)):
        if get_origin(arg) is dict:
            return get_args(arg)
    return None


def _default(field: dataclasses.Field, of: Any = MISSING) -> Any:
    """The field's value in the instance `of`, or without one the default of its class."""
    if dataclasses.is_dataclass(of):
        return getattr(of, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def type_name(hint: Any) -> str:
    """A type in words: `int or list of int`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return " or ".join(type_name(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"list of {type_name(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} ({', '.join(type_name(arg) for arg in args)})"
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a section of keys"
    return {bool: "true or false", str: "text", Any: "anything"}.get(hint, hint.__name__)


# errors


class _UnknownKeyError(Exception):
    def __init__(self, key: str, where: str):
        super().__init__(key, where)
        self.key, self.where = key, where

    def explain(self, cls: type) -> str:
        valid = [key for key, _, _ in keys(cls)]
        sections = {key.rsplit(".", n)[0] for key in valid for n in range(1, key.count(".") + 1)}
        nearest = _nearest(self.key, [*valid, *sections])
        return f"unknown key {self.key} {self.where}; did you mean {nearest}?"


def _nearest(name: str, valid: list[str]) -> str:
    """The most similar of `valid`; one that differs only in its section is taken first."""

    def similarity(other: str) -> float:
        same = other.rpartition(".")[2] == name.rpartition(".")[2]
        return same + difflib.SequenceMatcher(None, name, other).ratio()

    return max(sorted(valid), key=similarity)
