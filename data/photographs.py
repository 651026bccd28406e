"""The photographs in a file or folder, and notes on the files that are not photographs."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.decoding import FORMATS
from data.heif import HEIF_SUFFIXES

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
SYSTEM = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # beside what begins with a dot


class Photographs(NamedTuple):
    """paths: the files; names: what each result is called, without a suffix, below the output."""

    paths: list[Path]
    names: list[Path]
    notes: list[str]  # what was left out


def find_photographs(where: str, recursive: bool, output: Path) -> Photographs:
    """Image files of a path, including camera raw files, which are refused when they are read.

    With `recursive` the folders below too; never what lies below `output`.
    Raises: ValueError: none, or two that would get one name.
    """
    path = Path(where)
    if not where or not path.exists():
        raise ValueError(f"--image_path {where!r}: no such file or folder")
    if path.is_file():
        return Photographs([path], [Path(path.stem)], [])
    inside = sorted(path.rglob("*") if recursive else path.iterdir())
    earlier = output.absolute()  # results of an earlier run are no photographs
    own = earlier.is_relative_to(path.absolute()) and earlier != path.absolute()
    inside = [
        p
        for p in inside
        if not _system(p.relative_to(path)) and not (own and p.absolute().is_relative_to(earlier))
    ]
    wanted = SUFFIXES.union(HEIF_SUFFIXES, RAW_SUFFIXES)
    paths = [p for p in inside if p.is_file() and p.suffix.lower() in wanted]
    taken = set(paths)
    others = [p.relative_to(path) for p in inside if not p.is_dir() and p not in taken]
    folders = [] if recursive else [p.relative_to(path) for p in inside if p.is_dir()]
    notes = [f"left out: {_named(others, 'file')}, no images"] if others else []
    if folders:
        notes.append(f"left out: {_named(folders, 'folder')}; --recursive reads them too")
    if not paths:
        raise ValueError(
            "; ".join([f"--image_path {where}: no image files in this folder", *notes])
        )
    names = [p.relative_to(path).with_suffix("") for p in paths]
    seen: dict[Path, Path] = {}
    for p, name in zip(paths, names):
        if name in seen:
            raise ValueError(f"{seen[name].name} and {p.name} would both become {name}.png")
        seen[name] = p
    return Photographs(paths, names, notes)


def refuse_raw(path: Path) -> None:
    """Raises: ValueError: camera raw, by its suffix (DNG would be read as a TIFF)."""
    if path.suffix.lower() in RAW_SUFFIXES:
        kind = path.suffix[1:].upper()
        raise ValueError(
            f"{path}: camera raw ({kind}) is not read; develop it to JPEG or PNG first"
        )


def _system(inside: Path) -> bool:
    return any(part.startswith(".") or part in SYSTEM for part in inside.parts)


def _named(paths: list[Path], kind: str) -> str:
    first = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return f"{len(paths)} {kind}{'s' * (len(paths) != 1)} ({first})"
