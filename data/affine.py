"""By how much is the infrared turned, scaled and displaced against the visible?

The images are cut into a grid of overlapping parts, and the displacement of each part is sought in
the sum over many pairs (data/registration.py). An affine map is fitted to the displacements that
are clear, robustly, as parallax and moving things displace some parts in another way.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.registration import CLEAR, NEAR, SMALLEST, agreement, directions, faded, step_of
from utils.correlation import clearness, peak

GRID = 5  # parts on either axis, each a third of the image wide
LEAST = 8  # clear parts that a map is fitted to, at least one in each quarter of the image
FITS = 30  # of the weighted least squares
BISQUARE = 4.685  # Tukey 1974: residuals of so many standard deviations and more have no weight
FINEST = 0.1  # pixels: what the peaks themselves are uncertain by
STEEPEST, LARGEST = 5.0, 0.10  # degrees, and share of the size: a map beyond is improbable


class Affine(NamedTuple):
    """Where the pixels of an infrared image lie in the visible one.

    row' = a * row + b * column + c, column' = d * row + e * column + f, in pixels counted from the
    middle of the first one.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 1.0
    f: float = 0.0

    def matrix(self) -> np.ndarray:
        """(3, 3), for points (row, column, 1)."""
        return np.array([self[:3], self[3:], (0.0, 0.0, 1.0)])

    def after(self, first: "Affine") -> "Affine":
        """`first`, and this map of what it gives."""
        return Affine(*map(float, (self.matrix() @ first.matrix())[:2].ravel()))

    def degrees(self) -> float:
        """By how much the infrared is turned clockwise against the visible."""
        return math.degrees(math.atan2(self.d - self.b, self.a + self.e))

    def scales(self) -> tuple[float, float]:
        """How many times higher and wider things are in the infrared, rotation apart."""
        return 1 / math.hypot(self.a, self.d), 1 / math.hypot(self.b, self.e)

    def probable(self) -> bool:
        stretched = 1 / np.linalg.svd(self.matrix()[:2, :2], compute_uv=False)
        return abs(self.degrees()) <= STEEPEST and bool((abs(stretched - 1) <= LARGEST).all())

    def corners(self, size: tuple[int, int]) -> np.ndarray:
        """(4, 2) rows and columns by which the infrared is displaced at its corners."""
        points = _corners(size)
        return (points - points @ self.matrix().T)[:, :2]

    def text(self, size: tuple[int, int]) -> str:
        high, wide = ((scale - 1) * 100 for scale in self.scales())
        farthest = np.hypot(*self.corners(size).T).max()
        return (
            f"turned by {self.degrees():+.2f} degrees, {high:+.1f} % high and {wide:+.1f} % wide, "
            f"{farthest:.1f} pixels off at the farthest corner"
        )

    def inside(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, bottom, left and right of the infrared's pixels that the visible shows too."""
        edges = []
        sides = ((self.a, self.b, self.c), (self.e, self.d, self.f))
        for (slope, slant, offset), length, across in zip(sides, size, size[::-1]):
            ends = offset, offset + slant * (across - 1)
            first, last = -min(ends) / slope, (length - 1 - max(ends)) / slope
            edges += [max(0, math.ceil(first - 1e-6)), min(length, math.floor(last + 1e-6) + 1)]
        return edges[0], edges[1], edges[2], edges[3]

    def cropped(self, infrared: np.ndarray) -> np.ndarray:
        """The part of an infrared image (H,W) that the visible shows too; no pixel is changed."""
        top, bottom, left, right = self.inside(infrared.shape)
        return infrared[top:bottom, left:right]

    def moved(self, image: np.ndarray, classes: bool = False) -> np.ndarray:
        """The visible (H,W,3) or its class ids (H,W), uint8, at the pixels of `cropped`.

        By cropping alone where the map is a shift of whole pixels; else bicubic, ids the nearest.
        """
        top, bottom, left, right = self.inside(image.shape[:2])
        rows, columns = round(self.c), round(self.f)
        if self == Affine(c=rows, f=columns):
            return image[top + rows : bottom + rows, left + columns : right + columns]
        # Pillow wants x before y, counted from the edge of the first pixel
        x = (self.e, self.d, self.f + (1 - self.e - self.d) / 2)
        y = (self.b, self.a, self.c + (1 - self.a - self.b) / 2)
        resample = Image.Resampling.NEAREST if classes else Image.Resampling.BICUBIC
        picture = Image.fromarray(image)
        whole = picture.transform(picture.size, Image.Transform.AFFINE, (*x, *y), resample)
        return np.asarray(whole)[top:bottom, left:right]


class Fit(NamedTuple):
    """The map of a source, and how sure it is."""

    affine: Affine
    error: float  # standard error in pixels at the least certain corner


def parts(visible: np.ndarray, infrared: np.ndarray, affine: Affine) -> np.ndarray:
    """Agreement at each displacement that `affine` leaves, of each part: (GRID * GRID, h, w).

    0 where a part has no edges or is too small.

    visible: (H,W,3) uint8; infrared: (H,W) of any type.
    """
    step = step_of(infrared.shape)
    surfaces = np.zeros((GRID * GRID, 2 * NEAR + 3, 2 * NEAR + 3), np.float32)
    top, bottom, left, right = affine.inside(infrared.shape)
    if min(bottom - top, right - left) < SMALLEST * step:
        return surfaces
    first = directions(affine.moved(visible), step)
    second = directions(affine.cropped(infrared), step)
    for surface, (rows, columns) in zip(surfaces, _windows(first.shape)):
        found = agreement(first[rows, columns], second[rows, columns])
        if found is not None:
            surface += found
    return surfaces


def edge_correlation(visible: np.ndarray, infrared: np.ndarray, affine: Affine) -> float:
    """How well directions and strengths of edges agree after the move: 1 for the same, 0 for none.

    visible: (H,W,3) uint8; infrared: (H,W) of any type.
    """
    step = step_of(infrared.shape)
    first = faded(directions(affine.moved(visible), step))
    second = faded(directions(affine.cropped(infrared), step))
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.vdot(first, second).real) / lengths if lengths else 0.0


def fit(surfaces: np.ndarray, affine: Affine, size: tuple[int, int]) -> Fit | None:
    """`affine` corrected by what it leaves, by the sum of `parts` over pairs of one size.

    None where too few parts have a clear displacement, or a quarter of the image has none.
    """
    step = step_of(size)
    top, bottom, left, right = affine.inside(size)
    windows = _windows(((bottom - top) // step, (right - left) // step))
    middles = [[(w.start + w.stop - 1) / 2 for w in window] for window in windows]
    points = np.array(middles) * step + (step - 1) / 2 + (top, left)
    shifts = np.array([peak(surface) for surface in surfaces]) * step
    clear = np.array([clearness(surface) >= CLEAR for surface in surfaces])
    middle = (np.array(size) - 1) / 2
    quarters = {(row > middle[0], column > middle[1]) for row, column in points[clear]}
    if clear.sum() < LEAST or len(quarters) < 4:
        return None
    design = np.column_stack([points[clear], np.ones(clear.sum())])
    found, error = _robust(design, shifts[clear], _corners(size))
    rest = np.eye(3)
    rest[:2] -= found.T
    return Fit(affine.after(Affine(*rest[:2].ravel())), error)


def _robust(design: np.ndarray, shifts: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients (3, 2) of shifts = design @ coefficients by Tukey's bisquare, and the standard
    error of what they give `at` the worst of some points."""
    weights = np.ones(len(design))
    for _ in range(FITS):
        root = np.sqrt(weights)[:, None]
        found = np.linalg.lstsq(design * root, shifts * root, rcond=None)[0]
        off = np.hypot(*(shifts - design @ found).T)
        deviation = max(1.4826 * float(np.median(off)), FINEST)
        weights = np.clip(1 - (off / (BISQUARE * deviation)) ** 2, 0, None) ** 2
    variance = (weights * off**2).sum() / max(weights.sum() - 3, 1)
    spread = at @ np.linalg.pinv((design * weights[:, None]).T @ design) * at
    return found, math.sqrt(variance * spread.sum(axis=1).max())


def _windows(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of each part; parts of a small image are SMALLEST wide, or all of it."""
    axes = []
    for length in size:
        side = min(length, max(SMALLEST, length // 3))
        axes.append([slice(int(i), int(i) + side) for i in np.linspace(0, length - side, GRID)])
    return [(rows, columns) for rows in axes[0] for columns in axes[1]]


def _corners(size: tuple[int, int]) -> np.ndarray:
    """(4, 3): row, column and 1 of the corner pixels."""
    return np.array([(r, c, 1.0) for r in (0, size[0] - 1) for c in (0, size[1] - 1)])
