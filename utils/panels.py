"""Drawing: maps as colours, and grids of images with titles, legend and colour bar.

Arrays in, arrays out: colours and names are the caller's. Nothing here opens a window.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from utils.files import write_whole

Box = tuple[float, float, float, float]  # left, bottom, width, height
THERMAL = "inferno"  # dark is cold, bright is hot; perceptually uniform
UNKNOWN = (60, 60, 60)  # colour of ids without one
DPI = 100
CELL_INCHES = 2.0  # width of a grid's cell
INK = "#222222"


def thermal_colors(values: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """(H, W) floats -> (H, W, 3) uint8; `low` and below is the coldest colour, `high` the hottest.

    Raises: ValueError: not (H, W), or low >= high.
    """
    if values.ndim != 2 or low >= high:
        raise ValueError(f"need (H, W) values and low < high, got {values.shape}, {low}, {high}")
    scaled = np.clip((np.nan_to_num(values).astype(np.float64) - low) / (high - low), 0, 1)
    return (matplotlib.colormaps[THERMAL](scaled)[..., :3] * 255).round().astype(np.uint8)


def id_colors(ids: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """(H, W) ids and (M, 3) uint8 colours -> (H, W, 3) uint8; ids from M on are dark grey."""
    table = np.full((256, 3), UNKNOWN, np.uint8)
    table[: len(colors)] = colors
    return table[np.clip(ids, 0, 255)]


def rgb(image: np.ndarray) -> np.ndarray:
    """(3, H, W) or (H, W) floats in [0, 1] -> (H, W, 3) uint8; one channel becomes grey.

    Raises: ValueError: another shape.
    """
    if image.ndim == 2:
        image = np.broadcast_to(image, (3, *image.shape))
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"need (3, H, W) or (H, W), got {image.shape}")
    return (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def mosaic(channels: np.ndarray) -> np.ndarray:
    """(C, H, W) floats in [0, 1] side by side in grey: (rows * H, columns * W, 3) uint8."""
    C, H, W = channels.shape
    columns = math.ceil(math.sqrt(C))
    rows = math.ceil(C / columns)
    out = np.ones((rows * H, columns * W), np.float32)
    for i, channel in enumerate(channels):
        r, c = divmod(i, columns)
        out[r * H : (r + 1) * H, c * W : (c + 1) * W] = channel
    return rgb(out)


def legend_of(
    ids: Sequence[np.ndarray], names: Sequence[str], colors: np.ndarray, most: int = 16
) -> list[tuple[str, np.ndarray]]:
    """(name, colour) of the ids that cover most of the maps, largest first; no unknown ids."""
    flat = np.concatenate([np.zeros(0, np.int64), *(x.ravel().astype(np.int64) for x in ids)])
    counts = np.bincount(flat[flat < len(names)], minlength=len(names))
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    return [(names[i], colors[i]) for i in order[:most]]


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    row_titles: Sequence[str] = (),
    legend: Sequence[tuple[str, np.ndarray]] = (),
    heading: str = "",
    color_bar: str = "",
) -> np.ndarray:
    """One figure, (H, W, 3) uint8: a row per scene, a column per kind of image.

    Args:
        rows: cells as (h, w, 3) uint8; within a row they should have one aspect.
        titles: one a column.
        row_titles: one a row, at its left; () for none.
        legend: (name, uint8 colour) under the grid.
        heading: over everything.
        color_bar: what thermal colours mean, beside a bar from 0 to 1; "" for no bar.
    Raises: ValueError: no rows, or a row of another length than `titles`.
    """
    lengths = {len(row) for row in rows}
    if lengths != {len(titles)}:
        raise ValueError(f"need rows of {len(titles)} cells as there are titles, got {lengths}")
    heights = [CELL_INCHES * row[0].shape[0] / row[0].shape[1] for row in rows]
    per_line = max(2, len(titles))  # entries of the legend in a line
    lines = math.ceil(len(legend) / per_line)
    top, bottom = 0.3 + 0.3 * bool(heading), 0.1 + 0.22 * lines  # inches
    left, right = 0.25 * bool(row_titles) + 0.05, 0.65 * bool(color_bar) + 0.05
    gap = 0.05
    width = left + right + len(titles) * (CELL_INCHES + gap)
    height = top + bottom + sum(heights) + gap * len(rows)
    figure = Figure((width, height), dpi=DPI, facecolor="white")
    y = height - top
    for r, row in enumerate(rows):
        y -= heights[r]
        for c, cell in enumerate(row):
            box = (left + c * (CELL_INCHES + gap), y, CELL_INCHES, heights[r])
            axes = figure.add_axes(_share(box, width, height))
            axes.imshow(cell, aspect="auto", interpolation="nearest")
            axes.set_axis_off()
            if r == 0:
                axes.set_title(titles[c], fontsize=9, parse_math=False, color=INK, pad=4)
            if c == 0 and row_titles:
                axes.text(-0.04, 0.5, row_titles[r], transform=axes.transAxes, rotation=90,
                          ha="right", va="center", fontsize=7, color=INK,
                          parse_math=False)  # fmt: skip
        y -= gap
    if heading:
        figure.text(0.5, 1 - 0.06 / height, heading, ha="center", va="top", fontsize=11,
                    color=INK, parse_math=False)
    if color_bar:
        box = (width - right + 0.08, bottom + gap, 0.12, min(sum(heights), 3.0))
        _draw_color_bar(figure, _share(box, width, height), color_bar)
    if legend:
        shares = [(name, cast(Any, np.asarray(color) / 255)) for name, color in legend]
        patches = [Patch(color=color, label=name) for name, color in shares]
        figure.legend(handles=patches, loc="lower center", ncols=per_line, fontsize=7.5,
                      frameon=False, handlelength=1.2, columnspacing=1.2, labelspacing=0.35,
                      bbox_to_anchor=(0.5, 0.0), borderaxespad=0.2)  # fmt: skip
    return pixels_of(figure)


def pixels_of(figure: Figure) -> np.ndarray:
    """A matplotlib figure as (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8; the file appears whole or not at all. Raises: OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())


def _draw_color_bar(figure: Figure, box: Box, label: str) -> None:
    axes = figure.add_axes(box)
    ramp = thermal_colors(np.linspace(1, 0, 256)[:, None])
    axes.imshow(ramp, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks([0, 0.5, 1])
    axes.tick_params(labelsize=7, colors=INK, length=2)
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(label, fontsize=7.5, color=INK)


def _share(box: Box, width: float, height: float) -> Box:
    """(left, bottom, width, height) in inches -> shares of the figure."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height
