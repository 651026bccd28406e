"""manifest.json beside the shards: columns, window, classes, and the splits with hashes."""

import hashlib
import json
from collections.abc import Iterable

VERSION = 1
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
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise ValueError(f"{where}: manifest version {found}, this code reads {VERSION}")
    for key in ("window", "splits", "shards"):
        if key not in manifest:
            raise ValueError(f"{where}: no '{key}' in the manifest; run prepare.py again")
    return manifest
