"""The keys of a configuration, their types in words, and their comments."""

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

MISSING = dataclasses.MISSING
UNIONS = (Union, types.UnionType)


class Key(NamedTuple):
    """One value of a configuration."""

    name: str  # dotted: optimizer.params.lr
    hint: Any  # its type
    default: Any  # MISSING where one must be given
    doc: str  # the comment at its field


def keys(cls: type, prefix: str = "", default: Any = MISSING) -> Iterator[Key]:
    """Every value in the dataclass `cls`, those of its sections too."""
    hints, docs = get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        name, hint, value = prefix + field.name, hints[field.name], default_of(field, default)
        if section := section_of(hint):
            yield from keys(section, name + ".", value)
        else:
            yield Key(name, hint, value, docs.get(field.name, ""))


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of `cls` itself, whose name is empty, and of every section."""
    yield prefix, cls
    for name, hint in get_type_hints(cls).items():
        if section := section_of(hint):
            yield from sections(section, f"{prefix}.{name}" if prefix else name)


def section_of(hint: Any) -> Any:
    """The dataclass that `hint` is, or may be (`Section | None`)."""
    found = [arg for arg in (hint, *get_args(hint)) if dataclasses.is_dataclass(arg)]
    return found[0] if len(found) == 1 and get_origin(hint) in (None, *UNIONS) else None


def mapping_of(hint: Any) -> tuple[Any, Any] | None:
    """(key type, value type) where `hint` is a dict, or may be."""
    for arg in (hint, *get_args(hint)):
        if get_origin(arg) is dict:
            return get_args(arg)
    return None


def default_of(field: dataclasses.Field, of: Any = MISSING) -> Any:
    """The field's value in the instance `of`, or without one the default of its class."""
    if dataclasses.is_dataclass(of):
        return getattr(of, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def choices(hint: Any) -> list[str]:
    """The words that a value can be, as they are typed; [] where it can be others too."""
    if get_origin(hint) in UNIONS:
        each = [choices(arg) for arg in get_args(hint)]
        return [word for words in each for word in words] if all(each) else []
    if get_origin(hint) is Literal:
        return [str(arg) for arg in get_args(hint)]
    return {bool: ["true", "false"], type(None): ["null"]}.get(hint, [])


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


@cache
def comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass: above it, and behind it on its own lines."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _comments_in(textwrap.dedent(inspect.getsource(base)))
    return found


def _comments_in(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    alone = {i for i, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            while first - 1 in alone:
                first -= 1
            words = [texts[i] for i in range(first, last + 1) if i in texts]
            found[node.target.id] = " ".join(words)
    return found


def unknown_key(key: str, where: str, cls: type) -> tuple[str, str]:
    """(the sentence about a key that `cls` lacks, the nearest that it has)."""
    valid = [known.name for known in keys(cls)]
    above = {name.rsplit(".", n)[0] for name in valid for n in range(1, name.count(".") + 1)}
    near = nearest(key, [*valid, *above])
    return f"unknown key {key} {where}; did you mean {near}?", near


def nearest(name: str, valid: list[str]) -> str:
    """The most similar of `valid`; one that differs only in its section is taken first."""

    def similarity(other: str) -> float:
        same = other.rpartition(".")[2] == name.rpartition(".")[2]
        return same + difflib.SequenceMatcher(None, name, other).ratio()

    return max(sorted(valid), key=similarity)
