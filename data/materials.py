"""The 32 materials of the material map, and the tables that give every class of a label set one.

A material id means the same in every image of every data set. Class ids (of a label set) become
material ids through `TABLES`, never through anything computed from one image.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.label_sets import CLASSES, PALETTES

NUM_MATERIALS = 32
IGNORE = 255        # unlabelled, in class maps and in material maps


@dataclass(frozen=True)
class Material:
    """One material.

    Args:
        emissivity: prior for 8-14 um, broadband, near-normal view, in (0, 1]
        source: where the value comes from; handbook ranges are approximate, single numbers more so
        color: RGB for panels, distinct from every other material's
    """

    name: str
    emissivity: float
    source: str
    color: tuple[int, int, int]


# Spectral libraries give reflectance of samples; the values here are their band means rounded to
# 0.01, or the middle of a handbook's range. None was measured for this project.
_ECO = "approximate band mean of the ECOSTRESS (formerly ASTER) spectral library, JPL"
_UCSB = "approximate band mean of the MODIS UCSB emissivity library, Wan et al."
_BOOK = "approximate, middle of the range in thermography handbooks' emissivity tables"
_GUESS = "approximate, by similarity to other materials of this table"

MATERIALS = (
    Material("sky", 1.00, "convention: a sky is described by its brightness temperature",
             (70, 130, 180)),
    Material("asphalt", 0.95, _ECO + " (construction asphalt)", (90, 90, 100)),
    Material("concrete", 0.94, _ECO + " (construction concrete)", (190, 190, 190)),
    Material("brick", 0.93, _UCSB + " (red brick)", (178, 60, 40)),
    Material("stone", 0.91, _ECO + " (granite, limestone; spectra vary by 0.1)", (150, 130, 110)),
    Material("plaster", 0.92, _BOOK + " (rough lime plaster 0.91-0.93)", (250, 220, 170)),
    Material("glass", 0.85, _BOOK + " (smooth window glass 0.82-0.92)", (0, 200, 230)),
    Material("painted metal", 0.92, _BOOK + " (oil paints 0.89-0.96, any colour)", (0, 0, 160)),
    Material("bare metal", 0.25, _BOOK + " (galvanised steel 0.23-0.28, aluminium down to 0.05)",
             (220, 0, 220)),
    Material("foliage", 0.98, _ECO + " (green leaves, canopy 0.97-0.99)", (20, 110, 30)),
    Material("grass", 0.98, _ECO + " (green grass; dry grass about 0.95)", (120, 230, 60)),
    Material("bark", 0.95, _UCSB + " (tree bark)", (90, 50, 20)),
    Material("wood", 0.91, _BOOK + " (planed timber 0.88-0.93)", (200, 140, 70)),
    Material("soil", 0.95, _ECO + " (loams 0.94-0.98)", (130, 80, 50)),
    Material("sand", 0.91, _ECO + " (quartz sand, low between 8 and 9.5 um)", (240, 210, 90)),
    Material("gravel", 0.94, _GUESS + " (loose stone, between stone and soil)", (160, 160, 120)),
    Material("water", 0.98, _UCSB + " (water; falls at grazing view)", (20, 60, 255)),
    Material("snow and ice", 0.98, _UCSB + " (snow 0.98-0.99, ice 0.96-0.98)", (235, 245, 255)),
    Material("rubber", 0.94, _BOOK + " (hard rubber 0.94-0.95)", (30, 30, 30)),
    Material("plastic", 0.93, _BOOK + " (opaque polymers 0.90-0.95)", (255, 128, 0)),
    Material("skin", 0.98, _BOOK + " (human skin 0.97-0.99)", (255, 170, 140)),
    Material("textile", 0.92, _BOOK + " (cloth; tables disagree, 0.77-0.98)", (255, 0, 90)),
    Material("animal coat", 0.97, _BOOK + " (fur and feathers 0.95-0.99)", (140, 100, 140)),
    Material("leather", 0.95, _BOOK + " (tanned leather 0.95-1.00)", (110, 20, 50)),
    Material("paper", 0.92, _BOOK + " (white paper 0.88-0.95)", (255, 255, 220)),
    Material("ceramic", 0.92, _BOOK + " (glazed tile and porcelain 0.90-0.94)", (200, 255, 240)),
    Material("roof tile", 0.93, _UCSB + " (clay and slate tiles)", (230, 90, 20)),
    Material("carpet", 0.93, _GUESS + " (textile with a deep pile)", (160, 0, 200)),
    Material("food", 0.96, _GUESS + " (moist organic matter, near water)", (180, 220, 0)),
    Material("lamp", 0.90, _GUESS + " (glass and polymer housings)", (255, 240, 0)),
    Material("screen", 0.88, _GUESS + " (coated glass and polymer)", (0, 120, 110)),
    Material("mixed object", 0.92, _GUESS + " (objects of several materials)", (128, 0, 128)),
)
_ID = {m.name: i for i, m in enumerate(MATERIALS)}


def _table(classes: tuple[tuple[str, str | None], ...]) -> np.ndarray:
    ids = [IGNORE if material is None else _ID[material] for _, material in classes]
    return np.array(ids, dtype=np.uint8)


# class id -> material id, IGNORE where a class says nothing about what a thing is made of
TABLES = {name: _table(classes) for name, classes in CLASSES.items()}
CLASS_NAMES = {name: tuple(c for c, _ in classes) for name, classes in CLASSES.items()}
