"""Low-rank adapters for the frozen transformer, and their file in diffusers' format.

    y = W x + (alpha / r) * B A x        A: r x in, random;  B: out x r, zero at the start

The adapter's weights are fp32 masters that compute in the input's dtype. PEFT's own layer casts the
whole activation to the adapter's fp32 instead, which costs more than the adapter itself.
Source: Hu et al. 2021 (arXiv:2106.09685, Sec. 4.1).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from models.attention import CastLinear
from utils.problems import Checked

LARGEST_RANK = 4096  # more than any width that is adapted
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for


@dataclass(kw_only=True)
class LoraConfig(Checked):
    r: int = 16  # rank; 0 = no adapter
    lora_alpha: float = 32.0  # the adapter's output is scaled by lora_alpha / r
    # layers to adapt, matched as in PEFT: a list of name endings, or one regular expression for the
    # whole path
    target_modules: list[str] | str = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"]
    )
    lora_dropout: float = 0.0
    bias: str = "none"  # only "none": the base's biases stay frozen

    def problems(self) -> Iterator[str]:
        ranges = 0 <= self.r <= LARGEST_RANK and 0 <= self.lora_dropout < 1
        if self.r and not (ranges and self.lora_alpha > 0):
            yield f"lora_config out of range: {self}"
        if self.r and self.bias != "none":
            yield f'lora_config.bias must be "none", got "{self.bias}"'


class LoraLinear(nn.Module):
    """A frozen linear layer plus its adapter; equal to the layer alone at the start."""

    def __init__(self, base: nn.Linear, cfg: LoraConfig):
        super().__init__()
        device = base.weight.device
        self.base = base
        self.lora_A = CastLinear(base.in_features, cfg.r, bias=False, device=device)
        self.lora_B = CastLinear(cfg.r, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(cfg.lora_dropout)
        self.scale = cfg.lora_alpha / cfg.r
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.lora_A.weight.is_meta:
            nn.init.normal_(self.lora_A.weight, std=1 / self.lora_A.out_features)
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))


def add_lora(model: nn.Module, cfg: LoraConfig) -> list[str]:
    """Wrap every matching linear layer of `model`; returns the wrapped names.

    Raises: ValueError: r or alpha out of range, a bias mode we do not have, or no layer matches.
    """
    if cfg.r == 0:
        return []
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [n for n in linears if _matches(n, cfg.target_modules)]
    if not names:
        raise ValueError(
            f"lora_config.target_modules={cfg.target_modules} matches none of the model's"
            f" {len(linears)} linear layers (for example {linears[-1]})"
        )
    for name in names:
        model.set_submodule(name, LoraLinear(model.get_submodule(name), cfg))
    return names


def _matches(name: str, targets: list[str] | str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(
                f"lora_config.target_modules={targets!r} is not a regular expression: {error}"
            ) from None
    return any(name == t or name.endswith("." + t) for t in targets)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Name -> adapter layer, for every adapter in `model`."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def save_lora(
    adapters: dict[str, Tensor], cfg: LoraConfig, path: str | Path, metadata: dict[str, str]
) -> None:
    """Write the adapters so that a stock `FluxFillPipeline.load_lora_weights` reads them.

    alpha / r is folded into B, because most loaders (ComfyUI's too) read a file without an alpha
    of its own with scale 1. The header says what that leaves: alpha = r.

    Args: adapters: by their names in the transformer, as `<layer>.lora_A.weight`; others are left.
    """
    tensors, layers = {}, []
    for name, tensor in adapters.items():
        layer, _, part = name.partition(".lora_")
        if part == "A.weight":
            layers.append(layer)
        elif part == "B.weight":
            tensor = tensor * (cfg.lora_alpha / cfg.r)
        else:
            continue
        tensors[f"transformer.{name}"] = tensor.detach().cpu().clone()
    peft = {"r": cfg.r, "lora_alpha": cfg.r, "target_modules": sorted(layers)}
    header = {f"transformer.{key}": value for key, value in peft.items()}
    text = json.dumps(header, indent=2, sort_keys=True)
    known = {"format": "pt", "lora_adapter_metadata": text}  # diffusers' own name
    save_file(tensors, str(path), metadata={**known, **metadata})
