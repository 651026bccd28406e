"""Plots of a table of results: means with intervals, image by image, and objects.

Plain values in, matplotlib figures out.
"""

import math

import numpy as np
from matplotlib.figure import Figure

from utils.panels import DPI, INK
from utils.results import COLUMNS

REFERENCE = "#8a8a8a"
# distinguishable to colour-blind people
OWN = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
MOST_ACROSS = 4


def colors_of(methods: list[str], own: list[str]) -> dict[str, str]:
    """Grey for rows that need no model."""
    return {m: OWN[own.index(m) % len(OWN)] if m in own else REFERENCE for m in methods}


def means_figure(found: dict, own: list[str]) -> Figure:
    """A small plot per metric: every method's mean and 95 % interval."""
    methods = list(found["methods"])
    names = [n for n in COLUMNS if any(_known(found, m, n) for m in methods)]
    across = min(MOST_ACROSS, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure((11.5, (0.75 + 0.24 * len(methods)) * down), dpi=DPI, facecolor="white")
    colors = colors_of(methods, own)
    all_axes = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in all_axes.flat[len(names) :]:
        axes.set_axis_off()
    for name, axes in zip(names, all_axes.flat):
        for y, method in enumerate(methods):
            if not _known(found, method, name):
                continue
            value, (low, high) = found["methods"][method][name], found["intervals"][method][name]
            if math.isfinite(low) and math.isfinite(high):
                axes.plot([low, high], [y, y], color=colors[method], lw=2)
            axes.plot([value], [y], "o", color=colors[method], ms=5)
        sense = {1: " (more is better)", -1: " (less is better)", 0: ""}[COLUMNS[name].better]
        axes.set_title(COLUMNS[name].title + sense, fontsize=8, color=INK)
        axes.set_yticks(range(len(methods)), methods, fontsize=7.5, color=INK, parse_math=False)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.tick_params(labelsize=7.5, colors=INK, length=2)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def images_figure(images: list[dict], own: list[str], name: str = "psnr") -> Figure:
    """One curve per method: the metric of every image, from the worst to the best."""
    methods = list(dict.fromkeys(row["method"] for row in images))
    figure = Figure((7.5, 3.6), dpi=DPI, facecolor="white")
    axes, colors = figure.add_axes((0.09, 0.14, 0.64, 0.82)), colors_of(methods, own)
    styles = ["-", "--", ":", "-."]
    for i, method in enumerate(methods):
        values = np.sort([row[name] for row in images if row["method"] == method])
        share = (np.arange(len(values)) + 0.5) / len(values)
        style = "-" if method in own else styles[i % len(styles)]
        axes.plot(share, values, style, color=colors[method], lw=1.8, label=method)
    axes.set_xlabel("share of the images", fontsize=8, color=INK)
    axes.set_ylabel(COLUMNS[name].title, fontsize=8, color=INK)
    axes.tick_params(labelsize=7.5, colors=INK, length=2)
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def objects_figure(boxes: list[dict], own: list[str]) -> Figure:
    """A small plot per method of the model: contrast of every object, true and generated."""
    figure = Figure((3.4 * len(own), 3.5), dpi=DPI, facecolor="white")
    kinds = sorted({box["kind"] for box in boxes})
    for axes, method in zip(figure.subplots(1, len(own), squeeze=False)[0], own):
        for i, kind in enumerate(kinds):
            points = [
                (box["true_contrast"], box["contrast"])
                for box in boxes
                if box["method"] == method and box["kind"] == kind
            ]
            if points:
                axes.scatter(*zip(*points), s=9, color=OWN[i % len(OWN)], alpha=0.6, label=kind)
        axes.axline((0, 0), slope=1, color=REFERENCE, lw=0.8)
        axes.axhline(0, color=INK, lw=0.6)
        axes.axvline(0, color=INK, lw=0.6)
        axes.set_title(method, fontsize=8.5, color=INK, parse_math=False)
        axes.set_xlabel("true contrast", fontsize=8, color=INK)
        axes.set_ylabel("generated contrast", fontsize=8, color=INK)
        axes.tick_params(labelsize=7.5, colors=INK, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        for text in axes.legend(fontsize=7.5, frameon=False).get_texts():
            text.set_parse_math(False)
    figure.tight_layout()
    return figure


def curve_figure(summary: dict) -> Figure:
    """A task's score against the number of real training pairs, without and with generated ones.

    Args: summary: metric; rows and curve as assembly/downstream.py makes them.
    """
    figure = Figure((6.4, 3.9), dpi=DPI, facecolor="white")
    axes, metric, curve = figure.add_subplot(), summary["metric"], summary["curve"]
    for i, name in enumerate(("without", "with")):
        if points := curve[name]:
            x, y = ([point[k] for point in points] for k in ("real", "value"))
            low, high = zip(*(point["interval"] for point in points))
            axes.fill_between(x, low, high, color=OWN[i], alpha=0.13, lw=0)
            axes.plot(x, y, "o-", color=OWN[i], ms=4.5, lw=1.8, label=f"{name} generated images")
    grey = summary["rows"]["grey"][metric]["value"]
    axes.axhline(grey, color=REFERENCE, lw=1.2, ls="--", label="grey photographs alone")
    axes.set_xlabel("real pairs in training", fontsize=8.5, color=INK)
    axes.set_ylabel(f"{metric} on real infrared", fontsize=8.5, color=INK)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8, colors=INK, length=2)
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def sparsification_figure(calibration: dict, methods: dict) -> Figure:
    """A small plot per sampling method: the error left without the least certain pixels.

    Args: calibration: method -> shares, curve, oracle. methods: method -> ause.
    """
    figure = Figure((3.6 * len(calibration), 3.3), dpi=DPI, facecolor="white")
    all_axes = figure.subplots(1, len(calibration), squeeze=False, sharey=True)[0]
    for axes, (method, own) in zip(all_axes, calibration.items()):
        axes.plot(own["shares"], own["curve"], color=OWN[0], lw=2, label="by deviation of samples")
        axes.plot(own["shares"], own["oracle"], color=INK, lw=1, ls="--", label="by true error")
        axes.axhline(1, color=REFERENCE, lw=1, ls=":", label="at random")
        axes.fill_between(own["shares"], own["oracle"], own["curve"], color=OWN[0], alpha=0.12)
        title = f"{method}, AUSE {methods[method]['ause']:.3f}"
        axes.set_title(title, fontsize=8.5, color=INK, parse_math=False)
        axes.set_xlabel("share of the pixels dropped", fontsize=8, color=INK)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7.5, colors=INK, length=2)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("error of the rest over that of all", fontsize=8, color=INK)
    all_axes[0].legend(fontsize=7.5, frameon=False, loc="lower left")
    figure.tight_layout()
    return figure


def _known(found: dict, method: str, name: str) -> bool:
    value = found["methods"][method].get(name)
    return value is not None and math.isfinite(value)
