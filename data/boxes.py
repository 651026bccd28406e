"""YOLO boxes beside the images: are they inside of them, of a pair, and where after a move?

Boxes belong to the infrared, as in MSRS, LLVIP and M3FD: an alignment crops it, and moves nothing.
"""

from pathlib import Path

from data.affine import Affine
from data.folders import Item, natural
from utils.files import read_limited

TOLERANCE = 0.002  # of the image's side: boxes are written with few digits
MOST_BYTES = 2**24  # of one file
LEVELS = 3  # folders above an image in which boxes/ is looked for
CLASSES = ("classes.txt", "boxes_classes.txt")  # in the folder or beside it
LEAST = 1.0  # pixels of a side; what a crop leaves below is no box


def notes(items: list[Item]) -> list[str]:
    """Notes on boxes/NAME.txt ("class x y width height", shares of the image) of each source."""
    found = []
    for source in dict.fromkeys(item.source for item in items):
        own = [item for item in items if item.source == source]
        folder = _folder(own[0])
        if folder is None:
            continue
        files = _files(folder)
        bad = []
        for item in own:
            path = _take(files, item)
            bad += _wrong(path) if path else []
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            found.append(f"source '{source}': boxes outside images: {'; '.join(bad[:3])}{more}")
        if files:
            first = ", ".join(sorted(files, key=natural)[:3])
            found.append(f"source '{source}': {len(files)} files of boxes without a pair ({first})")
    return found


def _files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.rglob("*.txt") if path.name not in CLASSES}


def _take(files: dict[str, Path], item: Item) -> Path | None:
    """The file of a pair, which is no longer among `files` then."""
    return files.pop(item.infrared.stem, None) or files.pop(Path(item.name).name, None)


def _folder(item: Item) -> Path | None:
    for above in list(item.infrared.absolute().parents)[1 : LEVELS + 1]:
        if (above / "boxes").is_dir():
            return above / "boxes"
    return None


def _wrong(path: Path) -> list[str]:
    """What is wrong with the lines of one file."""
    found = []
    text = read_limited(path, MOST_BYTES).decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            x, y, width, height = (float(word) for word in line.split()[1:5])
        except ValueError:
            found.append(f"{path.name} line {number} is no box")
            continue
        sides = ((x, width), (y, height))
        inside = all(
            size > 0 and at - size / 2 >= -TOLERANCE and at + size / 2 <= 1 + TOLERANCE
            for at, size in sides
        )
        if not inside:
            found.append(f"{path.name} line {number}")
    return found


def moved(
    items: list[Item], sizes: list[tuple[int, int]], moves: list[Affine | None]
) -> tuple[dict[str, str], list[str]]:
    """Files of boxes as the cropped pairs need them, and notes; none where no such pair has any.

    Boxes of all sources are there then, also of those that stay as they are.

    Args: sizes: of the pairs before the move.
    Returns: texts by name, SOURCE/NAME.txt and classes.txt.
    Raises: ValueError: a source whose name is no name of a folder.
    """
    texts: dict[str, str] = {}
    classes: set[str] = set()
    lost = changed = 0
    for source in dict.fromkeys(item.source for item in items):
        own = [i for i, item in enumerate(items) if item.source == source]
        folder = _folder(items[own[0]])
        if folder is None:
            continue
        if Path(source).is_absolute() or ".." in Path(source).parts:
            raise ValueError(f"--source {source}: boxes are written to a folder of this name")
        files = _files(folder)
        for i in own:
            if path := _take(files, items[i]):
                text = read_limited(path, MOST_BYTES).decode("utf-8-sig", errors="replace")
                move = moves[i]
                if move:
                    text, gone = _cropped(text, sizes[i], move)
                    lost, changed = lost + gone, changed + 1
                texts[f"{source}/{items[i].name}.txt"] = text
        places = [folder / CLASSES[0], folder / CLASSES[1], folder.parent / CLASSES[1]]
        if there := [place for place in places if place.is_file()]:
            classes.add(read_limited(there[0], MOST_BYTES).decode("utf-8-sig", errors="replace"))
    if not changed:
        return {}, []
    notes = [f"boxes of the cropped infrared are written beside the shards ({changed} files)"]
    if lost:
        notes[0] += f"; {lost} boxes lie in what was cropped away"
    if len(classes) == 1:
        texts[CLASSES[0]] = classes.pop()
    elif classes:
        notes.append(f"the sources name the classes of their boxes differently: no {CLASSES[0]}")
    return texts, notes


def _cropped(text: str, size: tuple[int, int], move: Affine) -> tuple[str, int]:
    """Boxes of an infrared image after its crop, and how many are gone; no line that is no box."""
    top, bottom, left, right = move.inside(size)
    lines, gone = [], 0
    for line in text.splitlines():
        try:
            kind, *numbers = line.split()[:5]
            x, y, width, height = map(float, numbers)
        except ValueError:
            continue
        x, width = _part(x, width, size[1], left, right)
        y, height = _part(y, height, size[0], top, bottom)
        if min(width * (right - left), height * (bottom - top)) < LEAST:
            gone += 1
        else:
            lines.append(f"{kind} {x:.6f} {y:.6f} {width:.6f} {height:.6f}\n")
    return "".join(lines), gone


def _part(middle: float, length: float, whole: int, first: int, last: int) -> tuple[float, float]:
    """Middle and length of what is left of a span of `whole` pixels between two, as shares."""
    low = max((middle - length / 2) * whole, first) - first
    high = min((middle + length / 2) * whole, last) - first
    return (low + high) / 2 / (last - first), (high - low) / (last - first)
