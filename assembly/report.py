"""report.html: tables, plots, the best, median and worst images, where and on what they fail."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assembly import atlas
from assembly.checkpoints import Opened
from assembly.rows import Row
from assembly.scoring import Found
from data.stream import collate
from utils import calibration, page, panels, result_plots, results
from utils.files import write_whole
from utils.loop import to_device
from utils.objects import Box, Boxes

EACH = 3  # images of the best, the median and the worst
FAILED = 6  # objects
LONGEST = 18  # letters of a name beside its row
MARK = (80, 255, 120)  # colour of a box, unlike any of the thermal map
CHOSEN_BY = "ssim"


def picks(found: Found, method: str) -> dict[str, list[int]]:
    """Indices of the pairs that are shown: {best, median, worst: by SSIM of `method`, ...}.

    failed: with annotated objects, the pairs of those that are least like the truth. where: the
    pair with the largest error of each category of the atlas.
    """
    own = sorted(
        (row for row in found.images if row["method"] == method),
        key=lambda row: (-row[CHOSEN_BY], row["index"]),
    )
    order = [row["index"] for row in own]
    middle = max(0, (len(order) - EACH) // 2)
    chosen = {
        "best": order[:EACH],
        "median": order[middle : middle + EACH],
        "worst": order[-EACH:][::-1],
    }
    boxes = [box for box in found.boxes if box["method"] == method]
    failed = sorted(boxes, key=lambda box: (box["auc"], box["index"]))
    chosen["failed"] = list(dict.fromkeys(box["index"] for box in failed if box["auc"] < 0.5))
    chosen = {name: indices[:FAILED] for name, indices in chosen.items()}
    return chosen | {"where": [row["index"] for row in atlas.worst(found.regions, method).values()]}


@torch.no_grad()
def pictures(
    opened: Opened, rows: list[Row], indices: list[int], device, boxes: Boxes | None
) -> dict[int, list[np.ndarray]]:
    """By index of a pair: visible, each row's image, the deviation of samples if any, truth.

    Collective where the model is sharded: call it on all ranks with the same indices.
    """
    made = {}
    for index in indices:
        pair = opened.pairs.get(index)
        batch: Any = {**to_device(collate([pair]), device), "filler": False}
        marks = boxes.of(pair["source"], pair["name"]) if boxes else []
        images = [row.image(batch)[0] for row in rows]
        deviations = [x.std(0) for x in images if len(x) > 1]
        thermal = [*(x.mean(0) for x in images), batch["infrared"][0, 0]]
        cells = [panels.rgb(pair["visible"].numpy()), *map(_thermal, thermal)]
        made[index] = [_marked(cell, marks) for cell in cells]
        made[index][-1:-1] = [_thermal(x / x.max().clamp(min=1e-6)) for x in deviations]
    return made


def write(
    folder: Path,
    whole: dict,
    found: Found,
    chosen: dict[str, list[int]],
    cells: dict[int, list[np.ndarray]],
    own: list[str],
) -> Path:
    """Write report.html. Args: whole: what results.json holds."""
    frozen, seconds = whole["protocol"]["frozen"], whole["run"]["seconds_an_image"]
    facts = f"{whole['pairs']} pairs of {whole['data']} ({whole['split']}), protocol"
    facts += f" {whole['protocol']['id']}; {frozen['range']}; {frozen['resize']}; checkpoint"
    facts += f" {whole['checkpoint']} ({whole['protocol']['checkpoint_hash'][:12]})"
    parts = [page.paragraph(facts, "note")]
    parts += [page.paragraph(text, "warning") for text in whole["warnings"]]
    parts += [page.heading("Table"), page.table(results.table(whole, seconds))]
    parts.append(
        page.paragraph(f"± half of the 95 % interval over images. {whole['note']}", "note")
    )
    if own:
        parts += [page.heading(f"Is {own[-1]} ahead?")]
        parts += [page.table(results.verdict_table(whole, own[-1]))]
        parts.append(page.paragraph("Paired over the same images; 95 %.", "note"))
    parts += [page.heading("Plots")]
    figure = result_plots.means_figure(whole, own)
    parts.append(page.picture(panels.pixels_of(figure), "means and 95 % intervals over images"))
    for name in ("psnr", "ssim"):
        figure = result_plots.images_figure(found.images, own, name)
        parts.append(page.picture(panels.pixels_of(figure), f"{name} of every image, sorted"))
    if whole["objects"]:
        parts += [page.heading("Objects")]
        parts.append(page.table(results.object_table(whole, list(whole["methods"]))))
        if own:
            figure = result_plots.objects_figure(found.boxes, own)
            text = "contrast of every annotated object; on the grey line it is the true one"
            parts.append(page.picture(panels.pixels_of(figure), text))
    parts += _uncertainty(whole) + _failures(whole, found, cells, own)
    parts += _panels(found, chosen, cells, own)
    path = folder / "report.html"
    write_whole(path, page.page(f"Evaluation of {', '.join(own) or 'stage 1'}", parts))
    return path


def _uncertainty(whole: dict) -> list[str]:
    if "calibration" not in whole:
        return []
    figure = result_plots.sparsification_figure(whole["calibration"], whole["methods"])
    text = "error of the pixels that are left when the least certain ones are dropped"
    parts = [page.heading("Do the samples differ where they are wrong?")]
    parts.append(page.picture(panels.pixels_of(figure), text))
    return parts + [page.paragraph(x, "note") for x in calibration.sentences(whole["methods"])]


def _failures(whole: dict, found: Found, cells: dict, own: list[str]) -> list[str]:
    if not own:
        return []
    parts = [page.heading("Where it fails"), page.table(atlas.table(whole["failures"], own))]
    parts += [page.paragraph(text, "note") for text in atlas.sentences(whole["failures"])]
    if worst := atlas.worst(found.regions, own[-1]):
        rows = [cells[row["index"]] for row in worst.values()]
        sides = [f"{name}  MAE {row['mae']:.2f}" for name, row in worst.items()]
        text = f"the image in which {own[-1]} has its largest error on each: "
        text += ", ".join(f"{name} {row['name']}" for name, row in worst.items())
        parts.append(page.picture(panels.grid(rows, _titles(rows, own), sides), text))
    return parts


def _titles(rows: list[list[np.ndarray]], own: list[str]) -> list[str]:
    deviations = len(rows[0]) - len(own) - 2
    return ["visible", *own, *["deviation of samples"] * deviations, "infrared"]


def _panels(found: Found, chosen: dict, cells: dict, own: list[str]) -> list[str]:
    parts = []
    titles = {
        "best": "Best images",
        "median": "Median images",
        "worst": "Worst images",
        "failed": "Failures: objects that do not stand out as they truly do",
    }
    for name, title in titles.items():
        if not (indices := chosen.get(name)):
            continue
        rows = [cells[index] for index in indices]
        names = {row["index"]: row for row in found.images if row["method"] == own[-1]}
        sides = [f"{names[i]['name'][-LONGEST:]}  SSIM {names[i]['ssim']:.2f}" for i in indices]
        picture = panels.grid(rows, _titles(rows, own), sides)
        by = "" if name == "failed" else f", by SSIM of {own[-1]}"
        parts += [page.heading(title + by)]
        parts.append(page.picture(picture, ", ".join(names[i]["name"] for i in indices)))
    return parts


def _thermal(image: Tensor) -> np.ndarray:
    return panels.thermal_colors(image.float().cpu().numpy())


def _marked(image: np.ndarray, boxes: list[Box]) -> np.ndarray:
    """The picture with a thin frame around every box."""
    image, (H, W) = image.copy(), image.shape[:2]
    for box in boxes:
        top, bottom = (min(max(round(y * H), 0), H - 1) for y in (box.top, box.bottom))
        left, right = (min(max(round(x * W), 0), W - 1) for x in (box.left, box.right))
        image[[top, bottom], left : right + 1] = MARK
        image[top : bottom + 1, [left, right]] = MARK
    return image
