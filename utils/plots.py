"""Plots of what stage 1 has learnt: emissivity-like weights, confused materials, curves.

Arrays in, matplotlib figures out; names, colours and priors are the caller's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from utils.panels import DPI, INK

GRID = "#dddddd"
PALE = "#999999"  # what is not in the data
CURVES = {"fusion/power": "#222222", "fusion/alpha": "#0072b2", "fusion/beta": "#d55e00"}


def emissivity_figure(
    learned: np.ndarray,
    prior: np.ndarray,
    share: np.ndarray,
    names: Sequence[str],
    colors: np.ndarray,
    rank: float,
) -> Figure:
    """One row per material: its learnt weight as a disc, the prior as a line.

    Args:
        learned, prior: (M,) in [0, 1].
        share: (M,) of the labelled pixels; what is 0 stands below the others, in grey.
        colors: (M, 3) uint8.
        rank: correlation of learned and prior over the materials with a share; NaN: not known.
    """
    order = sorted(range(len(names)), key=lambda i: (share[i] == 0, -share[i], i))
    seen = int((share > 0).sum())
    figure = Figure((7.2, 1.6 + 0.235 * len(names)), dpi=DPI, facecolor="white")
    height = figure.get_figheight()
    axes = figure.add_axes((0.25, 0.75 / height, 0.62, 1 - 1.6 / height))
    for row, i in enumerate(order):
        color, there = np.asarray(colors[i]) / 255, share[i] > 0
        axes.plot([prior[i], learned[i]], [row, row], color=GRID if there else "#eeeeee", lw=2.5,
                  zorder=1, solid_capstyle="butt")  # fmt: skip
        axes.scatter([prior[i]], [row], marker="|", s=110, lw=2, zorder=2,
                     color=INK if there else PALE)  # fmt: skip
        axes.scatter([learned[i]], [row], s=58, zorder=3, lw=0.9, edgecolor=INK if there else PALE,
                     color=[color if there else "white"])  # fmt: skip
        axes.text(1.03, row, f"{share[i]:.1%}" if there else "-", fontsize=7.5, va="center",
                  color=INK if there else PALE, transform=axes.get_yaxis_transform())  # fmt: skip
    if 0 < seen < len(names):
        axes.axhline(seen - 0.5, color=PALE, lw=0.8, ls=(0, (4, 3)))
    axes.set(xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.7))
    axes.set_yticks(range(len(names)), [names[i] for i in order], fontsize=8, color=INK)
    axes.set_xlabel("emissivity (prior) and emissivity-like weight (learned), a proxy:\n"
                    "one band cannot tell emissivity from temperature; compare the order only",
                    fontsize=8)  # fmt: skip
    axes.grid(axis="x", color=GRID, lw=0.6)
    _plain(axes)
    axes.text(1.03, -0.85, "pixels", fontsize=7.5, va="bottom", color=INK,
              transform=axes.get_yaxis_transform())  # fmt: skip
    marks = [("|", INK, INK, "prior, 8-14 µm"), ("o", "#888888", INK, "learned"),
             ("o", "white", PALE, "no label in these scenes")]  # fmt: skip
    handles = [axes.plot([], [], ls="", marker=mark, color=fill, markeredgecolor=edge, ms=7.5,
                         mew=2 if mark == "|" else 0.9, label=text)[0]
               for mark, fill, edge, text in marks]  # fmt: skip
    axes.legend(handles=handles[: 2 + (seen < len(names))], loc="lower center", fontsize=8,
                bbox_to_anchor=(0.45, 1.0), ncols=3, frameon=False, handletextpad=0.3,
                columnspacing=1.2)  # fmt: skip
    found = f"rank correlation with the prior {rank:.2f} over the {seen} materials that occur"
    found = "no labels in these scenes" if np.isnan(rank) else found
    figure.text(0.5, 1 - 0.12 / height, "Emissivity-like weight of each material", ha="center",
                va="top", fontsize=11, color=INK)  # fmt: skip
    figure.text(0.5, 1 - 0.36 / height, found, ha="center", va="top", fontsize=8.5, color=INK)
    return figure


def confusion_figure(counts: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Row-normalised confusion matrix of the classes that occur as label or prediction.

    Args: counts: (C, C) of (label, prediction).
    Raises: ValueError: nothing was labelled.
    """
    if not counts.any():
        raise ValueError("no labelled pixel: there is nothing to draw")
    kept = np.flatnonzero(counts.sum(0) + counts.sum(1))
    kept = kept[np.argsort(-counts[kept].sum(1), kind="stable")]
    rows = counts[np.ix_(kept, kept)].astype(float)
    total = rows.sum(1, keepdims=True)
    share = np.where(total > 0, rows / np.maximum(total, 1), np.nan)
    n = len(kept)
    side = max(0.42, 2.6 / n)  # inches of a cell
    left, bottom, top, right = 1.9, 1.2, 0.5, 0.85  # inches
    width, height = left + n * side + right, bottom + n * side + top
    width = max(width, 5.5)
    figure = Figure((width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((left / width, bottom / height, n * side / width, n * side / height))
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for r, c in np.argwhere(np.nan_to_num(share) >= 0.005).tolist():
        axes.text(c, r, f"{100 * share[r, c]:.0f}", ha="center", va="center", fontsize=7.5,
                  color="white" if share[r, c] > 0.55 else INK)  # fmt: skip
    shown = [names[i] for i in kept.tolist()]
    pixels = total.ravel() / counts.sum()
    axes.set_xticks(range(n), shown, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(n), [f"{x}  {p:.1%}" for x, p in zip(shown, pixels)], fontsize=8)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("labelled, with its share of the pixels", fontsize=9)
    axes.tick_params(length=2, colors=INK)
    bar_box = ((left + n * side + 0.15) / width, bottom / height, 0.14 / width,
               min(n * side, 3.0) / height)  # fmt: skip
    bar = figure.colorbar(image, cax=figure.add_axes(bar_box), ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", "50", "100 %"], fontsize=7.5)
    bar.outline.set_visible(False)
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=10, color=INK)
    return figure


def curves_figure(
    rows: Sequence[dict], names: Sequence[str], colors: np.ndarray, shown: Sequence[int]
) -> Figure:
    """Power, alpha and beta, and the weight of every shown material, over the steps of a run.

    Args:
        rows: of metrics.jsonl; those with fusion/power, fusion/alpha, fusion/beta and weight/<name,
            spaces as _> count.
        shown: ids of the materials to draw; colors: (M, 3) uint8.
    Raises: ValueError: no row has them.
    """
    rows = [row for row in rows if "fusion/power" in row]
    if not rows:
        raise ValueError("no row has fusion/power: stage 1 with physics logs it at each evaluation")
    steps = [row["step"] for row in rows]
    lines = -(-len(shown) // 2)  # of the legend
    figure = Figure((10.6, max(4.6, 1.2 + 0.19 * lines)), dpi=DPI, facecolor="white")
    boxes = [(0.055, 0.58, 0.25, 0.33), (0.055, 0.11, 0.25, 0.33), (0.365, 0.11, 0.36, 0.8)]
    power, scalars, weights = (figure.add_axes(box) for box in boxes)
    mark: dict[str, Any] = dict(marker="o", ms=3.5) if len(rows) < 25 else {}
    for name, color in CURVES.items():
        axes = power if name == "fusion/power" else scalars
        axes.plot(steps, [row[name] for row in rows], color=color, lw=1.6,
                  label=name.removeprefix("fusion/"), **mark)  # fmt: skip
    outline = [Stroke(linewidth=2.6, foreground="#555555"), Normal()]  # pale colours stay visible
    for i in shown:
        values = [row.get(f"weight/{names[i].replace(' ', '_')}", np.nan) for row in rows]
        weights.plot(steps, values, color=np.asarray(colors[i]) / 255, lw=1.7, label=names[i],
                     path_effects=outline, **mark)  # fmt: skip
    titles = ["power of the intensity", "sigmoid(alpha) and sigmoid(beta)",
              "emissivity-like weight of each material (a proxy)"]  # fmt: skip
    for axes, title in zip((power, scalars, weights), titles):
        axes.set_title(title, fontsize=9, color=INK)
        axes.grid(color=GRID, lw=0.6)
        axes.margins(x=0.03)
        _plain(axes)
    scalars.legend(fontsize=8, frameon=False)
    for axes in (scalars, weights):
        axes.set_xlabel("step", fontsize=8)
    weights.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02),
                   ncols=2, handlelength=1.3, columnspacing=1.0, labelspacing=0.4)  # fmt: skip
    return figure


def _plain(axes) -> None:
    axes.tick_params(labelsize=8, length=2, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
