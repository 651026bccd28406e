"""Where the images fail: errors on people, vehicles, sky, glass, at night and in glare.

Class maps say what a pixel shows, or else annotated boxes; the pair's name says whether it is
night, or else a dark photograph; glare is where the photograph is blown out. Categories that cannot
be recognised are named, with the reason.

Dimension key:  B batch   H, W pixels   N images
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from assembly.rows import grey
from data.label_sets import CLASSES
from data.pairs import Pairs
from utils import bootstrap
from utils.objects import Boxes, light_of, pixels

NIGHT = 0.25  # mean luminance below which a photograph counts as night if its name does not say
GLARE = 250 / 255  # level that all three channels of a blown-out pixel reach
LEAST = 16  # pixels of a category in an image; fewer are ignored
RING = 5  # pixels around a region that its contrast is measured against
EVERYWHERE, AT_NIGHT, IN_GLARE = "everywhere", "night", "glare"


class Category(NamedTuple):
    """What belongs to it: classes of a label set by name, or all of a material; kinds of boxes."""

    classes: frozenset[str] = frozenset()
    materials: frozenset[str] = frozenset()
    boxes: frozenset[str] = frozenset()


_ROAD_USERS = "car truck bus van vehicle motorcycle motorbike"
CATEGORIES = {
    "people": Category(
        classes=frozenset({"person", "rider", "skin", "clothing"}),
        boxes=frozenset({"person", "people", "pedestrian", "rider"}),
    ),
    "vehicles": Category(
        classes=frozenset({*_ROAD_USERS.split(), "minibike", "car body", "car window", "tyre"}),
        boxes=frozenset(_ROAD_USERS.split()),
    ),
    "sky": Category(materials=frozenset({"sky"})),
    "glass": Category(materials=frozenset({"glass"})),
    "vegetation": Category(materials=frozenset({"foliage", "grass"})),
    "water": Category(materials=frozenset({"water"})),
}


class Atlas:
    """Finds the pixels of every category. `not_measured`: category -> the reason."""

    def __init__(self, label_set: str | None, boxes: Boxes | None):
        self.boxes, self.not_measured = boxes, {}
        self.ids: dict[str, Tensor] = {}  # class ids, of the categories that class maps tell
        self.boxed: list[str] = []  # the categories that boxes tell
        of_boxes = "the annotated boxes have no class for it"
        of_boxes = of_boxes if boxes else "there are no annotated boxes"
        of_labels = f"'{label_set}' has no class for it" if label_set else "there are no class maps"
        kinds = {kind.lower() for kind in boxes.classes.values()} if boxes else set()
        for name, category in CATEGORIES.items():
            ids = [
                i
                for i, (kind, material) in enumerate(CLASSES[label_set] if label_set else ())
                if kind in category.classes or material in category.materials
            ]
            if ids:
                self.ids[name] = torch.tensor(ids)
            elif kinds & category.boxes:
                self.boxed.append(name)
            else:
                self.not_measured[name] = f"{of_labels}, {of_boxes}"

    def masks(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Category -> (B, H, W) bool on the batch's device; in the order of the table."""
        visible, semantic = batch["visible"], batch["semantic"]
        everywhere = torch.ones_like(semantic, dtype=torch.bool)
        found = {EVERYWHERE: everywhere}
        for name in CATEGORIES:
            if name in self.ids:
                found[name] = torch.isin(semantic, self.ids[name].to(semantic.device))
            elif name in self.boxed:
                found[name] = self._boxed(CATEGORIES[name], batch)
        named = [light_of(*where) for where in zip(batch["source"], batch["name"])]
        dark = (grey(batch).mean((1, 2, 3)) < NIGHT).tolist()
        night = [light == "night" if light else x for light, x in zip(named, dark)]
        found[AT_NIGHT] = everywhere & torch.tensor(night, device=visible.device)[:, None, None]
        found[IN_GLARE] = (visible >= GLARE).all(1)
        return found

    def _boxed(self, category: Category, batch: dict[str, Any]) -> Tensor:
        assert self.boxes is not None
        inside = torch.zeros_like(batch["semantic"], dtype=torch.bool)
        H, W = inside.shape[1:]
        for i, where in enumerate(zip(batch["source"], batch["name"])):
            for box in self.boxes.of(*where):
                if box.kind.lower() in category.boxes:
                    top, bottom, left, right = pixels(box, H, W)
                    inside[i, top:bottom, left:right] = True
        return inside


def label_set_of(pairs: Pairs) -> str | None:
    """The label set of the class maps of these pairs; None without such maps."""
    source, configured = pairs.source, pairs.cfg.labels.material_source
    if not source.has_semantic:
        return None
    return source.table or (configured if configured in CLASSES else None)


def errors(image: Tensor, true: Tensor, masks: dict[str, Tensor]) -> list[list[dict[str, Any]]]:
    """By image of the batch: a dict a category that it shows, of category, pixels, mae, bias and,
    if the region has surroundings, contrast and true_contrast.

    bias: mean of what the image shows less the truth, above 0 where it is too warm. contrast: mean
    inside less the mean of the RING pixels around.
    Args: image, true: (B, 1, H, W) in [0, 1]. masks: see Atlas.masks.
    """
    difference = (image - true).double()[:, 0]
    rows: list[list[dict[str, Any]]] = [[] for _ in image]
    for name, mask in masks.items():
        wide = F.max_pool2d(mask[:, None].float(), 2 * RING + 1, stride=1, padding=RING)
        rings = (wide[:, 0] > 0) & ~mask
        for i, row in enumerate(rows):
            inside, ring = mask[i], rings[i]
            if (count := int(inside.sum())) < LEAST:
                continue
            own = difference[i][inside]
            found = {"category": name, "pixels": count}
            found |= {"mae": own.abs().mean().item(), "bias": own.mean().item()}
            if ring.any():
                for key, x in (("contrast", image), ("true_contrast", true)):
                    values = x[i, 0].double()
                    found[key] = (values[inside].mean() - values[ring].mean()).item()
            row.append(found)
    return rows


def summarise(rows: list[dict], indices: list[int], not_measured: dict[str, str]) -> dict[str, Any]:
    """The entry `failures` of results.json: by category images, pixels and each method's numbers.

    mae and bias are averaged over pixels, so a region counts by its size; contrast_ratio is the
    sum of the regions' contrasts over that of the true ones. Images are resampled as a whole.
    Args: rows: dicts of `errors` with index and method. indices: of all images.
    """
    place = {index: i for i, index in enumerate(indices)}
    weights = bootstrap.weights(len(indices))
    measured: dict[str, Any] = {}
    missing = dict(not_measured)
    for name in (EVERYWHERE, *CATEGORIES, AT_NIGHT, IN_GLARE):
        of_category = [row for row in rows if row["category"] == name]
        if not of_category:
            missing.setdefault(name, "recognisable, but in none of these images")
            continue
        methods = list(dict.fromkeys(row["method"] for row in of_category))
        first = [row for row in of_category if row["method"] == methods[0]]
        measured[name] = {
            "images": len(first),
            "pixels": sum(row["pixels"] for row in first),
            "methods": {
                m: _numbers([row for row in of_category if row["method"] == m], place, weights)
                for m in methods
            },
        }
    return {"told": measured, "untold": missing}


def _numbers(rows: list[dict], place: dict[int, int], weights: np.ndarray) -> dict[str, Any]:
    parts = {name: np.zeros((2, len(place))) for name in ("mae", "bias", "contrast_ratio")}
    for row in rows:
        i = place[row["index"]]
        for name in ("mae", "bias"):
            parts[name][:, i] += row[name] * row["pixels"], row["pixels"]
        if "contrast" in row:
            sign = 1 if row["true_contrast"] >= 0 else -1
            parts["contrast_ratio"][:, i] += row["contrast"] * sign, abs(row["true_contrast"])
    found: dict[str, Any] = {}
    for name, (sums, counts) in parts.items():
        if counts.any():
            found[name] = bootstrap.mean(sums, counts)
            found[f"{name}_interval"] = bootstrap.interval(bootstrap.means(sums, counts, weights))
    return found


def table(failures: dict[str, Any], methods: list[str]) -> list[str]:
    """Markdown: a row per category and method."""
    lines = ["| where | images | pixels | method | MAE | bias | contrast ratio |", "|---" * 7 + "|"]
    whole = failures["told"][EVERYWHERE]["pixels"]
    for name, found in failures["told"].items():
        share = f"{100 * found['pixels'] / whole:.1f} %"
        for method in (m for m in methods if m in found["methods"]):
            own = found["methods"][method]
            numbers = [_cell(own, key) for key in ("mae", "bias", "contrast_ratio")]
            cells = [name, str(found["images"]), share, method, *numbers]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def sentences(failures: dict[str, Any]) -> list[str]:
    """What is not in the table, and why."""
    return [f"not measured: {name} ({reason})" for name, reason in failures["untold"].items()]


def worst(rows: list[dict], method: str) -> dict[str, dict]:
    """Category -> the row of the image in which `method` has its largest error there."""
    found: dict[str, dict] = {}
    for row in rows:
        if row["method"] == method and row["category"] != EVERYWHERE:
            best = found.get(row["category"])
            if best is None or row["mae"] > best["mae"]:
                found[row["category"]] = row
    return {name: found[name] for name in (*CATEGORIES, AT_NIGHT, IN_GLARE) if name in found}


def _cell(own: dict[str, Any], name: str) -> str:
    if name not in own:
        return ""
    low, high = own[f"{name}_interval"]
    text = f"{own[name]:{'+' if name == 'bias' else ''}.3f}"
    return f"{text} ± {(high - low) / 2:.3f}" if math.isfinite(high - low) else text
