"""The panel of a scene: what went in, what stage 1 made of it, what came out, and the truth."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from utils import panels

# every kind of image a panel can have, in this order
TITLES = {
    "visible": "visible",
    "intensity": "intensity (proxy)",
    "material_label": "material, labelled",
    "material": "material, predicted",
    "context": "context, 8 channels",
    "fused": "fused infrared (stage 1)",
    "generated": "generated infrared",
    "infrared": "true infrared",
}


def scene_cells(colors: np.ndarray, **tensors: Tensor | None) -> list[dict[str, np.ndarray]]:
    """Pictures of every scene of a batch, by kind, ready for `panels.grid`.

    Args:
        colors: (M, 3) uint8, one a material.
        tensors: any of TITLES. visible (B, 3, H, W), intensity, generated (B, 1, H, W), fused and
            infrared (B, 1 or 3, H, W), all in [0, 1]; material (B, M, H, W) logits;
            material_label (B, H, W) ids; context (B, 8, H, W), each channel stretched to its own
            range. None: absent.

    Raises: ValueError: a kind that is not in TITLES.
    """
    if unknown := sorted(tensors.keys() - TITLES.keys()):
        raise ValueError(f"unknown kind of image {unknown[0]}; known are {', '.join(TITLES)}")
    given = {kind: x for kind, x in tensors.items() if x is not None}
    arrays = {kind: x.detach().float().cpu().numpy() for kind, x in given.items()}
    count = len(next(iter(arrays.values())))
    return [
        {kind: _cell(kind, arrays[kind][i], colors) for kind in TITLES if kind in arrays}
        for i in range(count)
    ]


def _cell(kind: str, image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    if kind == "visible":
        return panels.rgb(image)
    if kind == "material":
        return panels.id_colors(image.argmax(0), colors)
    if kind == "material_label":
        return panels.id_colors(image.astype(np.int64), colors)
    if kind == "context":
        low = image.min(axis=(1, 2), keepdims=True)
        high = image.max(axis=(1, 2), keepdims=True)
        return panels.mosaic((image - low) / np.maximum(high - low, 1e-6))
    return panels.thermal_colors(image.mean(0))


def scene_figure(
    cells: Sequence[dict[str, np.ndarray]],
    names: Sequence[str],
    material_names: Sequence[str],
    colors: np.ndarray,
    ids: Sequence[np.ndarray],
    heading: str = "",
) -> np.ndarray:
    """One figure (H, W, 3) uint8: a row per scene, a column per kind, with legend and colour bar.

    Args:
        cells: from `scene_cells`; names: one a scene.
        ids: maps of material ids that the legend is made from.
    """
    kinds = list(cells[0])
    return panels.grid(
        [[scene[kind] for kind in kinds] for scene in cells],
        [TITLES[kind] for kind in kinds],
        names if len(names) > 1 else (),
        panels.legend_of(ids, material_names, colors),
        heading,
        "of the infrared window",
    )
