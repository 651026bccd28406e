"""Labels for the three maps of stage 1, made from an image pair and its class map.

intensity is how hot a place looks, material what it is made of, context what surrounds it in the
visible. None is a measurement: one broad band cannot tell temperature from emissivity.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data.materials import NUM_MATERIALS, TABLES, material_table
from utils.labels import IGNORE
from utils.problems import Checked

QUANTIZED, NONE = "quantized", "none"
MATERIAL_SOURCES = (*TABLES, QUANTIZED, NONE)
INTENSITIES = ("minmax", "window")
CONTEXT_CHANNELS = (
    "brightness",
    "contrast",
    "red",
    "green",
    "shadow",
    "|dx|",
    "|dy|",
    "texture",
)

SHADOW_BELOW = 0.3  # brightness


@dataclass(kw_only=True)
class LabelConfig(Checked):
    """Where the labels come from."""

    # label set of the class maps (synthetic, ade20k, cityscapes, msrs); quantized: 32 grey levels
    # of the visible image, a smoke test, not materials; none: no material labels
    material_source: str = "synthetic"
    intensity: str = "minmax"  # minmax: stretch each image; window: calibrated, as it is
    fourth_root: bool = False  # intensity ** (1/4), nearer to temperature than to radiance

    def problems(self) -> Iterator[str]:
        if self.material_source not in MATERIAL_SOURCES:
            yield (
                f"labels.material_source is '{self.material_source}', "
                f"must be one of {', '.join(MATERIAL_SOURCES)}"
            )
        if self.intensity not in INTENSITIES:
            yield (
                f"labels.intensity is '{self.intensity}', must be one of {', '.join(INTENSITIES)}"
            )


class PseudoLabels(NamedTuple):
    """Labels on the inputs' device, without gradient."""

    intensity: Tensor  # (B, 1, H, W) float32 in [0, 1]
    material: Tensor  # (B, H, W) int64 in 0..31, 255 = ignored
    context: Tensor  # (B, 8, H, W) float32 in [0, 1], CONTEXT_CHANNELS in this order


@torch.no_grad()
def prepare_pseudo_labels(
    visible: Tensor, infrared: Tensor, semantic: Tensor, cfg: LabelConfig
) -> PseudoLabels:
    """Labels of a batch, computed where it lies and without waiting for the device.

    Args:
        visible: (B, 3, H, W) in [0, 1].
        infrared: (B, 3, H, W) or (B, 1, H, W) in [0, 1]; channels are averaged.
        semantic: (B, H, W) int64 class ids of cfg.material_source, 255 = unlabelled. Whoever reads
            them has checked that they lie in that label set.
    Raises: ValueError: shapes that do not belong together.
    """
    B, _, H, W = visible.shape if visible.ndim == 4 else (0, 0, 0, 0)
    wanted = {(B, 3, H, W), (B, 1, H, W)}
    if (
        visible.shape != (B, 3, H, W)
        or tuple(infrared.shape) not in wanted
        or semantic.shape != (B, H, W)
    ):
        raise ValueError(
            "visible, infrared and semantic must be (B,3,H,W), (B,3 or 1,H,W) and (B,H,W), got "
            f"{tuple(visible.shape)}, {tuple(infrared.shape)} and {tuple(semantic.shape)}"
        )
    visible = visible.float()
    return PseudoLabels(
        intensity=intensity_labels(infrared.float(), cfg),
        material=material_labels(visible, semantic, cfg),
        context=context_labels(visible),
    )


def intensity_labels(infrared: Tensor, cfg: LabelConfig) -> Tensor:
    """Grey infrared (B, C, H, W) -> (B, 1, H, W) in [0, 1]. A flat image becomes 0 by min-max."""
    grey = infrared.mean(dim=1, keepdim=True)
    if cfg.intensity == "minmax":
        low = grey.amin(dim=(2, 3), keepdim=True)
        span = grey.amax(dim=(2, 3), keepdim=True) - low
        grey = torch.where(span > 1e-6, (grey - low) / span.clamp(min=1e-6), 0.0)
    grey = grey.clamp(0.0, 1.0)
    return grey**0.25 if cfg.fourth_root else grey


def material_labels(visible: Tensor, semantic: Tensor, cfg: LabelConfig) -> Tensor:
    """Class ids (B, H, W) -> material ids through the label set's fixed table."""
    if cfg.material_source == NONE:
        return torch.full_like(semantic, IGNORE, dtype=torch.int64)
    if cfg.material_source == QUANTIZED:
        levels = (visible.mean(dim=1) * NUM_MATERIALS).long()
        return levels.clamp(0, NUM_MATERIALS - 1)
    return _table_on(cfg.material_source, semantic.device)[semantic.long()]


@torch.compiler.assume_constant_result  # a compiled step holds the table itself
def _table_on(name: str, device: torch.device) -> Tensor:
    return _table_of(name, device)


@lru_cache  # a copy per device, not per batch
def _table_of(name: str, device: torch.device) -> Tensor:
    return material_table(name).to(device)


def context_labels(visible: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 8, H, W): see CONTEXT_CHANNELS.

    brightness is the mean of R, G and B, contrast their standard deviation, shadow 1 where
    brightness < 0.3; |dx| and |dy| are differences to the next pixel (0 at the far edge), texture
    their mean.
    """
    brightness = visible.mean(dim=1, keepdim=True)
    contrast = visible.std(dim=1, keepdim=True, correction=0)
    shadow = (brightness < SHADOW_BELOW).float()
    dx = F.pad((brightness[..., :, 1:] - brightness[..., :, :-1]).abs(), (0, 1, 0, 0))
    dy = F.pad((brightness[..., 1:, :] - brightness[..., :-1, :]).abs(), (0, 0, 0, 1))
    channels = [
        brightness,
        contrast,
        visible[:, 0:1],
        visible[:, 1:2],
        shadow,
        dx,
        dy,
        (dx + dy) / 2,
    ]
    return torch.cat(channels, dim=1)
