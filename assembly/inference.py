"""Photographs of any size in, infrared images of the same sizes out.

generate.py and the diffusers pipeline both call `infrared_of`. An exported folder carries this
module with the modules it imports, so it must stay free of data sets, scripts and models/fast.

Dimension key:  H, W pixels of one photograph
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data.aspect import same_area
from data.radiometry import Planck
from data.transforms import Window, resize_visible, to_8_bits, to_16_bits
from models.decomposition import DecompositionConfig
from models.flux import Prompt
from models.lora import LoraConfig
from models.sampler import OnStep, SamplingConfig, translate, untrained_mode
from models.stage1 import Stage1
from models.translator import DTYPES, PathConfig, Translator, TranslatorConfig, make_translator
from utils.problems import refuse

STATE_FILE = "diffusion_pytorch_model.safetensors"  # beside the translator's folder


@torch.no_grad()
def infrared_of(
    translator: Translator,
    photographs: list[np.ndarray],
    draws: list[int] | list[torch.Generator],
    sampling: SamplingConfig,
    size: tuple[int, int],
    on_step: OnStep | None = None,
) -> list[np.ndarray]:
    """For each photograph (H, W, 3) uint8 its infrared (H, W) float32 in [0, 1].

    Args:
        draws: see `translate`; one a photograph.
        size: height and width at which the model works; the results are resized back.
    """
    device = device_of(translator)
    small = np.stack([resize_visible(x, size) for x in photographs])
    visible = torch.from_numpy(small).to(device).permute(0, 3, 1, 2).float() / 255
    made = translate(translator, visible, draws, sampling, on_step)
    return [_resized(image, x.shape[:2]) for image, x in zip(made, photographs)]


def device_of(translator: Translator) -> torch.device:
    """The device it works on: that of the prompt, which offloading never moves."""
    tokens = translator.prompt.tokens
    assert isinstance(tokens, Tensor)
    return tokens.device


def _resized(image: Tensor, size: tuple[int, ...]) -> np.ndarray:
    image = F.interpolate(image[None], size, mode="bicubic", antialias=True)
    return image.clamp(0, 1)[0, 0].cpu().numpy()


@dataclass(kw_only=True)
class Training:
    """The facts of its training that a user of the model needs."""

    size: tuple[int, int]  # height and width of the images
    sampling: SamplingConfig
    mean_share: float  # see untrained_mode
    window: Window | None  # what infrared 0 and 1 mean; None: each image had its own
    planck: Planck | None
    squash: bool  # images were squashed to `size`

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Training":
        """From the plain values of a TrainConfig."""
        size, window, planck = config["data"]["size"], config["window"], config["planck"]
        return cls(
            size=(size, size) if isinstance(size, int) else tuple(size),
            sampling=SamplingConfig(**config["sampling"]),
            mean_share=config["flow"]["mean_share"],
            window=window and Window(window[0], window[1], config["unit"]),
            planck=planck and Planck(*planck),
            squash=config["data"].get("aspect", "squash")
            == "squash",  # as before there was a choice
        )


class ThermaFluxTranslator(nn.Module):
    """A trained translator and its training: the `translator` of a diffusers pipeline."""

    def __init__(self, translator: Translator, training: Training, source: Path | None = None):
        super().__init__()
        self.translator, self.training_facts = translator.eval(), training
        self.source = source  # the exported folder that it is from, if it is from one
        self.autocast: torch.dtype | None = None  # for a base that was trained, whose weights stay

    @classmethod
    def from_pretrained(
        cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any
    ) -> "ThermaFluxTranslator":
        """The plain model (generate.py --fast off), on the CPU.

        Args:
            folder: `translator` of an exported folder, the weights beside it.
            torch_dtype: float32 or bfloat16, of FLUX and its autoencoder; None: as it was trained.
        """
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["config"]
        source = Path(folder).absolute().parent
        state = load_file(str(source / STATE_FILE))
        cfg = _plain(config["model"])
        path = PathConfig(**{key: config["flow"][key] for key in ("start", "sigma")})
        prompt = Prompt(state["prompt.tokens"], state["prompt.pooled"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config["training"]["seed"])  # as checkpoints.load_translator does
            stage1 = Stage1(cfg.decomposition, cfg.physics)
            translator = make_translator(cfg, stage1, prompt, "cpu", path)
        wrong = translator.load_state_dict(state, strict=False)
        frozen = ("backbone.codec.", *(() if cfg.train_base else ("flux.",)))  # not in the file
        missing = [n for n in wrong.missing_keys if not n.startswith(frozen) or ".lora_" in n]
        if names := [*missing, *wrong.unexpected_keys]:
            raise ValueError(f"{folder} does not fit its weights: {', '.join(names[:3])}")
        made = cls(translator, Training.of(config), source)
        return made if torch_dtype is None else made.to(dtype=torch_dtype)

    def forward(
        self,
        photographs: list[np.ndarray],
        draws: list[int] | list[torch.Generator],
        sampling: SamplingConfig,
        size: tuple[int, int],
        on_step: OnStep | None = None,
    ) -> list[np.ndarray]:
        """See `infrared_of`."""
        wanted = self.autocast is not None
        with torch.autocast(self.device.type, self.autocast, enabled=wanted):
            return infrared_of(self.translator, photographs, draws, sampling, size, on_step)

    def sampling(self, **asked: Any) -> SamplingConfig:
        """How the model samples, changed by what was asked for (None: as trained).

        Raises: ValueError: out of range, or a mode that was not trained for.
        """
        chosen = {key: value for key, value in asked.items() if value is not None}
        cfg = SamplingConfig(**{**vars(self.training_facts.sampling), **chosen})
        refuse(untrained_mode(cfg, self.training_facts.mean_share))
        return cfg

    def size_for(self, photograph: np.ndarray, keep_aspect: bool) -> tuple[int, int]:
        """Height and width at which a photograph (H, W, 3) is translated."""
        size = self.training_facts.size
        keep_aspect = keep_aspect or not self.training_facts.squash
        height, width = photograph.shape[:2]
        return same_area(size, height / width) if keep_aspect else size

    def grey_levels(self, infrared: np.ndarray) -> np.ndarray:
        """(H, W) in [0, 1] as uint8."""
        return to_8_bits(infrared)

    def numbers(self, infrared: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """(H, W) in [0, 1] as uint16, and what they mean: generate.py --format png16.

        Raises: ValueError: the training data had no window, so that numbers mean nothing.
        """
        window, planck = self.training_facts.window, self.training_facts.planck
        if window is None:
            raise ValueError(
                "16-bit numbers need the window of the training data, and this model has none"
                " (data.window=per_image)"
            )
        numbers, scale, offset = to_16_bits(infrared, window)
        facts = {"unit": window.unit, "scale": scale, "offset": offset}
        return numbers, facts | ({"planck": planck._asdict()} if planck else {})

    # ---- where it is, and in which precision

    @property
    def device(self) -> torch.device:
        return device_of(self.translator)

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast or self.translator.base_dtype

    def to(self, *args: Any, **kwargs: Any) -> "ThermaFluxTranslator":
        """As of every module; a dtype is that of FLUX and its autoencoder.

        Stage 1, guidance and adapters stay fp32, as in training. So does a FLUX that was trained
        from scratch: it computes in bf16 by autocast, as in training.
        Raises: ValueError: a dtype other than float32 and bfloat16.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            if dtype not in DTYPES.values():
                raise ValueError(f"torch_dtype must be float32 or bfloat16, got {dtype}")
            if self.translator.cfg.train_base:
                self.autocast = None if dtype == torch.float32 else dtype
            else:
                self._cast_frozen(dtype)
        if device is not None:
            super().to(device)
            if self.translator.cfg.train_base and device.type == "cuda":
                super().to(memory_format=torch.channels_last)  # as generate.py places it
        return self

    def _cast_frozen(self, dtype: torch.dtype) -> None:
        for name, parameter in self.translator.flux.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(dtype)
        if vae := getattr(self.translator.codec, "vae", None):
            vae.to(dtype)

    def parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Large modules in the order in which they work, and the small ones that stay in place."""
        whole = self.translator
        vae = getattr(whole.codec, "vae", None)  # an autoencoder; other codecs are small
        around = [m for m in whole.backbone.children() if vae is None or m is not whole.codec]
        large = [m for m in (whole.stage1, vae, whole.flux) if m is not None]
        return large, [whole.guidance, whole.prompt, *around]


def _plain(model: dict[str, Any]) -> TranslatorConfig:
    """The `model` section of a configuration, for the plain model."""
    rounded = (model["base_dtype"] or "").startswith("fp8")
    changes = {
        "decomposition": DecompositionConfig(**{**model["decomposition"], "pretrained": "none"}),
        "lora_config": LoraConfig(**model["lora_config"]),
        "inject": {int(block): maps for block, maps in model["inject"].items()},
        "base_dtype": None if rounded else model["base_dtype"],
        "gradient_checkpointing": 0,
        "shard_base": False,
    }
    return TranslatorConfig(**{**model, **changes})
