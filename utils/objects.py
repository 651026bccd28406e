"""Annotated objects: is their contrast with their surroundings that of the true image?

Boxes are text files as YOLO writes them, NAME.txt or SOURCE/NAME.txt with lines
`class x y width height`, all but the class as shares of the image; `classes.txt` or
`boxes_classes.txt`, in the folder or beside it, names the classes, one a line.

Dimension key:  H, W pixels   N boxes
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.files import read_limited

LEAST = 2  # pixels per side; smaller boxes hardly have an inside
RING = 0.5  # width of the ring around a box, in the box's own sides
RING_LEAST = 3  # pixels
MOST_BYTES = 2**20
DAY_OR_NIGHT = re.compile(r"(?:^|[^a-z])(day|night)(?:[^a-z]|$)", re.IGNORECASE)
MSRS_NAME = re.compile(r"^\d{5}([DN])$")


class Box(NamedTuple):
    kind: str  # the name of its class
    left: float  # edges as shares of the image's sides
    top: float
    right: float
    bottom: float


class Boxes:
    """The boxes of a folder by source and name of a pair.

    Raises: ValueError: no such folder; when read, a line that is no box, with file and line.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"boxes: {folder} is not a folder")
        self.classes = _class_names(self.folder)

    def of(self, source: str, name: str) -> list[Box]:
        """The boxes of a pair; none where it has no file."""
        for path in (self.folder / source / f"{name}.txt", self.folder / f"{name}.txt"):
            # a name comes from the data set: it must not lead out of the folder
            if path.resolve().is_relative_to(self.folder.resolve()) and path.is_file():
                return self._read(path)
        return []

    def _read(self, path: Path) -> list[Box]:
        found = []
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                kind, *values = line.split()[:5]
                x, y, width, height = map(float, values)
                if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < width <= 1 and 0 < height <= 1):
                    raise ValueError
                kind = self.classes.get(int(kind), f"class {int(kind)}")
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}: not a box `class x y width height` in shares of the"
                    f" image: {line.strip()[:80]!r}"
                ) from None
            found.append(Box(kind, x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        return found


def find_boxes(folder: str | None, data_path: str) -> Boxes | None:
    """The boxes of `folder`, else those in `boxes` in the data set's folder, if any."""
    beside = Path(data_path) / "boxes"
    return Boxes(folder or beside) if folder or beside.is_dir() else None


def contrasts(predicted: Tensor, target: Tensor, boxes: list[Box]) -> list[dict]:
    """How much warmer the inside of each box is than the ring around it, in both images.

    Args: predicted, target: (H, W) in [0, 1].
    Returns: for each box that has LEAST pixels a side and something around it: kind; `contrast`
        and `true_contrast`, the mean inside less the mean of the ring, from which all boxes are
        cut out; `auc`, how well the predicted levels tell inside from ring: the share of pixel
        pairs in the order that the true contrast has, equal ones counting half.
    """
    H, W = target.shape
    edges = [pixels(box, H, W) for box in boxes]
    free = torch.ones(H, W, dtype=torch.bool)
    for top, bottom, left, right in edges:
        free[top:bottom, left:right] = False
    predicted, target = predicted.detach().double().cpu(), target.detach().double().cpu()
    found = []
    for box, (top, bottom, left, right) in zip(boxes, edges):
        if bottom - top < LEAST or right - left < LEAST:
            continue
        dy = max(RING_LEAST, round(RING * (bottom - top)))
        dx = max(RING_LEAST, round(RING * (right - left)))
        around = slice(max(0, top - dy), bottom + dy), slice(max(0, left - dx), right + dx)
        ring = free[around]
        if not ring.any():
            continue
        pairs = [
            (x[top:bottom, left:right].flatten(), x[around][ring]) for x in (predicted, target)
        ]
        own, true = ((inside.mean() - outside.mean()).item() for inside, outside in pairs)
        auc = area_under_curve(*pairs[0])
        found.append(
            {
                "kind": box.kind,
                "contrast": own,
                "true_contrast": true,
                "auc": auc if true >= 0 else 1 - auc,
            }
        )
    return found


def area_under_curve(inside: Tensor, outside: Tensor) -> float:
    """Share of (inside, outside) pairs with the inside higher; equal ones count half."""
    ordered = outside.sort().values
    below = torch.searchsorted(ordered, inside, right=False)
    up_to = torch.searchsorted(ordered, inside, right=True)
    return ((below + up_to).double().mean() / 2 / len(outside)).item()


def light_of(source: str, name: str) -> str:
    """day, night, or "" where neither source nor name says so (MSRS: 00004N, 00111D)."""
    if match := MSRS_NAME.match(name):
        return {"D": "day", "N": "night"}[match[1]]
    match = DAY_OR_NIGHT.search(f"{source}/{name}")
    return match[1].lower() if match else ""


def pixels(box: Box, H: int, W: int) -> tuple[int, int, int, int]:
    """top, bottom, left, right of a box, inside the image."""
    y = [min(max(round(v * H), 0), H) for v in (box.top, box.bottom)]
    x = [min(max(round(v * W), 0), W) for v in (box.left, box.right)]
    return y[0], y[1], x[0], x[1]


def _class_names(folder: Path) -> dict[int, str]:
    for path in (
        folder / "classes.txt",
        folder / "boxes_classes.txt",
        folder.parent / "boxes_classes.txt",
    ):
        if path.is_file():
            lines = [line.strip() for line in _lines(path) if line.strip()]
            numbered = [re.match(r"^(\d+)[\s:]+(.+)$", line) for line in lines]
            found = [match for match in numbered if match]
            if lines and len(found) == len(lines):
                return {int(match[1]): match[2] for match in found}
            return dict(enumerate(lines))
    return {}


def _lines(path: Path) -> list[str]:
    return read_limited(path, MOST_BYTES).decode("utf-8-sig", errors="replace").splitlines()
