"""Convolutions over pixels computed over cells of 2x2 pixels, which GPUs do several times faster.

Dimension key:  O, C channels of the kernel   B batch   h, w pixels   a, s (b, t) a pixel of a cell
                j (i) cell before, same, after   k (l) tap before, same, after
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EVEN = 8  # channels of a product that GPUs compute fast are a multiple of it


class CellKernels(nn.Module):
    """3x3 kernels over pixels as 3x3 kernels over cells of 2x2 pixels: same values, other shapes.

    GPUs are slow where a convolution has few channels and many pixels; over cells it has four times
    the channels and a quarter of the places. Channels of a cell lie as F.pixel_unshuffle has them.
    """

    def __init__(self):
        super().__init__()
        # [a, j, k]: what the pixel that tap k meets, seen from pixel a of a cell, owes to cell j
        doubled = (
            torch.tensor([[[3, 1, 0], [1, 3, 3], [0, 0, 1]], [[1, 0, 0], [3, 3, 1], [0, 1, 3]]]) / 4
        )
        # [a, s, j, k]: 1 where that pixel is pixel s of cell j
        pixel = torch.zeros(2, 2, 3, 3)
        for a in range(2):
            for k in range(3):
                j, s = divmod(a + k - 1, 2)
                pixel[a, s, j + 1, k] = 1
        both = torch.einsum("ajk,bil->klabji", doubled, doubled).flatten(0, 1).flatten(1)
        self.register_buffer("_doubled", both, persistent=False)  # (9, 36)
        both = torch.einsum("asjk,btil->klabstji", pixel, pixel).flatten(0, 1).flatten(1)
        self.register_buffer("_pixels", both, persistent=False)  # (9, 144)

    def of_doubled(self, weight: Tensor) -> Tensor:
        """(O, C, 3, 3), meant for a map that is doubled bilinearly -> (4 O, C, 3, 3) for the map.

        Around the map both see zeros: it is as if they were doubled with it.
        """
        found = self._expand(weight, self._doubled)  # (O, C, 4 * 9)
        return found.unflatten(2, (4, 3, 3)).transpose(1, 2).flatten(0, 1)

    def of_pixels(self, weight: Tensor) -> Tensor:
        """(O, C, 3, 3), meant for a map -> (4 O, 4 C, 3, 3) for its F.pixel_unshuffle by 2."""
        found = self._expand(weight, self._pixels)  # (O, C, 4 * 4 * 9)
        return found.unflatten(2, (4, 4, 3, 3)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def convolve(self, conv: nn.Conv2d, image: Tensor) -> Tensor:
        """F.pixel_unshuffle of `conv` (3x3, zeros around) of an image: (B, 4 C, h/2, w/2)."""
        cells, weight = for_product(F.pixel_unshuffle(image, 2), self.of_pixels(conv.weight))
        return F.conv2d(cells, weight, conv.bias.repeat_interleave(4), padding=1)

    @staticmethod
    def _expand(weight: Tensor, table: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # it would sum in bf16
            return weight.flatten(2) @ table


def strided_over_cells(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """`conv` (7x7, stride 2, padding 3, no bias) of an image with even sides, as 4x4 over cells."""
    # one more tap in front, of zero: then taps 2 j and 2 j + 1 meet the two pixels of one cell
    by_cell = F.pad(conv.weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    weight = by_cell.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (O, C * 2 * 2, 4, 4)
    cells, weight = for_product(F.pixel_unshuffle(image, 2), weight)
    return F.conv2d(F.pad(cells, (2, 1, 2, 1)), weight)


def for_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """An input and its kernel as GPUs convolve them fastest: the same values in another layout.

    Channels last, and filled up with empty ones to a multiple of 8.
    """
    if not x.is_cuda:
        return x, weight
    extra = -x.shape[1] % EVEN
    return tuple(
        F.pad(y, (0, 0, 0, 0, 0, extra)).contiguous(memory_format=torch.channels_last)
        for y in (x, weight)
    )
