"""ResNet that splits a photograph into what a thermal camera responds to: three proxy maps.

Intensity says how hot a place looks, material what it is made of, context what surrounds it. None
of them is in kelvin: one broadband channel cannot tell temperature from emissivity.

Dimension key:  B batch   H, W pixels of the photograph   h, w the same, padded to multiples of 32
                D width of the features under the heads   M materials   C context channels
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders import EFFICIENTNET, EfficientNetLite2, our_names, package_file
from utils.problems import Checked

STRIDE = 32  # of the encoder: pixels per position of its last map

# Mean and deviation of the photographs that torchvision's ImageNet weights were trained on.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class DecompositionConfig(Checked):
    backbone: Literal["resnet18", "resnet34", "resnet50", "efficientnet_lite2"] = "resnet50"
    # none, imagenet (downloaded; for efficientnet_lite2 from pip), or a .pth or .safetensors file
    pretrained: str = "none"
    decoder: Literal["plain", "skips"] = "skips"  # skips: uses the encoder's maps of every size
    width: int = 128  # D, channels under the heads; the decoder's steps have 4 D, 2 D and D
    num_materials: int = 32
    num_context_channels: int = 8

    def problems(self) -> Iterator[str]:
        for key in ("width", "num_materials", "num_context_channels"):
            if getattr(self, key) < 1:
                yield f"model.{key} must be at least 1, got {getattr(self, key)}"


class Maps(NamedTuple):
    """The decomposition of a scene; all fp32."""

    intensity: Tensor  # (B, 1, H, W) in (0, 1)
    material: Tensor  # (B, M, H, W) logits
    context: Tensor  # (B, C, H, W)


class MultiTaskDecompositionNet(nn.Module):
    """Photographs (B, 3, H, W) in [0, 1], any H and W -> Maps of the same size.

    Raises: ValueError: pretrained weights that do not fit.
    """

    def __init__(self, cfg: DecompositionConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = _encoder(cfg.backbone)
        decoder = PlainDecoder if cfg.decoder == "plain" else SkipDecoder
        self.decoder = decoder(self.encoder.channels, cfg.width)
        D, half = cfg.width, max(cfg.width // 2, 1)
        quarter = max(cfg.width // 4, 1)
        detail = self.decoder.detail_channels
        self.intensity_head = Head([D, half, quarter, 1], detail)
        self.material_head = Head([D, half, cfg.num_materials], detail)
        self.context_head = Head([D, half, cfg.num_context_channels], detail)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        if cfg.pretrained != "none":
            load_backbone(self.encoder, cfg.backbone, cfg.pretrained)

    def forward(self, visible: Tensor) -> Maps:
        """(B, 3, H, W) in [0, 1] -> Maps.

        Raises: ValueError: not (B, 3, H, W), or too little to estimate BatchNorm statistics from.
        """
        if visible.ndim != 4 or visible.shape[1] != 3:
            raise ValueError(f"visible must be (B, 3, H, W), got {tuple(visible.shape)}")
        H, W = visible.shape[-2:]
        x = pad_to_multiple((visible - self.mean) / self.std, STRIDE)  # (B, 3, h, w)
        self._check_statistics(x)
        features = self.encoder(x)
        x, detail = self.decoder(features, x)  # of full size, or of half with detail
        intensity, material, context = (y[..., :H, :W].float() for y in self.heads(x, detail))
        return Maps(intensity.sigmoid(), material, context)

    def heads(self, x: Tensor, detail: Tensor | None) -> list[Tensor]:
        """Intensity and material before their sigmoid and softmax, and context, at full size."""
        heads = self.intensity_head, self.material_head, self.context_head
        return [head(x, detail) for head in heads]

    def _check_statistics(self, x: Tensor) -> None:
        """BatchNorm's own message names no remedy."""
        positions = x.shape[0] * (x.shape[2] // STRIDE) * (x.shape[3] // STRIDE)
        if positions == 1 and self.encoder.last_norm.training:
            raise ValueError(
                f"training on one image of at most {STRIDE}x{STRIDE} pixels leaves BatchNorm one "
                "value per channel; use a larger training.batch_size or data.size"
            )


class Encoder(nn.Module):
    """torchvision's ResNet without pooling and classifier, under torchvision's parameter names."""

    def __init__(self, backbone: str):
        super().__init__()
        resnet = getattr(torchvision.models, backbone)(weights=None)
        self.conv1, self.bn1, self.maxpool = resnet.conv1, resnet.bn1, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        last = resnet.fc.in_features  # 512 or 2048
        self.channels = (64, last // 8, last // 4, last // 2, last)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> five maps, of 1/2, 1/4, 1/8, 1/16 and 1/32 of the size."""
        features = [F.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.layer4[-1].bn1


class PlainDecoder(nn.Module):
    """The reference: only the last map, doubled three times, then enlarged to full size."""

    detail_channels = 0

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        widths = [channels[-1], 4 * width, 2 * width, width]
        self.steps = nn.ModuleList(_block(a, b) for a, b in pairwise(widths))

    def forward(self, features: list[Tensor], image: Tensor) -> tuple[Tensor, None]:
        x = features[-1]  # (B, channels, h/32, w/32)
        for step in self.steps:
            x = step(_enlarge(x, 2))  # (B, 4 D, h/16, w/16), (B, 2 D, h/8, w/8), (B, D, h/4, w/4)
        return _enlarge(x, 4), None  # (B, D, h, w)


class SkipDecoder(nn.Module):
    """U-Net: each doubling sees the encoder's map of its size, and the heads see the photograph.

    The heads run at half the size, which is what their features can resolve. Only their last layer
    works on doubled features, beside a few channels computed from the pixels: sharp edges for less
    arithmetic than the plain decoder's heads.
    Source: Ronneberger et al. 2015 (arXiv:1505.04597).
    """

    detail_channels = 16

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        widths = [channels[-1], 4 * width, 2 * width, width, width]
        skips = channels[-2::-1]  # of 1/16, 1/8, 1/4 and 1/2 of the size
        self.steps = nn.ModuleList(
            _block(a + skip, b) for a, b, skip in zip(widths, widths[1:], skips)
        )
        self.detail = nn.Conv2d(3, self.detail_channels, 3, padding=1)
        _he(self.detail)

    def forward(self, features: list[Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
        x = features[-1]  # (B, channels, h/32, w/32)
        for step, skip in zip(self.steps, features[-2::-1]):
            x = step(torch.cat([_enlarge(x, 2), skip], dim=1))
        return x, F.relu(self.detail(image))  # (B, D, h/2, w/2), (B, 16, h, w)


class Head(nn.Module):
    """Convolutions through `widths`; the last one at full size, beside the detail if any."""

    def __init__(self, widths: list[int], detail_channels: int):
        super().__init__()
        self.hidden = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths[:-1]))
        self.last = nn.Conv2d(widths[-2] + detail_channels, widths[-1], 3, padding=1)
        for conv in self.hidden:
            _he(conv)
        # outputs start near zero: materials at chance, intensity at 0.5, no saturated sigmoid
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, detail: Tensor | None) -> Tensor:
        """x (B, D, h, w) at full size; or of half the size, beside detail at full size."""
        for conv in self.hidden:
            x = F.relu(conv(x))
        if detail is None:
            return self.last(x)
        # padded before it is doubled, so that it fades into the zeros around the image
        x = _enlarge(F.pad(x, (1, 1, 1, 1)), 2)[..., 1:-1, 1:-1]  # one pixel around the image
        both = torch.cat([x, F.pad(detail, (1, 1, 1, 1))], dim=1)
        return F.conv2d(both, self.last.weight, self.last.bias)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) grown at the bottom and right: reflected, or the edge repeated if too small."""
    for axis in (-1, -2):
        size = image.shape[axis]
        extra = -size % multiple
        mode = "reflect" if extra < size else "replicate"
        if extra:
            image = F.pad(image, (0, extra, 0, 0) if axis == -1 else (0, 0, 0, extra), mode=mode)
    return image


def _encoder(backbone: str) -> nn.Module:
    if backbone == EFFICIENTNET:
        return EfficientNetLite2(IMAGENET_MEAN, IMAGENET_STD)
    return Encoder(backbone)


def load_backbone(encoder: nn.Module, backbone: str, source: str) -> None:
    """Put ImageNet weights (`source` = imagenet) or those of a local file into the encoder.

    Raises:
        ValueError: the file is missing or damaged, or holds another architecture.
        OSError: the ImageNet weights cannot be fetched.
    """
    state = _fetch(backbone) if source == "imagenet" else _read(Path(source))
    state = {name.removeprefix("module."): x for name, x in state.items()}
    if backbone == EFFICIENTNET:
        state = our_names(state)
    state = {name: x for name, x in state.items() if not name.startswith("fc.")}
    expected = encoder.state_dict()
    # files from before 2017 lack this counter, which no forward pass reads
    counters = {name: x for name, x in expected.items() if name.endswith("num_batches_tracked")}
    state = {**counters, **state}
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    )
    if wrong:
        name = wrong[0]
        found = tuple(state[name].shape) if name in state else "missing"
        wanted = tuple(expected[name].shape) if name in expected else "unknown"
        raise ValueError(
            f"model.pretrained={source}: not the weights of a {backbone}, {len(wrong)} entries "
            f"differ, first {name!r}: {found} in the file, {wanted} in the network"
        )
    encoder.load_state_dict(state)


def _fetch(backbone: str) -> dict[str, Tensor]:
    if backbone == EFFICIENTNET:
        return _read(package_file())
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the ImageNet weights of {backbone} cannot be fetched ({error}); set "
            "model.pretrained=none, or to a local file that holds them"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"model.pretrained={path}: no such file; set it to none, imagenet or a file of weights"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its parser met first
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model.pretrained={path}: not a file of weights: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"model.pretrained={path}: holds no table of tensors by name")
    return state


def _enlarge(x: Tensor, times: int) -> Tensor:
    return F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False)


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    _he(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


def _he(conv: nn.Conv2d) -> None:
    """He et al. 2015 (arXiv:1502.01852), Eq. 10: keeps the variance through a following ReLU."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
