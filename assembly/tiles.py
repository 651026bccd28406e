"""Infrared for a photograph far larger than the training size, tile by tile, without seams.

Tiles overlap by a quarter or more, and where they do their images are blended by weights that rise
and fall smoothly. Each gets its part of one field of noise, so two tiles are asked for one image
where they overlap.

What a tile lacks is all that lies outside it. Stage 1 and the transformer judge how warm a surface
is by what is around it and by where it lies: of a tile they take the upper edge for the sky and the
lower one for the road. So the whole photograph is also translated at the training size, and all
that can be seen at that size comes from there; tiles add the detail that is finer.

The device holds a batch of tiles, the host a few numbers a pixel of the photograph.

Dimension key:  B batch   S, C places and channels of a state   H, W pixels
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.aspect import STEP, Shape, same_area
from data.transforms import resize_visible
from models.backbones import Backbone
from models.sampler import SamplingConfig, noise_for, translate
from models.translator import Translator
from utils import dist

OVERLAP = 0.25  # of a tile's side, at least
ROWS = 2**20  # rows of noise that a draw may have
BAND = 1024  # rows that are summed over the ranks at a time


def share(count: int, batch_size: int) -> list[list[int]]:
    """This rank's batches of `count` things, all of one length and on all ranks as many.

    A sharded model's passes are collective, and a compiled one is compiled for one length. So what
    is missing at the end is filled up, with numbers from `count` on.
    """
    each = math.ceil(count / dist.world_size())
    batches = math.ceil(each / batch_size)
    length = math.ceil(each / batches)
    mine = range(dist.rank(), batches * length * dist.world_size(), dist.world_size())
    return [list(mine[i : i + length]) for i in range(0, len(mine), length)]


def fits(photograph: Shape, tile: Shape) -> bool:
    """Whether a photograph is no larger than a tile, so that it needs none."""
    return photograph[0] <= tile[0] and photograph[1] <= tile[1]


def starts(length: int, side: int) -> list[int]:
    """Where tiles begin along an axis of `length`, evenly; both are multiples of STEP."""
    if length <= side:
        return [0]
    farthest = int((1 - OVERLAP) * side / STEP)  # from one to the next, in steps
    last = (length - side) // STEP
    count = math.ceil(last / farthest) + 1
    return [round(i * last / (count - 1)) * STEP for i in range(count)]


def weights(length: int, side: int, begins: list[int]) -> np.ndarray:
    """(tiles, side) fp32: smooth, near 0 at a tile's border; over the tiles of a place they sum up
    to 1."""
    rise = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(length)
    for begin in begins:
        total[begin : begin + side] += rise
    parts = [rise / total[begin : begin + side] for begin in begins]
    return np.stack(parts).astype(np.float32)


class NoiseField:
    """Standard normal noise over a photograph of `size`; any part of it can be drawn by itself.

    A function of (seed, key, place) alone. Made by rows of tokens, never as a whole.
    """

    def __init__(self, backbone: Backbone, size: Shape, seed: int, device: torch.device):
        places, self.channels = backbone.state_shape(STEP, STEP)
        self.panels, self.device, self.seed = backbone.panels, device, seed
        self.fine = math.isqrt(places // self.panels)  # places along a token: 1, or 16 of pixels
        self.width = size[1]

    def part(self, key: int, top: int, left: int, size: Shape) -> Tensor:
        """(S, C) for a tile of `size`, in the order of the backbone's state."""
        first, rows = top // STEP, size[0] // STEP
        shape = self.fine, self.panels, self.width // STEP * self.fine, self.channels
        draws = [key * ROWS + row for row in range(first, first + rows)]
        band = noise_for(draws, shape, self.seed, self.device).flatten(0, 1)
        left, width = (n // STEP * self.fine for n in (left, size[1]))
        return band[:, :, left : left + width].reshape(-1, self.channels)


@dataclass
class TiledTranslator:
    """Translates photographs at their own resolution. Collective: all ranks share the tiles.

    tile, trained: (H, W) of a tile and of a training image, multiples of 16.
    """

    translator: Translator
    sampling: SamplingConfig
    tile: Shape
    trained: Shape
    batch_size: int

    @torch.no_grad()
    def translate(self, photograph: np.ndarray, draw: int) -> np.ndarray:
        """Infrared (H, W) fp32 in [0, 1] of (H, W, 3) uint8; a function of (seed, draw) besides."""
        if self.sampling.mirror:
            plain = replace(self, sampling=replace(self.sampling, mirror=False))
            turned = plain.translate(photograph[:, ::-1], draw)[:, ::-1]
            return (plain.translate(photograph, draw) + turned) / 2
        height, width = photograph.shape[:2]
        whole = self._whole(photograph, draw)
        margins = (0, -height % STEP), (0, -width % STEP), (0, 0)
        padded = np.pad(photograph, margins, mode="symmetric")
        image = self._joined(padded, draw)[None, None, :height, :width]
        missing = whole - F.interpolate(image, whole.shape[-2:], mode="area")
        image += F.interpolate(missing, (height, width), mode="bicubic")
        return image[0, 0].clamp_(0, 1).numpy()

    def _whole(self, photograph: np.ndarray, draw: int) -> Tensor:
        """(1, 1, H, W): the whole photograph's infrared at about the training size."""
        size = same_area(self.trained, photograph.shape[0] / photograph.shape[1])
        visible = to_visible([resize_visible(photograph, size)], self.device)
        return translate(self.translator, visible, [draw], self.sampling).cpu()

    def _joined(self, photograph: np.ndarray, draw: int) -> Tensor:
        """(H, W) on the host: all tiles, blended. The photograph's sides are multiples of 16."""
        height, width = photograph.shape[:2]
        size = min(self.tile[0], height), min(self.tile[1], width)
        tops, lefts = starts(height, size[0]), starts(width, size[1])
        down, across = weights(height, size[0], tops), weights(width, size[1], lefts)
        tiles = [(top, left) for top in tops for left in lefts]
        seed = self.sampling.seed
        field = NoiseField(self.translator.backbone, (height, width), seed, self.device)
        canvas = torch.zeros(height, width)
        batches = share(len(tiles), self.batch_size)
        quiet = not dist.is_main() or len(batches) < 2
        for batch in tqdm(batches, desc="tiles", unit="batch", leave=False, disable=quiet):
            places = [tiles[i % len(tiles)] for i in batch]
            made = self._tiles(photograph, draw, places, size, field)
            for i, (top, left), image in zip(batch, places, made):
                if i < len(tiles):  # the others fill up
                    row, column = divmod(i, len(lefts))
                    weight = np.outer(down[row], across[column])
                    part = canvas[top : top + size[0], left : left + size[1]]
                    part += image * torch.from_numpy(weight)
        for band in canvas.split(BAND):
            band.copy_(dist.sum_over_ranks(band))
        return canvas

    def _tiles(
        self,
        photograph: np.ndarray,
        draw: int,
        places: list[tuple[int, int]],
        size: Shape,
        field: NoiseField,
    ) -> Tensor:
        """(B, H, W) on the host: the infrared of the tiles at `places`."""

        def noise_of(keys: list[int]) -> Tensor:
            parts = [field.part(key, top, left, size) for key, (top, left) in zip(keys, places)]
            return torch.stack(parts)

        cuts = [photograph[t : t + size[0], x : x + size[1]] for t, x in places]
        visible, draws = to_visible(cuts, self.device), [draw] * len(places)
        made = translate(self.translator, visible, draws, self.sampling, noise_of=noise_of)
        return made[:, 0].cpu()

    @property
    def device(self) -> torch.device:
        return next(self.translator.parameters()).device


def to_visible(images: list[np.ndarray], device: torch.device) -> Tensor:
    """(B, 3, H, W) fp32 in [0, 1] of photographs (H, W, 3) uint8 of one size."""
    stacked = torch.from_numpy(np.stack(images)).to(device)
    return stacked.permute(0, 3, 1, 2).float() / 255
