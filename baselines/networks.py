"""The networks of the baselines: a plain U-Net, and pix2pix's generator and discriminator.

Ronneberger et al. 2015 (arXiv:1505.04597), with padded convolutions and BatchNorm; Isola et al.
2017 (arXiv:1611.07004), section 6.1.

Dimension key:  B batch   H, W pixels
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from utils.problems import Checked

WIDEST = 8  # channels of the deepest levels, in widths
PATCH = 24  # the least side at which the discriminator's five convolutions leave a pixel


@dataclass(kw_only=True)
class BaselineModelConfig(Checked):
    """The network and its size; published pix2pix has width 64 and 8 levels at 256 pixels."""

    baseline: Literal["unet", "pix2pix"] = "unet"
    width: int = 64  # channels of the first level; they double up to 8 times as many
    levels: int = 5  # halvings of the image
    dropout: float = 0.5  # unet: before the deepest level; pix2pix: in the decoder's first three

    def problems(self) -> Iterator[str]:
        if self.width < 1 or not 1 <= self.levels <= 10 or not 0 <= self.dropout < 1:
            yield (
                "model needs width >= 1, levels from 1 to 10 and dropout in [0, 1), got"
                f" {self.width}, {self.levels} and {self.dropout}"
            )


def build(cfg: BaselineModelConfig) -> "Network":
    """The untrained network. Both have `generate`."""
    return Unet(cfg) if cfg.baseline == "unet" else Pix2Pix(cfg)


class Unet(nn.Module):
    """Photographs (B, 3, H, W) in [0, 1] -> infrared (B, 1, H, W), about [0, 1]; any H and W."""

    def __init__(self, cfg: BaselineModelConfig):
        super().__init__()
        widths = [cfg.width * min(2**i, WIDEST) for i in range(cfg.levels + 1)]
        self.down = nn.ModuleList(_two(a, b) for a, b in zip([3, *widths], widths))
        self.dropout = nn.Dropout2d(cfg.dropout)
        pairs = list(zip(widths[1:], widths))[::-1]
        self.up = nn.ModuleList(_two(deep + skip, skip) for deep, skip in pairs)
        self.last = nn.Conv2d(cfg.width, 1, 1)
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, 0.5)

    def forward(self, visible: Tensor) -> Tensor:
        H, W = visible.shape[-2:]
        x, skips = _padded(2 * visible - 1, 2 ** (len(self.down) - 1)), []
        for i, level in enumerate(self.down):
            if i:
                skips.append(x)
                x = F.max_pool2d(x, 2)
            if i == len(self.down) - 1:
                x = self.dropout(x)
            x = level(x)
        for level in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = level(torch.cat([x, skips.pop()], 1))
        return self.last(x)[..., :H, :W].float()

    def generate(self, visible: Tensor, draws: list[int], seed: int = 0) -> Tensor:
        """Infrared (B, 1, H, W) in [0, 1]; deterministic."""
        return self(visible).clamp(0, 1)


class Pix2Pix(nn.Module):
    """Generator and discriminator; a forward pass gives the losses of both."""

    def __init__(self, cfg: BaselineModelConfig):
        super().__init__()
        self.generator, self.discriminator = Generator(cfg), patch_discriminator(cfg.width)
        self.apply(_isola_start)

    def forward(self, visible: Tensor, infrared: Tensor) -> dict[str, Tensor]:
        """Losses of a batch: l1 (of values in [-1, 1], as published), adversarial, discriminator.

        No gradient of `adversarial` reaches the discriminator, and none of `discriminator` the
        generator, so that one backward pass of their sum serves both. Both then step from the same
        point, where the authors' code steps one after the other.
        """
        if min(visible.shape[-2:]) < PATCH:
            raise ValueError(f"pix2pix needs sides of {PATCH} or more, got {visible.shape[-2:]}")
        photo, true = 2 * visible - 1, 2 * infrared - 1
        made = self.generator(photo)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        judged = functional_call(self.discriminator, frozen, (torch.cat([photo, made], 1),))
        real = self.discriminator(torch.cat([photo, true], 1))
        fake = self.discriminator(torch.cat([photo, made.detach()], 1))
        return {
            "l1": (made.float() - true).abs().mean(),
            "adversarial": F.softplus(-judged.float()).mean(),
            "discriminator": (F.softplus(-real.float()) + F.softplus(fake.float())).mean() / 2,
        }

    def generate(self, visible: Tensor, draws: list[int], seed: int = 0) -> Tensor:
        """Infrared (B, 1, H, W) in [0, 1], with dropout as its noise, as published.

        Image i is a function of (seed, draws[i]) alone, whatever is in the batch beside it;
        BatchNorm has the statistics of training, where the authors take those of the batch.
        """
        images = []
        for photo, draw in zip((2 * visible - 1).split(1), draws):
            with torch.random.fork_rng([visible.device] if visible.is_cuda else []):
                torch.manual_seed((seed * 1_000_003 + draw) % 2**63)
                images.append(self.generator(photo, noise=True))
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)


class Generator(nn.Module):
    """pix2pix's U-Net: photographs (B, 3, H, W) in [-1, 1] -> infrared (B, 1, H, W) in [-1, 1]."""

    def __init__(self, cfg: BaselineModelConfig):
        super().__init__()
        widths = [cfg.width * min(2**i, WIDEST) for i in range(cfg.levels)]
        self.dropout = cfg.dropout
        ends = [0, len(widths) - 1]  # the first and the deepest have no norm
        self.down = nn.ModuleList(
            nn.Sequential(
                *([nn.LeakyReLU(0.2)] if i else []),
                nn.Conv2d(a, b, 4, 2, 1),
                *([nn.BatchNorm2d(b)] if i not in ends else []),
            )
            for i, (a, b) in enumerate(zip([3, *widths], widths))
        )
        into = [widths[-1], *(2 * w for w in widths[-2::-1])]
        self.up = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1), nn.BatchNorm2d(b))
            for a, b in zip(into, widths[-2::-1])
        )
        self.last = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(into[-1], 1, 4, 2, 1))

    def forward(self, photo: Tensor, noise: bool = False) -> Tensor:
        """noise: dropout also in eval()."""
        H, W = photo.shape[-2:]
        x, maps = _padded(photo, 2 ** len(self.down)), []
        for level in self.down:
            x = level(x)
            maps.append(x)
        for i, level in enumerate(self.up):
            x = level(x)
            if i < 3:
                x = F.dropout(x, self.dropout, self.training or noise)
            x = torch.cat([x, maps[-2 - i]], 1)
        return self.last(x).tanh()[..., :H, :W]


def patch_discriminator(width: int) -> nn.Sequential:
    """Photograph and infrared (B, 4, H, W) -> a logit for every patch of 70 x 70 pixels."""
    layers, before = [], 4
    for i, stride in enumerate((2, 2, 2, 1)):
        after = width * 2**i
        norm = [nn.BatchNorm2d(after)] if i else []
        layers += [nn.Conv2d(before, after, 4, stride, 1), *norm, nn.LeakyReLU(0.2)]
        before = after
    return nn.Sequential(*layers, nn.Conv2d(before, 1, 4, 1, 1))


def _two(before: int, after: int) -> nn.Sequential:
    def one(a: int) -> list[nn.Module]:
        return [nn.Conv2d(a, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(*one(before), *one(after))


def _padded(x: Tensor, multiple: int) -> Tensor:
    """`x` with its last row and column repeated until both sides are multiples."""
    H, W = x.shape[-2:]
    return F.pad(x, (0, -W % multiple, 0, -H % multiple), mode="replicate")


def _isola_start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


Network = Unet | Pix2Pix
