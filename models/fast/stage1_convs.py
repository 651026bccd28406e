"""Stage 1's convolutions in the forms that GPUs compute fastest: the same values, other shapes.

`speed_up` replaces the forward of a Stage1 instance's parts; their weights stay where they are.
    convolutions over pixels become convolutions over blocks of 2x2 pixels (space to depth)
    the first layers of all heads are one product, and so are the last ones
    a map is doubled and joined with another in one pass (models/fast/upsample_concat.py)
    the fusion's 1x1 convolutions are products of a matrix with every pixel's channels

Dimension key:  O, C channels of the kernel   B batch   h, w pixels   a, s (b, t) a pixel of a block
                j (i) block before, same, after   k (l) tap before, same, after
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.decomposition import Encoder, Head, MultiTaskDecompositionNet, SkipDecoder
from models.fast.upsample_concat import double_beside
from models.stage1 import Stage1

EVEN = 8  # channels of a product that GPUs compute fast are a multiple of it


def speed_up(stage1: Stage1) -> None:
    """Swap the fast forms in, for this instance only."""
    net = stage1.decomposition
    if isinstance(net.encoder, Encoder):
        net.encoder.forward = partial(encode, net.encoder)
    kernels = None
    if isinstance(net.decoder, SkipDecoder):
        # a child, so that it follows the network to its device; it has no state of its own
        kernels = net.decoder.space_to_depth = SpaceToDepthKernels().to(net.mean.device)
        net.decoder.forward = partial(decode, net.decoder, kernels)
    net.heads = partial(run_heads, net, kernels)
    if stage1.fusion is not None:
        for layers in (stage1.fusion.weight, stage1.fusion.term):
            layers.forward = partial(by_pixel, layers)


def encode(encoder: Encoder, x: Tensor) -> list[Tensor]:
    """As Encoder.forward."""
    features = [F.relu(encoder.bn1(strided_space_to_depth(encoder.conv1, x)))]
    x = encoder.maxpool(features[0])
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        x = layer(x)
        features.append(x)
    return features


def decode(
    decoder: SkipDecoder, kernels: "SpaceToDepthKernels", features: list[Tensor], image: Tensor
) -> tuple[Tensor, Tensor]:
    """As SkipDecoder.forward, but for the detail: (B, 4 * 16, h/2, w/2), the blocks of its map."""
    x = features[-1]
    for step, skip in zip(decoder.steps, features[-2::-1]):
        x = step(double_beside(x, skip))
    return x, F.relu(kernels.convolve(decoder.detail, image))


def run_heads(
    net: MultiTaskDecompositionNet,
    kernels: "SpaceToDepthKernels | None",
    x: Tensor,
    detail: Tensor | None,
) -> list[Tensor]:
    """As MultiTaskDecompositionNet.heads; first and last layers of all heads are one product.

    Apart, the last ones have few channels (one, for intensity), which GPUs compute slowly.

    Args:
        detail: (B, 4 C, h, w), the blocks of a map of twice the size of x (B, D, h, w), which is
            also the size of what is returned; or None: then that size is x's.
        kernels: needed where there is detail.
    """
    heads: list[Head] = [net.intensity_head, net.material_head, net.context_head]
    first = [head.hidden[0] for head in heads]
    weight, bias = (torch.cat([getattr(c, n) for c in first]) for n in ("weight", "bias"))
    parts = F.relu(F.conv2d(x, weight, bias, padding=1)).split([len(c.bias) for c in first], dim=1)
    parts = list(parts)
    for i, head in enumerate(heads):
        for conv in head.hidden[1:]:
            parts[i] = F.relu(conv(parts[i]))
    widths, sizes = [part.shape[1] for part in parts], [len(head.last.bias) for head in heads]
    own, of_detail = zip(
        *(h.last.weight.split([n, h.last.in_channels - n], dim=1) for h, n in zip(heads, widths))
    )
    weight = torch.cat(
        [
            F.pad(rows, (0, 0, 0, 0, sum(widths[:i]), sum(widths[i + 1 :])))  # others' parts: zero
            for i, rows in enumerate(own)
        ]
    )
    bias = torch.cat([head.last.bias for head in heads])
    if detail is not None:
        parts.append(detail)
        detail_weight = kernels.of_pixels(torch.cat(of_detail))
        weight = torch.cat([kernels.of_doubled(weight), detail_weight], dim=1)
        bias = bias.repeat_interleave(4)
    made, extra = len(bias), -len(bias) % EVEN
    x, weight = for_product(torch.cat(parts, dim=1), F.pad(weight, (0, 0, 0, 0, 0, 0, 0, extra)))
    out = F.conv2d(x, weight, F.pad(bias, (0, extra)), padding=1)[:, :made]
    if detail is not None:
        out = F.pixel_shuffle(out, 2)
    return list(out.split(sizes, dim=1))


def by_pixel(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers` (1x1 convolutions and activations) of x (B, C, H, W): (B, C', H, W).

    cuDNN's 1x1 convolutions copy into another layout and back, and few channels have slow kernels;
    so they are products of a matrix with a multiple of 8 channels.
    """
    x = x.movedim(1, -1)
    for layer in layers:
        if not isinstance(layer, nn.Conv2d):
            x = layer(x)
            continue
        channels = layer.out_channels
        weight = F.pad(layer.weight.flatten(1), (0, 0, 0, -channels % EVEN))
        x = F.linear(x, weight)[..., :channels] + layer.bias
    return x.movedim(-1, 1)


class SpaceToDepthKernels(nn.Module):
    """3x3 kernels over pixels as 3x3 kernels over blocks of 2x2 pixels: same values, other shapes.

    GPUs are slow where a convolution has few channels and many pixels; over blocks it has four
    times the channels and a quarter of the places. Channels of a block lie as F.pixel_unshuffle has
    them.
    """

    def __init__(self):
        super().__init__()
        # [a, j, k]: what the pixel that tap k meets, seen from pixel a of a block, owes to block j
        doubled = (
            torch.tensor([[[3, 1, 0], [1, 3, 3], [0, 0, 1]], [[1, 0, 0], [3, 3, 1], [0, 1, 3]]]) / 4
        )
        # [a, s, j, k]: 1 where that pixel is pixel s of block j
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
        blocks, weight = for_product(F.pixel_unshuffle(image, 2), self.of_pixels(conv.weight))
        return F.conv2d(blocks, weight, conv.bias.repeat_interleave(4), padding=1)

    @staticmethod
    def _expand(weight: Tensor, table: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # it would sum in bf16
            return weight.flatten(2) @ table


def strided_space_to_depth(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """`conv` (7x7, stride 2, padding 3, no bias) of an image of even sides, 4x4 over blocks."""
    # one more tap in front, of zero: then taps 2 j and 2 j + 1 meet the two pixels of one block
    by_block = F.pad(conv.weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    weight = by_block.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (O, C * 2 * 2, 4, 4)
    blocks, weight = for_product(F.pixel_unshuffle(image, 2), weight)
    return F.conv2d(F.pad(blocks, (2, 1, 2, 1)), weight)


def for_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """An input and its kernel as GPUs convolve them fastest: the same values in another layout.

    Channels last, and filled up with empty ones to a multiple of 8.
    """
    if not x.is_cuda:
        return x, weight
    extra = -x.shape[1] % EVEN
    filled = (
        F.pad(y, (0, 0, 0, 0, 0, extra)).contiguous(memory_format=torch.channels_last)
        for y in (x, weight)
    )
    x, weight = filled
    return x, weight
