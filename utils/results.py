"""Metrics of images as tables: means with intervals, verdicts between methods, warnings.

results.json  all but its entry `run` is a function of the inputs alone, bit for bit
results.md, per_image.csv, per_object.csv   the same as text
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils import bootstrap, files
from utils.alignment import CLEAR, WARN_ABOVE

INVERTED_BELOW = -0.1  # mean rank correlation of an image that shows warm as cold


class Column(NamedTuple):
    title: str
    better: int  # 1: more is better, -1: less is, 0: neither
    digits: int = 3


COLUMNS = {
    "psnr": Column("PSNR dB", 1, 2),
    "ssim": Column("SSIM", 1),
    "ms_ssim": Column("MS-SSIM", 1),
    "mae": Column("MAE", -1),
    "mae_kelvin": Column("MAE K", -1, 2),
    "rank": Column("rank corr.", 1),
    "edge_sharpness": Column("edge sharpness", 1),
    "hot_spot_iou": Column("hot-spot IoU", 1),
    "feature_distance": Column("feature distance", -1),
    "lpips": Column("LPIPS", -1),
    "kid_like": Column("KID-like", -1),
    "fid": Column("FID", -1, 1),
    "kid": Column("KID", -1),
    "mavic_score": Column("task score", -1),
    "object_sign": Column("objects: right sign", 1, 2),
    "object_warmer": Column("objects: warmer", 0, 2),
    "object_ratio": Column("objects: contrast ratio", 1, 2),
    "object_auc": Column("objects: AUC", 1),
    "spread": Column("std of samples", 0),
    "spread_rank": Column("std against error", 1),
    "ause": Column("AUSE", -1),
    "ause_random": Column("AUSE at random", 0),
}


class Sums(NamedTuple):
    """A mean over images, or over things in images, as sums and counts of N images."""

    sums: np.ndarray
    counts: np.ndarray


def summarise(
    images: list[dict],
    boxes: list[dict],
    of_model: list[str],
    displacement: dict[str, dict],
    resampled: dict | None = None,
) -> dict:
    """Everything the tables show about the rows of `images` and `boxes`, as plain values.

    Args:
        images: dicts of index, method and one number a metric; every method has the same indices.
        boxes: dicts of index, method, kind, light, contrast, true_contrast and auc.
        of_model: methods that are compared with all others, and warned about.
        displacement: method -> x, y, clearness, of all its images together.
        resampled: method -> metric -> (value, its value in every resample), of measures of sets.
    """
    methods = list(dict.fromkeys(row["method"] for row in images))
    indices = sorted({row["index"] for row in images})
    weights = bootstrap.weights(len(indices))
    values, spread = {}, {}
    for method in methods:
        own = [row for row in images if row["method"] == method]
        parts = {**_of_images(own, indices), **_of_boxes(boxes, method, indices)}
        values[method] = {name: bootstrap.mean(*part) for name, part in parts.items()}
        with np.errstate(invalid="ignore"):  # PSNR of equal images is infinite
            spread[method] = {n: bootstrap.means(*part, weights) for n, part in parts.items()}
        for name, (value, draws) in (resampled or {}).get(method, {}).items():
            values[method][name], spread[method][name] = value, draws
    order = {name: i for i, name in enumerate(COLUMNS)}
    measured: tuple[dict[str, dict[str, Any]], ...] = (values, spread)
    for found in measured:
        for method in methods:
            found[method] = dict(sorted(found[method].items(), key=lambda item: order[item[0]]))
    facts: dict[str, Any] = {
        "methods": values,
        "intervals": {
            m: {name: bootstrap.interval(x) for name, x in own.items()} for m, own in spread.items()
        },
        "differences": {m: differences(m, values, spread, len(indices)) for m in of_model},
        "displacement": displacement,
        "objects": objects_by_group(boxes, indices, weights),
    }
    return facts | {"warnings": warnings(facts, of_model)}


def differences(method: str, values: dict, spread: dict, images: int) -> dict:
    """{other method: {metric: difference, interval, verdict}} of `method` less the other."""
    found: dict[str, dict] = {}
    for other in (m for m in values if m != method):
        found[other] = {}
        for name, draws in spread[method].items():
            theirs = spread[other].get(name)
            if theirs is None or len(theirs) != len(draws) or not COLUMNS[name].better:
                continue
            with np.errstate(invalid="ignore"):
                interval = bootstrap.interval(draws - theirs)
            found[other][name] = {
                "difference": values[method][name] - values[other][name],
                "interval": interval,
                "verdict": bootstrap.verdict(interval, COLUMNS[name].better > 0, images),
            }
    return found


def objects_by_group(boxes: list[dict], indices: list[int], weights: np.ndarray) -> dict:
    """{group: {method: numbers}}: all objects, of a class, by day or night, and of both."""
    groups: dict[str, list[dict]] = {}
    for box in boxes:
        names = {"all", box["kind"], box["light"], f"{box['kind']}, {box['light']}"}
        for name in names if box["light"] else {"all", box["kind"]}:
            groups.setdefault(name, []).append(box)
    found: dict[str, dict] = {}
    for name, members in sorted(groups.items(), key=lambda item: (item[0] != "all", item[0])):
        found[name] = {}
        for method in dict.fromkeys(box["method"] for box in members):
            own = [box for box in members if box["method"] == method]
            parts = _of_boxes(own, method, indices)
            numbers = {key.removeprefix("object_"): bootstrap.mean(*x) for key, x in parts.items()}
            truly = sum(box["true_contrast"] > 0 for box in own) / len(own)
            sure = {
                f"{key.removeprefix('object_')}_interval": bootstrap.interval(
                    bootstrap.means(*part, weights)
                )
                for key, part in parts.items()
            }
            found[name][method] = {"boxes": len(own), "truly_warmer": truly, **numbers, **sure}
    return found


def warnings(found: dict, of_model: list[str]) -> list[str]:
    """Warnings that a reader should not overlook."""
    sentences = []
    for method in of_model:
        rank, interval = found["methods"][method]["rank"], found["intervals"][method]["rank"]
        if rank < INVERTED_BELOW and interval[1] < 0:
            sentences.append(
                f"{method} looks INVERTED: its rank correlation with the truth is {rank:.2f}"
                f" ({interval[0]:.2f} to {interval[1]:.2f}), it shows warm things as cold; check"
                " the palette or the window of the data that it was trained on"
            )
        x, y, clear = found["displacement"][method].values()
        if math.hypot(x, y) > WARN_ABOVE and clear >= CLEAR:
            sides = f"{abs(x):.1f} px {'right of' if x > 0 else 'left of'} and {abs(y):.1f} px"
            sentences.append(
                f"the edges of {method} lie {sides} {'below' if y > 0 else 'above'} the true ones"
                " (all images together); are the pairs aligned?"
            )
    return sentences


def _of_images(rows: list[dict], indices: list[int]) -> dict[str, Sums]:
    """The metrics of one method, image by image; NaN counts as not measured."""
    place = {index: i for i, index in enumerate(indices)}
    found = {}
    for name in (name for name in COLUMNS if any(name in row for row in rows)):
        sums, counts = np.zeros((2, len(indices)))
        for row in rows:
            if name in row and not math.isnan(row[name]):
                sums[place[row["index"]]] += row[name]
                counts[place[row["index"]]] += 1
        found[name] = Sums(sums, counts)
    return found


def _of_boxes(boxes: list[dict], method: str, indices: list[int]) -> dict[str, Sums]:
    """Measures of annotated objects of one method; resampled by image, averaged over objects."""
    place = {index: i for i, index in enumerate(indices)}
    names = ("object_sign", "object_warmer", "object_ratio", "object_auc")
    tables = {name: np.zeros((2, len(indices))) for name in names}
    for box in (box for box in boxes if box["method"] == method):
        own, true, i = box["contrast"], box["true_contrast"], place[box["index"]]
        sign = 1 if true >= 0 else -1
        for name, value, count in (
            ("object_sign", own * sign > 0, 1),
            ("object_warmer", own > 0, 1),
            ("object_ratio", own * sign, abs(true)),
            ("object_auc", box["auc"], 1),
        ):
            tables[name][:, i] += value, count
    return {name: Sums(*table) for name, table in tables.items() if table[1].any()}


# as text


def table(found: dict, seconds: dict[str, float]) -> list[str]:
    """Markdown: a row a method; ± is half of the 95 % interval."""
    names = [n for n in COLUMNS if any(n in own for own in found["methods"].values())]
    names = [n for n in names if n != "object_warmer"]
    lines = [f"| method | {' | '.join(COLUMNS[n].title for n in names)} | s/image |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for method, values in found["methods"].items():
        cells = [cell(n, values.get(n), found["intervals"][method].get(n)) for n in names]
        time = f"{seconds[method]:.3g}" if method in seconds else ""
        lines.append(f"| {method} | {' | '.join(cells)} | {time} |")
    return lines


def cell(name: str, value: float | None, interval: list[float] | None = None) -> str:
    if value is None or math.isnan(value):
        return ""
    digits = COLUMNS[name].digits
    text = f"{value:.{digits}f}"
    if interval is None or not all(map(math.isfinite, interval)):
        return text
    half = f"{(interval[1] - interval[0]) / 2:.{digits}f}"
    return f"{text} ± {half}"


def verdict_table(found: dict, method: str) -> list[str]:
    """Markdown: is `method` ahead of each other one, metric by metric?"""
    compared = found["differences"][method]
    names = [n for n in COLUMNS if any(n in own for own in compared.values())]
    lines = [f"| {method} against | {' | '.join(COLUMNS[n].title for n in names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for other, own in compared.items():
        cells = [own[n]["verdict"] if n in own else "" for n in names]
        lines.append(f"| {other} | {' | '.join(cells)} |")
    return lines


def object_table(found: dict, methods: list[str]) -> list[str]:
    """Markdown: annotated objects by class and light."""
    head = "boxes | truly warmer | warmer | right sign | contrast ratio | AUC"
    lines = [f"| objects | method | {head} |", "|---" * 8 + "|"]
    for group, own in found["objects"].items():
        for method in (m for m in methods if m in own):
            x = own[method]
            cells = [f"{x[key]:.2f}" for key in ("truly_warmer", "warmer", "sign", "ratio")]
            numbers = " | ".join([str(x["boxes"]), *cells, f"{x['auc']:.3f}"])
            lines.append(f"| {group} | {method} | {numbers} |")
    return lines


def write(folder: Path, images: list[dict], boxes: list[dict], found: dict, text: str) -> None:
    """Write results.md, results.json, per_image.csv and, with boxes, per_object.csv."""
    write_rows(folder / "per_image.csv", images)
    if boxes:
        write_rows(folder / "per_object.csv", boxes)
    files.write_whole(folder / "results.json", json.dumps(finite(found), indent=1) + "\n")
    files.write_whole(folder / "results.md", text)


def write_rows(path: Path, rows: list[dict]) -> None:
    files.write_whole(path, as_csv(rows))


def as_csv(rows: list[dict]) -> str:
    """Rows of dicts as text; a column that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(each := io.StringIO(newline=""), names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return each.getvalue()


def finite(value):
    """The same nested values with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
