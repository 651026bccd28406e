"""From folders of images to matched pairs, and from pairs to splits that share no scene."""

import json
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.heif import HEIF_SUFFIXES
from data.manifest import SPLITS, split_name
from utils.files import read_limited

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy", *HEIF_SUFFIXES)
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # beside the hidden ones
MOST_JSON_BYTES = 2**28  # of a file of splits
FRACTIONS = (0.8, 0.1, 0.1)
SIMILAR = 0.95  # correlation of 16 x 16 thumbnails; video neighbours have 0.99, other scenes < 0.9
# "0111_1716_0000" is frame 0000 of sequence "0111_1716", "set00/V000/I00012" of "set00/V000" and
# "video-57kWW-frame-000816-b6" of "video-57kWW"; "FLIR_00006" has no sequence number.
SEQUENCE = r"^(?:(.*)[_-]frame[_-]\d+.*|(.*\d.*)[_/-][A-Za-z]*\d+[A-Za-z]?)$"


class Item(NamedTuple):
    """The files of one scene; `name` is the path below its folder without the extension."""

    source: str
    name: str
    visible: Path
    infrared: Path
    semantic: Path | None = None

    def where(self) -> str:
        return f"{self.visible.parent.name}/{self.visible.name} of source '{self.source}'"


def plain(name: str) -> str:
    """A name in NFC, so that composed and decomposed accents (as macOS writes them) are equal."""
    return unicodedata.normalize("NFC", name)


def natural(name: str) -> list:
    """Sort key in which frame_10 follows frame_9."""
    return [(1, int(w), w) if w.isdecimal() else (0, 0, w) for w in re.split(r"(\d+)", name) if w]


def image_files(
    folder: Path, suffix: str = "", excluded: tuple[str, ...] = ()
) -> tuple[dict[str, Path], list[Path]]:
    """Images below a folder by name (less `suffix`), and the other files.

    Only names that end in `suffix`, and in none of `excluded`, are candidates.

    Raises: ValueError: no folder, no image, two files of one name.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files: dict = {}
    others: list[Path] = []
    suffix = plain(suffix)
    excluded = tuple(map(plain, excluded))
    for path in _below(folder):
        if path.name.startswith("."):
            continue
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{str(path)!a}: the name is not UTF-8; rename it") from None
        if not path.is_file():
            raise ValueError(f"{path}: a broken link, or not a regular file")
        if path.suffix.lower() not in EXTENSIONS:
            others.append(path)
            continue
        name = plain(path.relative_to(folder).with_suffix("").as_posix())
        if not name.endswith(suffix) or name.endswith(excluded):
            others.append(path)
            continue
        name = name.removesuffix(suffix)
        if name in files:
            raise ValueError(f"{files[name]} and {path} have the same name; names must be unique")
        files[name] = path
    if not files:
        raise ValueError(f"{folder}: no image there ({', '.join(EXTENSIONS)})")
    return files, others


def _below(folder: Path) -> list[Path]:
    """All files below a folder, through links to folders too (each folder once).

    Hidden folders and those that operating systems make are passed over.
    """
    found, seen = [], set()
    for where, names, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = [n for n in names if not n.startswith(".") and n not in SYSTEM_FOLDERS]
        found += [Path(where) / file for file in files]
    return sorted(found)


def _of_the_other(own: Path, other: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """The other side's ending, where both sides share a folder and only the other has one."""
    shared = own.resolve() == other.resolve() and suffixes[1] and not suffixes[0]
    return (suffixes[1],) if shared else ()


def refuse_identical(items: list[Item], hashes: list[tuple[str, str]]) -> None:
    """Raises: ValueError: the visible and the infrared image of a pair are the same file."""
    same = [item for item, (visible, infrared) in zip(items, hashes) if visible == infrared]
    if same:
        raise ValueError(
            f"{len(same)} of {len(items)} pairs have the same image on both sides, first"
            f" {same[0].where()}"
        )


def match(
    source: str,
    visible: Path,
    infrared: Path,
    semantic: Path | None = None,
    suffixes: tuple[str, str, str] = ("", "", ""),
    allow_unmatched: bool = False,
) -> tuple[list[Item], list[str]]:
    """Pairs of equal names in natural order, and notes on what was left out.

    A scene may lack its semantic image. Raises: ValueError: names on one side only, unless
    `allow_unmatched`; no pair at all.
    """
    left, others_left = image_files(
        visible, suffixes[0], _of_the_other(visible, infrared, suffixes)
    )
    right, others_right = image_files(
        infrared, suffixes[1], _of_the_other(infrared, visible, suffixes[1::-1])
    )
    for name in left.keys() & right.keys():
        if left[name].resolve() == right[name].resolve():
            raise ValueError(f"{left[name]} is given as visible and as infrared")
    maps, others_maps = image_files(semantic, suffixes[2]) if semantic else ({}, [])
    both = sorted(left.keys() & right.keys(), key=natural)
    notes = []
    unpaired = {
        "visible without infrared": left.keys() - right.keys(),
        "infrared without visible": right.keys() - left.keys(),
        "semantic without a pair": maps.keys() - set(both),
    }
    for what, names in unpaired.items():
        if names:
            first = ", ".join(sorted(names, key=natural)[:3])
            notes.append(f"source '{source}': {len(names)} {what} (first: {first})")
    if not both:
        raise ValueError(
            f"source '{source}': no name is in both {visible} and {infrared}"
            + "".join(f"; {n}" for n in notes)
        )
    if notes and not allow_unmatched:
        raise ValueError("; ".join(notes) + "; use --allow_unmatched to leave them out")
    if semantic and len(both) > len(maps.keys() & set(both)):
        notes.append(
            f"source '{source}': {len(both) - len(maps.keys() & set(both))} of {len(both)} pairs "
            f"have no semantic image and stay unlabelled"
        )
    used = {*left.values(), *right.values(), *maps.values()}
    if others := sorted({*others_left, *others_right, *others_maps} - used):
        notes.append(
            f"source '{source}': {len(others)} files left out: not images by extension, or without "
            f"the ending given by --suffixes (first: {', '.join(p.name for p in others[:3])})"
        )
    return [Item(source, n, left[n], right[n], maps.get(n)) for n in both], notes


# ---------------------------------------------------------------------------- groups


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H,W) or (H,W,3) to a (256,) float32 signature of unit length, 0 for a flat image."""
    grey: np.ndarray = image.astype(np.float32)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    for axis in (0, 1):  # block means, without the cost of an antialiased resize
        edges = np.linspace(0, grey.shape[axis], 17).astype(int)[:-1]
        count = np.diff([*edges, grey.shape[axis]])
        sums = np.add.reduceat(grey, np.minimum(edges, grey.shape[axis] - 1), axis=axis)
        grey = sums / np.maximum(count, 1).reshape((-1, 1) if axis == 0 else (1, -1))
    grey = grey.ravel() - grey.mean()
    length = float(np.linalg.norm(grey))
    return (grey / length if length > 1e-3 else grey * 0).astype(np.float32)


def check_rule(rule: str) -> None:
    """Raises: ValueError: neither "auto" nor "off" nor a pattern with a group."""
    try:
        groups = rule in ("auto", "off") or re.compile(rule).groups
    except re.error as error:
        raise ValueError(f"--sequences {rule}: not a pattern ({error})") from None
    if not groups:
        raise ValueError(f"--sequences {rule}: the pattern needs a group (...) for the sequence")


def sequence_of(item: Item, rule: str) -> str | None:
    """Sequence key of a name; rule "auto", "off" or a pattern whose group 1 is the sequence."""
    if rule == "off":
        return None
    found = re.match(SEQUENCE if rule == "auto" else rule, item.name)
    return found and (found.group(1) or (found.group(2) if rule == "auto" else None))


def group(items: list[Item], links: list[tuple[int, int]], rule: str = "auto") -> np.ndarray:
    """Group number (N,) of each item: linked items and items of one sequence share one."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of: dict = {}
    links = list(links)
    for i, item in enumerate(items):
        key = sequence_of(item, rule)
        if key is not None:
            links.append((first_of.setdefault((item.source, key), i), i))
    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return np.array([root(i) for i in range(len(items))])


# ---------------------------------------------------------------------------- splits


def read_splits(path: Path, items: list[Item], allow_unmatched: bool) -> tuple[list[str], list]:
    """Splits of the items from a JSON file {"train": [names], ...} or {source: {"train": ...}}.

    Returns: one split an item, and notes. Raises: ValueError: a name in two splits or in none;
    names without files, unless `allow_unmatched`.
    """
    data = read_limited(path, MOST_JSON_BYTES)
    try:
        content = json.loads(data.decode("utf-8-sig"))
        flat = all(isinstance(names, list) for names in content.values())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object of splits ({error})") from None
    sources = list(dict.fromkeys(item.source for item in items))
    if flat and len(sources) > 1:
        raise ValueError(f"{path}: {len(sources)} sources need {{source: {{split: [names]}}}}")
    tables = {sources[0]: content} if flat else content
    for source, table in tables.items():
        if not isinstance(table, dict) or not all(isinstance(x, list) for x in table.values()):
            raise ValueError(f"{path}: '{source}' must be {{split: [names]}}, got {table!r:.60}")
    splits: dict = {}
    notes: list[str] = []
    for source in sources:
        if source not in tables:
            raise ValueError(f"{path}: no source '{source}'; it has {', '.join(tables)}")
        for word, names in tables[source].items():
            split = split_name(word, str(path))
            for name in names:
                other = splits.setdefault((source, plain(str(name))), split)
                if other != split:
                    raise ValueError(f"{path}: '{name}' of '{source}' is in {other} and {split}")
    keys = [(item.source, item.name) for item in items]
    unlisted = [key for key in keys if key not in splits]
    if unlisted:
        raise ValueError(f"{path}: {_names(unlisted)} of {len(keys)} pairs are in no split")
    absent = sorted(splits.keys() - set(keys))
    if absent:
        notes.append(f"{path}: {_names(absent)} names of the splits have no files")
        if not allow_unmatched:
            raise ValueError(f"{notes[0]}; use --allow_unmatched to continue without them")
    chosen = [splits[key] for key in keys]
    for split in SPLITS:
        if split not in chosen:
            raise ValueError(f"{path}: split '{split}' would be empty; each needs a pair")
    return chosen, notes


def _names(keys: list[tuple[str, str]]) -> str:
    return f"{len(keys)} (first: {', '.join(f'{s}/{n}' for s, n in keys[:3])})"


def check_contents(items: list[Item], splits: list[str], hashes: list[tuple[str, str]]) -> None:
    """Raises: ValueError: files of one content, visible or infrared, in two splits."""
    seen: dict = {}
    for i, pair in enumerate(hashes):
        for kind, value in zip(("visible", "infrared"), pair):
            other = seen.setdefault(value, i)
            if splits[other] != splits[i]:
                raise ValueError(
                    f"the same {kind} content is in {splits[other]} ({items[other].source}/"
                    f"{items[other].name}) and in {splits[i]} ({items[i].source}/{items[i].name})"
                )
