"""manifest.json beside the shards: columns, window, classes, and the splits with hashes."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from data.materials import TABLES

VERSION = 1
KEY = "thermaflux"  # of the schema's metadata of a shard: window and planck
MOST = 1e30  # of a window, in any unit
SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_name(word: str, where: str) -> str:
    """'validation' and other spellings to train, val or test."""
    if word not in SPLIT_ALIASES:
        raise ValueError(f"{where}: unknown split '{word}', expected train, val or test")
    return SPLIT_ALIASES[word]


def in_blocks(total: int, fractions: list[float], names: list[str]) -> np.ndarray:
    """(total,) split of each row in contiguous blocks; with few rows, one for each wanted split."""
    ends = np.round(np.cumsum(fractions) / np.sum(fractions) * total).astype(int)
    counts, wanted = np.diff(ends, prepend=0), np.array(fractions) > 0
    if total >= wanted.sum():
        for empty in np.flatnonzero(wanted & (counts == 0)):
            counts[counts.argmax()] -= 1
            counts[empty] = 1
    return np.repeat(np.array(names, dtype="U5"), counts)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(rows: Iterable[tuple[str, str, str]]) -> str:
    """One hash of (source, name, row hash) in any order: equal digests mean equal splits."""
    lines = sorted(f"{source}/{name} {row}" for source, name, row in rows)
    return sha256("\n".join(lines).encode())


def dump(manifest: dict) -> str:
    return json.dumps({"version": VERSION, **manifest}, indent=1) + "\n"


def parse(text: str, where: str) -> dict:
    """Raises: ValueError: not JSON, of another version, or without window, splits and shards."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of 5000 digits, or nested too deep
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise ValueError(f"{where}: manifest version {found}, this code reads version {VERSION}")
    for key in ("window", "splits", "shards"):
        if key not in manifest:
            raise ValueError(f"{where}: no '{key}' in the manifest; run prepare.py again")
    if wrong := _wrong_type(manifest):
        raise ValueError(f"{where}: {wrong}; run prepare.py again")
    return manifest


def _wrong_type(manifest: dict) -> str | None:
    """What of window, splits and shards is not of the type that `dump` wrote, or None."""
    if wrong := wrong_window(manifest["window"]):
        return wrong
    if not isinstance(manifest["splits"], dict):
        return "'splits' is not a mapping"
    if not all(isinstance(split, dict) for split in manifest["splits"].values()):
        return "'splits' holds other things than mappings"
    shards = manifest["shards"]
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return "'shards' is not a list of mappings"
    if not all(isinstance(s.get("file"), str) and type(s.get("bytes")) is int for s in shards):
        return "'shards' does not say the name and bytes of each file"
    if (table := manifest.get("table")) is not None and table not in list(TABLES):
        return f"'table' is {table!r:.40}, none of {', '.join(TABLES)}"
    return None


def wrong_window(window: object) -> str | None:
    """What is wrong with a stored window, or None."""
    if not isinstance(window, dict) or not isinstance(window.get("unit"), str):
        return "'window' is not low, high and unit"
    for name in ("low", "high"):
        value = window.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST:
            return f"'window' has no finite number '{name}'"
    return None
