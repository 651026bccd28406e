"""The 32 materials of the material map, and the tables that map the classes of label sets to them.

A material id means the same in every image of every data set. Class ids (of a label set) become
material ids through `TABLES`, never through anything computed from one image.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.label_sets import CLASSES, PALETTES
from utils.labels import IGNORE

NUM_MATERIALS = 32


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


# No value was measured for this project. Tables in camera manuals differ by a few hundredths
# between samples, finishes and bands; spectral libraries hold spectra, and what is quoted from them
# are band means, rounded. Where tables disagree by more, the range stands beside the value.
_TABLE = "approximate: emissivity tables of thermal camera manuals"
_LIBRARY = "approximate: as quoted from the ECOSTRESS (ASTER) and MODIS UCSB spectral libraries"
_GUESS = "a guess by likeness to other entries"

MATERIALS = (
    Material(
        "sky", 1.00, "convention: a sky is described by its brightness temperature", (70, 130, 180)
    ),
    Material("asphalt", 0.95, _TABLE + ", paving 0.90-0.98", (90, 90, 100)),
    Material("concrete", 0.94, _TABLE + ", 0.92-0.97", (190, 190, 190)),
    Material("brick", 0.93, _TABLE + ", red brick 0.93-0.96", (178, 60, 40)),
    Material("stone", 0.91, _LIBRARY + "; granite in tables 0.77-0.97", (150, 130, 110)),
    Material("plaster", 0.92, _TABLE + ", rough coat 0.91, others 0.80-0.93", (250, 220, 170)),
    Material(
        "glass", 0.85, _TABLE + ", 0.80-0.97; low, as windows are often seen aslant", (0, 200, 230)
    ),
    Material("painted metal", 0.92, _TABLE + ", oil paint 0.94, lacquer 0.80-0.95", (0, 0, 160)),
    Material(
        "bare metal",
        0.25,
        _TABLE + ", 0.05 polished to 0.3 weathered and galvanised",
        (220, 0, 220),
    ),
    Material("foliage", 0.98, _LIBRARY + ", green leaves and canopies 0.97-0.99", (20, 110, 30)),
    Material("grass", 0.98, _LIBRARY + ", green 0.98, dry 0.95", (120, 230, 60)),
    Material("bark", 0.95, _LIBRARY + ", 0.94-0.97", (90, 50, 20)),
    Material("wood", 0.90, _TABLE + ", planed oak 0.90", (200, 140, 70)),
    Material("soil", 0.95, _TABLE + ", dry 0.92, wet 0.95", (130, 80, 50)),
    Material("sand", 0.90, _TABLE + ", 0.76-0.90; quartz is low from 8 to 9.5 um", (240, 210, 90)),
    Material("gravel", 0.93, _GUESS + ", between stone and soil", (160, 160, 120)),
    Material("water", 0.97, _LIBRARY + ", 0.98, tables 0.96; falls at grazing view", (20, 60, 255)),
    Material(
        "snow and ice", 0.97, _LIBRARY + ", 0.96-0.99; total-band tables 0.80-0.98", (235, 245, 255)
    ),
    Material("rubber", 0.94, _TABLE + ", black rubber 0.94", (30, 30, 30)),
    Material("plastic", 0.92, _TABLE + ", 0.85-0.96", (255, 128, 0)),
    Material("skin", 0.98, _TABLE + ", human skin 0.98", (255, 170, 140)),
    Material(
        "textile", 0.90, _TABLE + ", textiles 0.90; cotton 0.77, black cloth 0.98", (255, 0, 90)
    ),
    Material("animal coat", 0.96, _GUESS + ", between textile and skin", (140, 100, 140)),
    Material("leather", 0.90, _TABLE + ", which disagree: 0.75-0.98", (110, 20, 50)),
    Material("paper", 0.93, _TABLE + ", white bond 0.93, 0.70-0.94", (255, 255, 220)),
    Material("ceramic", 0.92, _TABLE + ", 0.90-0.94", (200, 255, 240)),
    Material("roof tile", 0.93, _TABLE + ", fired clay 0.91, slate 0.97", (230, 90, 20)),
    Material("carpet", 0.92, _GUESS + ", a textile with depth", (160, 0, 200)),
    Material("food", 0.96, _GUESS + ", near water", (180, 220, 0)),
    Material("lamp", 0.90, _GUESS + ", glass and polymers", (255, 240, 0)),
    Material("screen", 0.88, _GUESS + ", coated glass and polymers", (0, 120, 110)),
    Material("mixed object", 0.92, _GUESS + ", things of several materials", (128, 0, 128)),
)
_ID = {m.name: i for i, m in enumerate(MATERIALS)}


def _table(classes: tuple[tuple[str, str | None], ...]) -> np.ndarray:
    ids = [IGNORE if material is None else _ID[material] for _, material in classes]
    return np.array(ids, dtype=np.uint8)


# label set -> (classes,) uint8: class id to material id, IGNORE where a class has none
TABLES = {name: _table(classes) for name, classes in CLASSES.items()}
CLASS_NAMES = {name: tuple(c for c, _ in classes) for name, classes in CLASSES.items()}

_UNLABELLED_COLOR = (0, 0, 0)  # in palettes where no class is black


def material_table(name: str) -> torch.Tensor:
    """(256,) int64: material id for every class id a byte can hold, IGNORE beyond the table.

    Raises: ValueError: unknown label set.
    """
    padded = torch.full((256,), IGNORE, dtype=torch.int64)
    table = TABLES[_known(name, TABLES)]
    padded[: len(table)] = torch.from_numpy(table).long()
    return padded


def material_colors() -> np.ndarray:
    """(32, 3) uint8 RGB, for panels."""
    return np.array([m.color for m in MATERIALS], dtype=np.uint8)


def emissivity_prior() -> torch.Tensor:
    """(32,) float32: emissivity of each material, 8-14 um."""
    return torch.tensor([m.emissivity for m in MATERIALS])


def decode_palette(rgb: np.ndarray, palette_name: str) -> np.ndarray:
    """Coloured class image (H, W, 3) uint8 -> class ids (H, W) uint8; black without a class is 255.

    Raises: ValueError: not such an array; unknown palette; a colour that is not in the palette (as
        resized or JPEG-compressed label images have), or that stands for two classes there.
    """
    palette = PALETTES[_known(palette_name, PALETTES)]
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"a coloured class image is (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    codes, inverse, counts = np.unique(_pack(rgb), return_inverse=True, return_counts=True)
    known = _pack(palette)
    ids = np.empty(len(codes), dtype=np.uint8)
    for i, (code, count) in enumerate(zip(codes, counts)):
        matches = np.flatnonzero(known == code)
        color = (int(code) >> 16, int(code) >> 8 & 255, int(code) & 255)
        if len(matches) > 1:
            names = " and ".join(CLASS_NAMES[palette_name][m] for m in matches)
            raise ValueError(
                f"colour {color} ({count} pixels) stands for {names} in palette "
                f"'{palette_name}': store class ids instead of colours"
            )
        if len(matches) == 0 and color != _UNLABELLED_COLOR:
            raise ValueError(
                f"colour {color} ({count} of {inverse.size} pixels) is not in palette "
                f"'{palette_name}'; {len(codes)} colours in the image"
            )
        ids[i] = matches[0] if len(matches) else IGNORE
    return ids[inverse].reshape(rgb.shape[:2])


def _pack(rgb: np.ndarray) -> np.ndarray:
    wide = rgb.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _known(name: str, of: dict) -> str:
    if name not in of:
        raise ValueError(f"unknown label set '{name}'; known are {', '.join(of)}")
    return name


@dataclass(frozen=True)
class ClassBalance:
    """How often each material occurs in a collection of label images."""

    pixels: np.ndarray  # (32,) int64
    images: np.ndarray  # (32,) int64: images that have the material
    unlabelled: int  # pixels without a material
    total_images: int

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Material name -> share of the labelled pixels and share of the images, in [0, 1]."""
        labelled, images = max(int(self.pixels.sum()), 1), max(self.total_images, 1)
        return {
            MATERIALS[i].name: {
                "pixels": float(self.pixels[i] / labelled),
                "images": float(self.images[i] / images),
            }
            for i in np.argsort(-self.pixels, kind="stable")
            if self.pixels[i]
        }
