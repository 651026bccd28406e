"""By how many pixels is the infrared displaced against the visible? Of one pair, and of many.

Both images become fields of edge directions, in which light on dark and dark on light are the same
(the angle is doubled). Their phase correlation has a peak at the displacement. One pair often has
no clear peak (night, glare, little texture); the correlations of many pairs are added up before
the peak is sought. utils/alignment.py compares images of one kind, where edge strengths suffice.
"""

from typing import NamedTuple

import numpy as np

from utils.correlation import clearness, peak

SIDE = 640  # larger images are averaged to this many pixels or fewer before they are compared
NEAR = 16  # displacements up to here are searched, in pixels of the images that are compared
SMALLEST = 3 * NEAR  # side below which nothing is measured
PASSED = 0.12  # standard deviation of the low pass in cycles a pixel: grain differs in the bands
CLEAR = 15.0  # of `clearness`: below, a peak is chance (unrelated images reach about 9)


class Shift(NamedTuple):
    """Pixels by which the infrared lies below (rows) and right (columns) of the visible."""

    rows: float
    columns: float
    clearness: float

    def clear(self) -> bool:
        return self.clearness >= CLEAR

    def distance(self, other: "Shift | None" = None) -> float:
        from_rows, from_columns = other[:2] if other else (0.0, 0.0)
        return float(np.hypot(self.rows - from_rows, self.columns - from_columns))

    def text(self) -> str:
        return f"{self.rows:+.1f} rows, {self.columns:+.1f} columns"


def step_of(shape: tuple[int, int]) -> int:
    """Pixels that are averaged to one on either axis before images of this size are compared."""
    return -(-max(shape) // SIDE)


def surface(visible: np.ndarray, infrared: np.ndarray) -> np.ndarray | None:
    """Agreement at each displacement, none in the middle: (2*NEAR+3, 2*NEAR+3) float32.

    Surfaces of one `step_of` can be added up. visible: (H,W,3) or (H,W); infrared: (H,W), of any
    type. None where the images are too small or have no edges.
    """
    step = step_of(infrared.shape)
    return agreement(directions(visible, step), directions(infrared, step))


def agreement(visible: np.ndarray, infrared: np.ndarray) -> np.ndarray | None:
    """`surface` of two fields of `directions`, or of one part of both."""
    fields = [faded(field) for field in (visible, infrared)]
    height, width = visible.shape
    if min(height, width) < SMALLEST or not all(np.abs(field).max() > 0 for field in fields):
        return None
    first, second = (np.fft.fft2(field) for field in fields)
    cross = second * first.conj()
    row, column = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    cross *= np.exp(-(row**2 + column**2) / (2 * PASSED**2)) / np.maximum(np.abs(cross), 1e-12)
    plane = np.fft.fftshift(np.fft.ifft2(cross).real)
    top, left, reach = height // 2, width // 2, NEAR + 1  # one more, for the parabola
    near = plane[top - reach : top + reach + 1, left - reach : left + reach + 1]
    return near.astype(np.float32)


def shift_of(total: np.ndarray, step: int) -> Shift:
    """Where the peak of a surface, or of a sum of them, lies; `step` as `step_of` gives it."""
    rows, columns = peak(total)
    return Shift(rows * step, columns * step, clearness(total))


def _averaged(image: np.ndarray, step: int) -> np.ndarray:
    grey: np.ndarray = image.astype(np.float32)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    if step == 1:
        return grey
    height, width = (size // step for size in grey.shape)
    blocks = grey[: height * step, : width * step].reshape(height, step, width, step)
    return blocks.mean(axis=(1, 3))


def directions(image: np.ndarray, step: int) -> np.ndarray:
    """Complex (H/step,W/step): doubled angle of the gradient, root of its strength.

    image: (H,W,3) or (H,W) of any type; of `step_of` its size.
    """
    rows, columns = np.gradient(_averaged(image, step))
    gradient = columns + 1j * rows
    strength = np.abs(gradient)
    highest = max(float(strength.max()), 1e-30)  # of 8-bit, 16-bit and float images alike
    gradient, strength = gradient / highest, strength / highest
    field: np.ndarray = gradient**2 / np.maximum(strength, 1e-6) ** 1.5
    return field


def faded(field: np.ndarray) -> np.ndarray:
    """A field that falls to 0 at its border."""
    return field * np.hanning(len(field))[:, None] * np.hanning(field.shape[1])
