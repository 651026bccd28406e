"""What one photograph shows of a trained model: its maps, the mean, samples and their spread."""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from assembly import checkpoints
from data import outputs
from data.aspect import same_area
from data.decoding import decode_visible
from data.materials import MATERIALS, material_colors
from data.photographs import refuse_raw
from data.radiometry import Planck, kelvin_known
from data.transforms import Window, make_window, resize_visible
from models.sampler import translate, untrained_mode
from utils import panels
from utils.problems import Checked

# name on the page -> matplotlib's
COLOR_MAPS = {
    "grey, white is hot": "gray",
    "grey, black is hot": "gray_r",
    "iron": "inferno",
    "rainbow": "turbo",
    "lava": "afmhot",
}
FORMATS = {  # of the files, in words
    "png8": "8-bit PNG (grey)",
    "png16": "16-bit PNG, with unit and scale in a .json",
    "tiff": "32-bit float TIFF",
    "npy": "kelvin as .npy",
}
Mode = Literal["mean", "sample"]
LONGEST = 1024  # pixels of a picture's longer side on the page; files keep the photograph's size
NAMED = 4  # materials in a caption


@dataclass(kw_only=True)
class AppConfig(Checked):
    """app.py"""

    checkpoint: str = "runs/demo/finetune/best_model.pth"  # a file, a run's or an exported folder
    device: str = "auto"
    fast: Literal["auto", "off"] | None = None  # off: the plain model; see models/fast/plan.py
    host: str = "127.0.0.1"  # 0.0.0.0: every machine that reaches this one can use the page
    port: int = 7860
    share: bool = False  # a public link, through Gradio's servers
    upload_mb: int = 50  # the largest file that is taken

    def problems(self) -> Iterator[str]:
        if not 0 < self.port < 2**16:
            yield f"port must be 1 to 65535, got {self.port}"
        if self.upload_mb < 1:
            yield f"upload_mb must be 1 or more, got {self.upload_mb}"

    def obstacles(self) -> Iterator[str]:
        if find_spec("gradio") is None:
            yield 'app.py needs Gradio, which is not installed: pip install ".[app]"'
        if not Path(self.checkpoint).exists():
            yield f"checkpoint {self.checkpoint}: no such file or folder; train.py writes one"


@dataclass
class Views:
    """All of one photograph. Arrays (h, w) in [0, 1] at the model's size, unless said otherwise."""

    name: str
    photograph: np.ndarray  # (H, W, 3) uint8, as it came
    intensity: np.ndarray
    material: np.ndarray | None  # (h, w) ids; None: the model learnt no materials
    fused: np.ndarray | None
    mean: np.ndarray
    samples: list[np.ndarray]
    mean_is: str  # what the mean is, in words

    def spread(self) -> np.ndarray | None:
        """Standard deviation of every pixel over the samples; None: fewer than two."""
        return np.stack(self.samples).std(0, ddof=1) if len(self.samples) > 1 else None

    def at_size(self, values: np.ndarray) -> np.ndarray:
        """(h, w) to the photograph's size, as generate.py does it."""
        found = torch.from_numpy(values)[None, None]
        size = self.photograph.shape[:2]
        return F.interpolate(found, size, mode="bicubic", antialias=True).clamp(0, 1)[0, 0].numpy()


class Named(NamedTuple):
    path: Path
    name: str  # as it was before it was uploaded


class Viewer:
    """A trained translator that is asked for one photograph at a time.

    Raises: ValueError: no checkpoint of stage 2 or 3.
    """

    def __init__(self, checkpoint: str, device: torch.device, fast: str | None = None):
        loaded = checkpoints.load_translator(checkpoint, device, sampling=True, sample_fast=fast)
        self.translator, self.device, self.plan = loaded.translator.eval(), device, loaded.plan
        self.trained = trained = loaded.trained
        self.window: Window | None = None  # of the training data, if it had one
        if trained.window:
            low, high = trained.window
            self.window = make_window(low, high, trained.unit)
        self.planck = Planck(*trained.planck) if trained.planck else None

    def trained_for(self, mode: Mode) -> bool:
        """Whether it can make the "mean" or a "sample"."""
        sampling = replace(self.trained.sampling, mode=mode)
        return not list(untrained_mode(sampling, self.trained.flow.mean_share))

    def formats(self) -> list[str]:
        """The formats of `encode` that this model's unit allows."""
        if self.window is None:
            return ["png8"]
        kelvin = kelvin_known(self.window.unit, self.planck)
        return ["png8", "png16", "tiff", *(["npy"] if kelvin else [])]

    @torch.no_grad()
    def look(self, file: Named, samples: int, seed: int) -> Views:
        """Raises: ValueError: a file that is no photograph; names it as it was uploaded."""
        refuse_raw(Path(file.name))
        photograph = decode_visible(file.path.read_bytes(), file.name)
        size, (height, width) = self.trained.data.height_width(), photograph.shape[:2]
        keep_aspect = self.trained.data.aspect != "squash"  # as generate.py
        size = same_area(size, height / width) if keep_aspect else size
        small = resize_visible(photograph, size)
        visible = torch.from_numpy(small).to(self.device).permute(2, 0, 1)[None].float() / 255
        (intensity, material, _), fused = self.translator.decompose(visible)
        labelled = self.trained.data.labels.material_source != "none"
        drawn = self._samples(visible, samples, seed)
        if self.trained_for("mean"):
            mean, mean_is = self._translate(visible, "mean", seed), "one pass without noise"
        else:
            mean, mean_is = np.mean(drawn, axis=0), f"the average of {len(drawn)} samples"
        return Views(
            name=file.name,
            photograph=photograph,
            intensity=_plain(intensity),
            material=material[0].argmax(0).cpu().numpy() if labelled else None,
            fused=None if fused is None else _plain(fused),
            mean=mean,
            samples=drawn,
            mean_is=mean_is,
        )

    def _samples(self, visible: Tensor, count: int, seed: int) -> list[np.ndarray]:
        if not self.trained_for("sample"):
            return []
        return [self._translate(visible, "sample", seed + i) for i in range(count)]

    def _translate(self, visible: Tensor, mode: Mode, seed: int) -> np.ndarray:
        sampling = replace(self.trained.sampling, mode=mode, seed=seed, samples=1)
        return _plain(translate(self.translator, visible, [0], sampling))

    def encode(self, views: Views, format: str) -> dict[str, bytes]:
        """The mean at the photograph's size as files, by suffix; one of `formats`."""
        to = outputs.make_format(format, self.window, self.planck, whole=False)
        return outputs.encode(views.at_size(views.mean), to)


def _plain(image: Tensor) -> np.ndarray:
    """(1, C, h, w) to (h, w), the mean of its channels."""
    return image[0].mean(0).clamp(0, 1).float().cpu().numpy()


# pictures, uint8 (H, W, 3)


def shown(
    views: Views, values: np.ndarray, color_map: str, low: float = 0.0, high: float = 1.0
) -> np.ndarray:
    """(h, w) in colour, as large as the photograph is shown; `high` is the brightest."""
    scaled = np.clip((views.at_size(values) - low) / max(high - low, 1e-6), 0, 1)
    colors = matplotlib.colormaps[COLOR_MAPS.get(color_map, color_map)]
    return _limited((colors(scaled)[..., :3] * 255).round().astype(np.uint8))


def photograph(views: Views) -> np.ndarray:
    return _limited(views.photograph)


def material_picture(views: Views) -> np.ndarray | None:
    if views.material is None:
        return None
    picture = Image.fromarray(panels.id_colors(views.material, material_colors()))
    height, width = views.photograph.shape[:2]
    return _limited(np.asarray(picture.resize((width, height), Image.Resampling.NEAREST)))


def material_names(views: Views) -> str:
    """The commonest materials and their shares."""
    assert views.material is not None
    counts = np.bincount(views.material.ravel(), minlength=len(MATERIALS))
    common = np.argsort(-counts, kind="stable")[:NAMED]
    return ", ".join(
        f"{MATERIALS[i].name} {counts[i] / counts.sum():.0%}" for i in common if counts[i]
    )


def _limited(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.BILINEAR)
    return np.asarray(image)


def zip_of(files: dict[str, bytes]) -> bytes:
    """name -> bytes as one archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()
