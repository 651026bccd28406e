"""The frozen layers of FLUX's blocks merged into a few matrices, for the fast blocks to read.

q, k and v become one matrix, a single block's last matrix two. Each may be rounded to e4m3
(models/fast/frozen_matrix.py), and may take a trained adapter in.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.fast.fp8_quantise import SMALLEST
from models.fast.frozen_matrix import Frozen
from models.lora import LoraLinear, lora_layers
from models.shard import place

BIAS_ROOM = (
    200.0  # largest bias by largest weight; models/fast/fp8_residual_norm.py: with_bias has 256
)
# the layers of each kind of block, by the name of the matrix that they become
STREAMS = {
    "image": {
        "modulation": ["norm1.linear"],
        "qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "out": ["attn.to_out.0"],
        "up": ["ff.net.0.proj"],
        "down": ["ff.net.2"],
    },
    "text": {
        "modulation": ["norm1_context.linear"],
        "qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "out": ["attn.to_add_out"],
        "up": ["ff_context.net.0.proj"],
        "down": ["ff_context.net.2"],
    },
}
SINGLE = {
    "modulation": ["norm.linear"],
    "qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "out": ["proj_out"],
    "up": ["proj_mlp"],
    "down": ["proj_out"],  # proj_out's columns, split
}


def freeze(
    flux: nn.Module,
    device: torch.device | str,
    dtype: Literal["bf16", "fp32", "fp8", "fp8-small"],
    mesh: DeviceMesh | None = None,
    adapters: dict[str, Tensor] | None = None,
    fused: bool = False,
) -> None:
    """Move `flux` to `device` block by block, each block's matrices merged (and rounded).

    So no more than one block exists twice, and the peak is that of the result. Do it after loading
    weights and adding adapters. "fp8" keeps a transposed copy of each matrix; "fp8-small" keeps
    none and rounds the modulations' matrices too: half the memory, slower. Sharded over a `mesh`,
    "fp8" keeps none either: it would double what is gathered.

    Args:
        adapters: trained values, "flux." before their names in flux. Those of the blocks are taken
            out of it and added to the matrices, before these are rounded, a whole layer in one unit
            instead of each row in its own; the model then only samples
            (models/fast/sample_blocks.py), and keeps no transposed copy.
        fused: bf16 products do what follows them (models/fast/fused_gemm.py).

    Raises: ValueError: an adapter sits on a layer that this file does not adapt, or is missing from
        `adapters` or has another shape there.
    """
    transposed = dtype == "fp8" and mesh is None and adapters is None
    names = {module: name for name, module in flux.named_modules()}

    def merge(block: nn.Module) -> None:
        if adapters is not None:
            _fold(block, f"flux.{names[block]}", adapters)
        block.frozen = nn.ModuleDict()
        for kind, layers in _layers(block).items():
            adapted = [n for n in layers if isinstance(block.get_submodule(n), LoraLinear)]
            if kind.endswith("modulation") and adapted:
                raise ValueError(
                    f"lora_config.target_modules has {adapted[0]}, which model.compile and fp8 do"
                    " not support"
                )
            fp8 = dtype.startswith("fp8") and (dtype == "fp8-small" or "modulation" not in kind)
            largest = _largest(block, layers) if adapters is not None else None
            matrix = _merge(block, layers, kind)
            block.frozen[kind] = Frozen(*matrix, fp8, transposed, largest, fused and not fp8)
        _drop_originals(block)

    place(flux, device, mesh, merge)


@torch.no_grad()
def _fold(block: nn.Module, prefix: str, adapters: dict[str, Tensor]) -> None:
    """Add the adapters' products to the weights of their layers, and drop the adapters."""
    for name, layer in lora_layers(block).items():
        factors = []
        for part, own in (("B", layer.lora_B.weight), ("A", layer.lora_A.weight)):
            key = f"{prefix}.{name}.lora_{part}.weight"
            if key not in adapters or adapters[key].shape != own.shape:
                found = tuple(adapters[key].shape) if key in adapters else "missing"
                raise ValueError(f"adapter {key!r} must be {tuple(own.shape)}, it is {found}")
            factors.append(adapters.pop(key).to(own.device, torch.float32))
        B, A = factors
        weight = layer.base.weight.float() + layer.scale * (B @ A)
        layer.base.weight.copy_(weight)
        block.set_submodule(name, layer.base)


def _merge(block: nn.Module, layers: list[str], kind: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers, one below the other; of proj_out, the columns for `kind`."""
    bases = [_base(block.get_submodule(n)) for n in layers]
    weight = torch.cat([b.weight.detach() for b in bases])
    bias = torch.cat([b.bias.detach() for b in bases])
    if layers != ["proj_out"]:
        return weight, bias
    D = len(weight)
    if kind == "out":
        return weight[:, :D].contiguous(), None
    return weight[:, D:].contiguous(), bias


def _largest(block: nn.Module, layers: list[str]) -> float:
    """What a unit must have room for: the weights, and with its digits the biases. Not 0."""
    bases = [_base(block.get_submodule(n)) for n in layers]
    weights, biases = (
        max(float(getattr(b, kind).abs().max()) for b in bases) for kind in ("weight", "bias")
    )
    return max(SMALLEST, weights, biases / BIAS_ROOM)


def _drop_originals(block: nn.Module) -> None:
    for layers in _layers(block).values():
        for name in layers:
            base = _base(block.get_submodule(name))
            for parameter in ("weight", "bias"):
                base.register_parameter(parameter, None)


def _base(layer: nn.Module) -> nn.Linear:
    base = layer.base if isinstance(layer, LoraLinear) else layer
    assert isinstance(base, nn.Linear)
    return base


def _layers(block: nn.Module) -> dict[str, list[str]]:
    """Name of the merged matrix -> names of its layers."""
    if hasattr(block, "proj_mlp"):
        return SINGLE
    return {f"{s}_{m}": names for s, of in STREAMS.items() for m, names in of.items()}
