"""The protocols of other projects by name: evaluate.py --protocol thermalgen prints their row.

Each is frozen here with where its figures come from, and what could not be confirmed. A model makes
its image at the size that it was trained for; image and truth are then brought to the published
size. The numbers are comparable with a paper's only on that paper's own test images.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from assembly import features
from data.batch import Sample
from data.pairs import Pairs
from data.transforms import Pair, Window, resize, to_tensors
from utils import metrics, results


class Peer(NamedTuple):
    """A published protocol. `confirmed` names sources, `unconfirmed` what stands here by guess."""

    title: str
    side: int  # pixels of the square on which everything is measured
    crop: Literal["none", "centre square"]
    resize: Literal["bilinear", "bicubic"]
    bits: int | None  # images are rounded to so many bits, as files of them are; None: not rounded
    channels: str
    metrics: tuple[str, ...]
    ssim: Literal["mirrored", "inside", "upper half"] | None
    lpips: tuple[Literal["alex", "vgg"], bool]  # network, whether images are scaled to [-1, 1]
    confirmed: tuple[str, ...]
    unconfirmed: tuple[str, ...]


PEERS = {
    "thermalgen": Peer(
        title="ThermalGen (Xiao et al. 2025, arXiv:2509.24878)",
        side=256,
        crop="none",
        resize="bilinear",
        bits=None,
        channels="1, repeated to 3 for LPIPS and FID",
        metrics=("psnr", "ssim", "fid", "lpips"),
        ssim="mirrored",
        lpips=("alex", True),
        confirmed=(
            "its evaluation code, as noted when it was surveyed: metrics of torchmetrics on one"
            " channel in [0, 1], plain resize to 256 x 256, LPIPS of AlexNet on scaled images, FID"
            " of 2048 Inception features",
        ),
        unconfirmed=(
            "that code, which could not be read a second time",
            "the interpolation of the resize",
            "whether images were rounded to 8 bits",
        ),
    ),
    "pid": Peer(
        title="PID (Mao et al. 2024, arXiv:2407.09299)",
        side=512,
        crop="centre square",
        resize="bicubic",
        bits=8,
        channels="3 equal ones",
        metrics=("psnr", "ssim", "lpips", "fid"),
        ssim="inside",
        lpips=("alex", True),
        confirmed=(
            "github.com/fangyuanmao/PID, scripts/rgb2ir_vqf8.py and ldm/data/kaist512.py: centre"
            " square, bicubic to 512 x 512, images of 8 bits with three channels",
            "its issue 32, the author: test images are cropped and resized the same, SSIM is that"
            " of Wang et al. 2004, tables hold means",
        ),
        unconfirmed=(
            "the network of LPIPS",
            "FID, noted as that of pytorch-fid (its issue 21), which resizes a little otherwise",
            "its files cut fractions of a level off, where these images are rounded",
        ),
    ),
    "fvita": Peer(
        title="F-ViTA (Paranjape et al. 2025)",
        side=256,
        crop="none",
        resize="bilinear",
        bits=8,
        channels="1",
        metrics=("fid", "kid", "lpips", "ssim", "psnr"),
        ssim="upper half",
        lpips=("alex", False),
        confirmed=(
            "github.com/JayParanjape/F-ViTA, utils.py: grey, 256 x 256, [0, 1]; LPIPS of AlexNet on"
            " images that are not scaled to [-1, 1]; SSIM as 1 - 2 DSSIM of the package lpips,"
            " which takes [0, 1] for [-1, 1]: levels 127 to 255, a window of 7 equal weights;"
            " FID and KID of clean-fid",
        ),
        unconfirmed=(
            "which of its three FIDs the paper's tables hold",
            "FID and KID here are of images of 256 pixels and without clean-fid's resize, KID of"
            " the whole set where clean-fid averages subsets",
        ),
    ),
    "mavic": Peer(
        title="MAVIC-T 2025, task RGB to IR",
        side=1024,
        crop="none",
        resize="bilinear",
        bits=8,
        channels="1, repeated to 3 for LPIPS and FID",
        metrics=("lpips", "fid", "mae", "mavic_score"),
        ssim=None,
        lpips=("vgg", True),
        confirmed=(
            "codabench.org/competitions/12566, pages Evaluation and Submission: LPIPS of VGG-16,"
            " FID of InceptionV3, L1; 1024 x 1024, other sizes are resampled; PNG or TIFF;"
            " task score (2/pi arctan(FID) + LPIPS + L1) / 3",
        ),
        unconfirmed=(
            "the weight inside the arctan, 1 in the printed formula",
            "how L1 and LPIPS are normalised: here L1 is of [0, 1] and LPIPS is as it comes",
            "the interpolation of the resampling",
        ),
    ),
}
WITHOUT_INCEPTION = "no FID and no KID: the weights of InceptionV3 cannot be fetched"


class PeerPairs(torch.utils.data.Dataset):
    """Pairs cropped as a protocol says; besides, `target` (1, S, S): the truth it measures on."""

    def __init__(self, pairs: Pairs, peer: Peer):
        self.pairs, self.peer = pairs, peer
        self.names, self.sources, self.size = pairs.names, pairs.sources, (peer.side, peer.side)
        self.shapes = None  # all have one

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs.pair(index)
        pair = _centre_square(pair) if self.peer.crop == "centre square" else pair
        window = self.pairs.window
        sample = to_tensors(resize(pair, self.pairs.size), window)
        counts = torch.from_numpy(pair.infrared.astype(np.float32))[None, None]
        counts = _resized(counts, self.peer).numpy()[0, 0]
        if window is None:
            window = Window(float(counts.min()), max(float(counts.max()), counts.min() + 1e-6))
        target = torch.from_numpy(window.normalise(counts))[None]
        known = {"draw": index, "name": self.names[index], "source": self.sources[index]}
        return cast(Sample, sample | known | {"target": _rounded(target, self.peer.bits)})


def note_of(window: Window | None) -> list[str]:
    """A sentence where the infrared is not read as the papers do: levels of 8 bits over 255."""
    if window is not None and (window.low, window.high) == (0, 255):
        return []
    how = f"from {window.low:g} to {window.high:g} {window.unit}" if window else "by itself"
    return [
        f"the protocol takes 8-bit levels over 255; this infrared is stretched {how},"
        " so PSNR, SSIM and L1 mean other levels"
    ]


def fitted(image: Tensor, peer: Peer) -> Tensor:
    """A generated image (B, 1, H, W) as the protocol measures it: (B, 1, S, S) in [0, 1]."""
    return _rounded(_resized(image, peer).clamp(0, 1), peer.bits)


def measures(
    peer: Peer, device: torch.device
) -> tuple[dict[str, Callable], "Inception | None", list[str]]:
    """Functions of two images by column, the network of FID, and sentences about what cannot be
    had. The rank correlation is always there: it tells inverted images, and is not in the row."""
    ssim = {
        "mirrored": metrics.ssim,
        "inside": metrics.ssim_inside,
        "upper half": upper_half_ssim,
        None: None,
    }[peer.ssim]
    found: dict[str, Any] = {"psnr": metrics.psnr, "ssim": ssim, "mae": metrics.mae}
    found = {name: f for name, f in found.items() if name in peer.metrics}
    found["rank"] = metrics.rank_correlation
    network, absent = None, []
    try:
        found["lpips"] = metrics.Lpips(device, *peer.lpips)
    except ValueError as error:
        absent.append(f"no LPIPS: {str(error).split('; ')[0]}")
    if {"fid", "kid"} & set(peer.metrics):
        try:
            network = Inception(device)
        except ValueError as error:
            absent.append(str(error))
    if "mavic_score" in peer.metrics and absent:
        absent.append("no task score: it is made of LPIPS, FID and L1")
    return found, network, absent


class Inception:
    """InceptionV3 as FID has it. Raises: ValueError: its weights cannot be fetched.

    Source: Heusel et al. 2017 (arXiv:1706.08500), by torchmetrics and torch-fidelity.
    """

    def __init__(self, device: torch.device):
        from torchmetrics.image.fid import NoTrainInceptionV3  # it needs torch-fidelity

        try:
            self.net = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        except (OSError, RuntimeError, ModuleNotFoundError) as error:
            raise ValueError(f"{WITHOUT_INCEPTION} ({error})") from error
        self.net = self.net.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Grey (B, 1, H, W) in [0, 1] -> one map (B, 2048, 1, 1), the shape of other features."""
        return [self.net((images * 255).byte().expand(-1, 3, -1, -1))[:, :, None, None].float()]


def distances(
    pooled: dict[str, np.ndarray], means: dict[str, dict[str, float]], peer: Peer
) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
    """method -> column -> (value, no resamples) of what is measured of whole sets.

    Args: pooled: features (N, C) by method and "truth". means: method -> column -> mean.
    """
    truth, none = pooled.get("truth"), np.zeros(0)
    found: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    if truth is None or len(truth) < 2:
        return found
    for method in (name for name in pooled if name != "truth"):
        values = {"fid": features.frechet_distance(pooled[method], truth)}
        if "kid" in peer.metrics:
            values["kid"] = cast(float, features.kernel_distance(pooled[method], truth))
        own = means[method]
        if "mavic_score" in peer.metrics and "lpips" in own:
            values["mavic_score"] = mavic_score(values["fid"], own["lpips"], own["mae"])
        found[method] = {name: (x, none) for name, x in values.items()}
    return found


def mavic_score(fid: float, lpips: float, l1: float) -> float:
    """The task score of MAVIC-T, 0 the best: see `confirmed`."""
    return (2 / math.pi * math.atan(fid) + lpips + l1) / 3


def upper_half_ssim(predicted: Tensor, target: Tensor) -> Tensor:
    """SSIM of levels 127 to 255, into which F-ViTA's code maps [0, 1]."""
    a, b = (((x + 1) * 127.5).floor() / 255 for x in (predicted, target))
    return metrics.ssim_inside(a, b, uniform=True)


def table(found: dict, peer: Peer, seconds: dict[str, float]) -> list[str]:
    """Markdown: the columns of the paper in its order; ± is half of the 95 % interval."""
    titles = " | ".join("L1" if n == "mae" else results.COLUMNS[n].title for n in peer.metrics)
    lines = [f"| method | {titles} | s/image |", "|---" * (len(peer.metrics) + 2) + "|"]
    for method, values in found["methods"].items():
        cells = [
            results.cell(n, values[n], found["intervals"][method].get(n))
            if n in values
            else "not measured"
            for n in peer.metrics
        ]
        lines.append(f"| {method} | {' | '.join(cells)} | {seconds[method]:.3g} |")
    return lines


def _centre_square(pair: Pair) -> Pair:
    height, width = pair.infrared.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = np.s_[top : top + side, left : left + side]
    semantic = None if pair.semantic is None else pair.semantic[cut]
    return Pair(pair.visible[cut], pair.infrared[cut], semantic)


def _resized(image: Tensor, peer: Peer) -> Tensor:
    size = (peer.side, peer.side)
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image.float(), size, mode=peer.resize, antialias=True)


def _rounded(image: Tensor, bits: int | None) -> Tensor:
    return image if bits is None else (image * (2**bits - 1)).round() / (2**bits - 1)
