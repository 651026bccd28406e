"""Layouts of public data sets: which files in a folder are visible and infrared, and their names.

A layout is two patterns for paths below the folder. A pair's name is the named groups, joined:
what differs between the two sides stands outside of the groups.
"""

import re
from pathlib import Path
from typing import NamedTuple

from data import folders
from data.decoding import four_channels
from data.folders import Item
from data.manifest import SPLITS
from data.materials import TABLES
from utils.files import read_limited

ENDING = r"\.(?i:png|jpe?g|tiff?|bmp|webp|npy)"
MOST_LIST_BYTES = 2**26  # of a file of names
SHARE = 0.5  # of the images must belong to a layout for it to be recognised


class Layout(NamedTuple):
    """Patterns of the visible and of the infrared path, without the extension."""

    visible: str
    infrared: str


# The first that fits is used: specific layouts before general ones.
LAYOUTS = {
    "kaist": Layout(r"(?:.*/)?(set\d+/V\d+/)visible/(I\d+)", r"(?:.*/)?(set\d+/V\d+/)lwir/(I\d+)"),
    "flir_aligned": Layout(
        r"(?:.*/)?JPEGImages/(FLIR_\w*\d+)_RGB", r"(?:.*/)?JPEGImages/(FLIR_\w*\d+)_PreviewData"
    ),
    "dronevehicle": Layout(
        r"(?:.*/)?((?:train|val|test)/)(?:train|val|test)img/(.+)",
        r"(?:.*/)?((?:train|val|test)/)(?:train|val|test)imgr/(.+)",
    ),
    "msrs": Layout(r"(?:.*/)?((?:train|test)/)vi/(.+)", r"(?:.*/)?((?:train|test)/)ir/(.+)"),
    "llvip": Layout(
        r"(?:.*/)?visible/((?:train|test)/.+)", r"(?:.*/)?infrared/((?:train|test)/.+)"
    ),
    # Four channels in one PNG: red, green, blue, thermal. Names in _flip are mirrored copies.
    "mfnet": Layout(r"(?:.*/)?images/(\d+[DN])", r"(?:.*/)?images/(\d+[DN])"),
    "ab_folders": Layout(
        r"(?:.*/)?(train|val|test)A(/.+)",
        r"(?:.*/)?(train|val|test)B(/.+)",
    ),
    "m3fd": Layout(r"(?:.*/)?[Vv]is/(.+)", r"(?:.*/)?[Ii]r/(.+)"),
    "roadscene": Layout(r"(?:.*/)?crop_HR_visible/(.+)", r"(?:.*/)?cropinfrared/(.+)"),
    "vedai": Layout(r"(?:.*/)?(\d+)_co", r"(?:.*/)?(\d+)_ir"),
    "suffixes": Layout(
        r"(.+)[_-](?i:rgb|vis|visible|co)", r"(.+)[_-](?i:ir|thermal|infrared|lwir)"
    ),
    "folders": Layout(
        r"(.*/)?(?i:visible|vis|vi|rgb|color)/(.+)",
        r"(.*/)?(?i:infrared|ir|thermal|lwir|tir)/(.+)",
    ),
}


def find(
    source: str, root: Path, name: str = "auto", allow_unmatched: bool = False
) -> tuple[str, list[Item], list[str]]:
    """Name of the layout, pairs in natural order, and notes on what was left out.

    Raises: ValueError: no such layout, none that fits, or names on one side only.
    """
    if name not in ("auto", *LAYOUTS):
        raise ValueError(f"--layout {name}: expected auto or one of {', '.join(LAYOUTS)}")
    files, others = folders.image_files(root)
    paths = list(files.values())
    tried = list(LAYOUTS) if name == "auto" else [name]
    for word in tried:
        sides = [_names(root, paths, pattern) for pattern in LAYOUTS[word]]
        both = set(sides[0]) & set(sides[1])
        if both and sides[0] == sides[1] and not four_channels(next(iter(sides[0].values()))):
            continue
        if both and (name != "auto" or 2 * len(both) >= SHARE * len(paths)):
            break
    else:
        raise ValueError(
            f"{root}: no pair of images in the layout {' or '.join(tried)}; give the folders with "
            f"--visible and --infrared"
        )
    notes = []
    for what, own, other in (("visible", *sides), ("infrared", *sides[::-1])):
        if unpaired := sorted(set(own) - set(other), key=folders.natural):
            first = ", ".join(unpaired[:3])
            notes.append(f"source '{source}': {len(unpaired)} {what} without partner ({first})")
    if notes and not allow_unmatched:
        raise ValueError("; ".join(notes) + "; use --allow_unmatched to leave them out")
    if rest := sorted(set(paths) - {p for side in sides for p in side.values()}):
        notes.append(
            f"source '{source}': {len(rest)} images do not belong to the layout '{word}' and are "
            f"left out (first: {', '.join(str(p.relative_to(root)) for p in rest[:3])})"
        )
    if others:
        first = ", ".join(str(p.relative_to(root)) for p in others[:3])
        notes.append(f"source '{source}': {len(others)} files are not images (first: {first})")
    names = sorted(both, key=folders.natural)
    listed = _listed(root, others) if word == "mfnet" else {}
    return word, [Item(source, listed.get(n, n), sides[0][n], sides[1][n]) for n in names], notes


def _listed(root: Path, others: list[Path]) -> dict[str, str]:
    """Names with their split as folder, from train.txt, val.txt and test.txt: one name a line."""
    listed: dict[str, str] = {}
    for path in others:
        if path.name in {f"{split}.txt" for split in SPLITS}:
            for name in read_limited(path, MOST_LIST_BYTES).decode("utf-8-sig", "replace").split():
                if listed.setdefault(name, f"{path.stem}/{name}") != f"{path.stem}/{name}":
                    raise ValueError(f"{path}: {name} is in {listed[name].split('/')[0]} too")
    return listed


def _names(root: Path, paths: list[Path], pattern: str) -> dict[str, Path]:
    """Paths that fit, by the pair's name. Raises: ValueError: two files of one name."""
    found: dict[str, Path] = {}
    compiled = re.compile(pattern + ENDING)
    for path in paths:
        if match := compiled.fullmatch(folders.plain(path.relative_to(root).as_posix())):
            name = "".join(group or "" for group in match.groups())
            if name in found:
                raise ValueError(f"{found[name]} and {path} have one name; names must be unique")
            found[name] = path
    return found


def find_items(args) -> tuple[list[Item], list[str]]:
    """Matched pairs of all sources of prepare.py's arguments, and notes.

    Raises: ValueError: arguments or names that do not pair up.
    """
    if args.folder:
        source = (args.source or ["pairs"])[0]
        if args.visible or args.infrared or args.semantic or len(args.source) > 1:
            raise ValueError("--folder is a whole set: leave out --visible, --infrared, --semantic")
        name, items, notes = find(source, args.folder, args.layout, args.allow_unmatched)
        return items, [f"{args.folder} is in the layout '{name}'", *notes]
    count = len(args.visible)
    if args.suffixes.count(",") != 2:
        raise ValueError(f"--suffixes takes three endings with commas, got {args.suffixes!r}")
    semantic = args.semantic or ["none"] * count
    sources = args.source or (["pairs"] if count == 1 else [])
    if not count or not len(args.infrared) == len(semantic) == len(sources) == count:
        raise ValueError(
            f"give --visible, --infrared, --source (and --semantic, or 'none') once for each pair "
            f"of folders: got {count} visible, {len(args.infrared)} infrared, "
            f"{len(args.source)} source, {len(args.semantic)} semantic; or --synthetic N"
        )
    if len(set(sources)) < count:
        raise ValueError(f"--source names must differ, got {', '.join(sources)}")
    if (args.table or args.palette) and not args.semantic:
        raise ValueError("--table and --palette describe semantic images: give --semantic")
    if args.semantic and args.table not in TABLES:
        raise ValueError(f"--table must say what class ids mean: one of {', '.join(TABLES)}")
    items, notes = [], []
    for source, visible, infrared, maps in zip(sources, args.visible, args.infrared, semantic):
        maps = None if maps == "none" else Path(maps)
        found, own = folders.match(
            source, visible, infrared, maps, args.suffixes.split(","), args.allow_unmatched
        )
        items += found
        notes += own
    return items, notes
