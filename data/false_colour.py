"""Infrared in the colours of a palette back to its levels."""

import difflib

import matplotlib
import numpy as np

from data.materials import PALETTES

FARTHEST = 40.0  # of a colour from the palette, on average over the image, in 255ths (JPEG: 5)
BLOCK = 65536  # colours compared at once


def check_name(name: str) -> None:
    """Raises: ValueError: matplotlib has no colormap of this name."""
    if name not in matplotlib.colormaps:
        near = difflib.get_close_matches(name, list(matplotlib.colormaps), 3)
        hint = f"; near: {', '.join(near)}" if near else ", such as inferno, jet or hot"
        raise ValueError(
            f"--palette {name}: neither class colours ({', '.join(PALETTES)}) nor a colormap of"
            f" matplotlib{hint}"
        )


def invert(image: np.ndarray, palette: str, where: str) -> np.ndarray:
    """(H,W,3) uint8 in the 256 colours of a matplotlib colormap to (H,W) uint8 levels.

    Each pixel becomes the level of the nearest colour. Where a palette has one colour for several
    levels, the lowest of them. Raises: ValueError naming `where`: these are not its colours.
    """
    table = np.rint(matplotlib.colormaps[palette](np.arange(256) / 255)[:, :3] * 255)
    packed = image.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    colours, inverse = np.unique(packed, return_inverse=True)
    colours = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.float32)
    levels = np.empty(len(colours), np.uint8)
    distances = np.empty(len(colours), np.float32)
    table = table.astype(np.float32)
    for first in range(0, len(colours), BLOCK):
        part = colours[first : first + BLOCK]
        squares = (part**2).sum(1)[:, None] - 2 * part @ table.T + (table**2).sum(1)
        nearest = squares.argmin(1)
        levels[first : first + BLOCK] = nearest
        distances[first : first + BLOCK] = np.linalg.norm(part - table[nearest], axis=1)
    inverse = inverse.reshape(image.shape[:2])
    far = float(distances[inverse].mean())
    if far > FARTHEST:
        raise ValueError(
            f"{where}: its colours are not those of palette {palette}: {far:.0f} of 255 away from"
            f" them on average"
        )
    return levels[inverse]
