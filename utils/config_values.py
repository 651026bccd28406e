"""Plain values from YAML to typed dataclasses; everything that does not fit is collected."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from utils.config_types import (
    MISSING,
    UNIONS,
    default_of,
    section_of,
    type_name,
    unknown_key,
)
from utils.problems import sentences_of

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
MOST = 2**64  # of whole numbers


class Builder:
    """Builds a dataclass and continues after a wrong value, so that one pass finds everything.

    Args:
        root: the whole configuration, for suggestions.
        where: dotted key -> where its value comes from, in words.
        checks: whether the dataclasses' own checks run; off, their values may be incomplete.
    """

    def __init__(self, root: type, where: Callable[[str], str], checks: bool = True):
        self.root, self.where, self.checks = root, where, checks
        self.found: list[str] = []  # sentences
        self.unread: list[str] = []  # keys whose value stands in for one that was not understood
        self.incomplete: list[str] = []  # keys that must be given and are not

    def convert(self, hint: Any, value: Any, key: str, default: Any = MISSING) -> Any:
        """`value` as the type `hint`.

        Raises: ValueError: it cannot be; names the key, what was expected and what came.
        """
        origin, args = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            return self.build(hint, value, key, default)
        if origin in UNIONS:
            return self._convert_union(args, hint, value, key, default)
        if origin is Literal and value in args and type(value) in {type(a) for a in args}:
            return value
        if origin is dict and isinstance(value, dict):
            of_key, of_value = args
            return {
                self.convert(of_key, k, f"{key}.{k}"): self.convert(of_value, v, f"{key}.{k}")
                for k, v in value.items()
            }
        if origin is list and isinstance(value, (list, tuple)):
            return [self.convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
        if origin is tuple and isinstance(value, (list, tuple)):
            each = [args[0]] * len(value) if args[-1] is Ellipsis else args
            if len(each) == len(value):
                pairs = enumerate(zip(each, value))
                return tuple(self.convert(a, v, f"{key}[{i}]") for i, (a, v) in pairs)
        simple = _simple(hint, value)
        if hint is float and simple is not None and not math.isfinite(simple):
            raise ValueError(f"{key} {self.where(key)}: expected a finite number, got {value}")
        if simple is not None or (hint in (None, type(None)) and value is None):
            return simple
        raise self._wrong_type(hint, value, key)

    def _convert_union(self, args: tuple, hint: Any, value: Any, key: str, default: Any) -> Any:
        """The first member that takes the value unchanged, else the first that takes it at all."""
        if (section := section_of(hint)) and isinstance(value, dict):
            return self.build(section, value, key, default)
        taken = []
        for arg in args:
            try:
                taken.append(self.convert(arg, value, key, default))
            except ValueError:
                continue
        for result in taken:
            if type(result) is type(value):
                return result
        if taken:
            return taken[0]
        raise self._wrong_type(hint, value, key)

    def _wrong_type(self, hint: Any, value: Any, key: str) -> ValueError:
        got = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
        return ValueError(
            f"{key or 'the whole'} {self.where(key)}: expected {type_name(hint)}, got {got}"
        )

    def build(self, cls: Any, raw: dict, prefix: str, default: Any = MISSING) -> Any:
        """A `cls` from a mapping; what the mapping lacks comes from `default` or the class.

        What is wrong goes to `found`. The result then has its default in place of a value that was
        not understood, and may be one that `cls` itself would refuse to make.
        """
        hints, values = get_type_hints(cls), {}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in raw:
            if name not in fields:
                self.add_unknown(f"{prefix}.{name}" if prefix else str(name))
        for name, field in fields.items():
            key = f"{prefix}.{name}" if prefix else name
            fallback = default_of(field, default)
            if fallback is not MISSING:
                values[name] = fallback
            elif name not in raw and (section := section_of(hints[name])):
                values[name] = self.build(section, {}, key)
            elif name not in raw:
                self.incomplete.append(key)
                if key not in self.unread:  # else it is there, misspelt
                    expected = type_name(hints[name])
                    self.found.append(f"missing key {key} {self.where('')}: expected {expected}")
            if name in raw:
                try:
                    values[name] = self.convert(hints[name], raw[name], key, fallback)
                except ValueError as error:
                    self.found += sentences_of(error)
                    (self.unread if name in values else self.incomplete).append(key)
        return self._checked(cls, values, prefix)

    def _checked(self, cls: Any, values: dict, prefix: str) -> Any:
        """A `cls` of these values; one that did not pass its checks if they are wrong."""
        if self.checks and not any(_within(key, prefix) for key in self.incomplete):
            try:
                return cls(**values)
            except ValueError as error:
                where = f"{prefix or 'the values'} {self.where(prefix)}"
                self.found += [
                    f"{where}: {sentence}"
                    for sentence in self.understood(sentences_of(error), prefix)
                ]
        made = object.__new__(cls)
        made.__dict__.update(values)
        return made

    def understood(self, sentences: Iterable[str], prefix: str) -> list[str]:
        """Those of the sentences about a section that name no key which was not understood.

        Such a key has been complained about; what it contradicts is known when it is right.
        """
        names = {key.rpartition(".")[2] for key in self.unread if _within(key, prefix)}
        return [s for s in sentences if not names.intersection(re.findall(r"\w+", s))]

    def add_unknown(self, key: str) -> None:
        sentence, near = unknown_key(key, self.where(key), self.root)
        self.found.append(sentence)
        self.unread.append(near)


def _within(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(prefix + ".")


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
