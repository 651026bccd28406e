"""YOLO boxes beside the images: are they inside of them, and do they belong to a pair?"""

from pathlib import Path

from data.folders import Item, natural
from utils.files import read_limited

TOLERANCE = 0.002  # of the image's side: boxes are written with few digits
MOST_BYTES = 2**24  # of one file
LEVELS = 3  # folders above an image in which boxes/ is looked for


def notes(items: list[Item]) -> list[str]:
    """Notes on boxes/NAME.txt ("class x y width height", shares of the image) of each source."""
    found = []
    for source in dict.fromkeys(item.source for item in items):
        own = [item for item in items if item.source == source]
        folder = _folder(own[0])
        if folder is None:
            continue
        files = {path.stem: path for path in folder.rglob("*.txt")}
        bad = []
        for item in own:
            path = files.pop(item.infrared.stem, None) or files.pop(Path(item.name).name, None)
            bad += _wrong(path) if path else []
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            found.append(f"source '{source}': boxes outside images: {'; '.join(bad[:3])}{more}")
        if files:
            first = ", ".join(sorted(files, key=natural)[:3])
            found.append(f"source '{source}': {len(files)} files of boxes without a pair ({first})")
    return found


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
