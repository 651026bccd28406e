"""The one door to everything that exists for speed: what runs on this machine, and why no faster.

    translator, plan = build(cfg, stage1, device="cuda")
    print(plan)

`build` looks at the device, its memory, the configuration and the installed packages, decides every
fast part once, and tries beside plain torch what could be wrong. With `fast: off` nothing of
models/fast runs. Only code that builds models imports this module, and nothing else of models/fast.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.backbones import LAYOUTS
from models.fast import (
    compilation,
    fp8_blocks,
    fused_gemm,
    fused_matrices,
    sample_blocks,
    stage1_convs,
    train_blocks,
)
from models.fast.attention_kernel import choose_kernel
from models.fast.frozen_matrix import multiplies_e4m3
from models.flux import Prompt
from models.shard import all_ranks, place
from models.stage1 import Stage1
from models.translator import PathConfig, Translator, TranslatorConfig, make_translator

# What `memory` stands for, where the config does not say otherwise; measured in docs/benchmarks.md.
MEMORY = {
    "24g": dict(base_dtype="fp8-small", gradient_checkpointing=1, compile=True),
    "48g": dict(base_dtype="bf16", gradient_checkpointing=2, compile=True),
    "80g": dict(base_dtype="bf16", gradient_checkpointing=0, compile=True),
    "140g": dict(base_dtype="bf16", gradient_checkpointing=0, compile=True),
}
NO_PRESET = dict(base_dtype="bf16", gradient_checkpointing=0, compile=False)
ENOUGH_GIB = {"140g": 130, "80g": 70, "48g": 38, "24g": 20}  # of a card, for `memory: auto`


class Part(NamedTuple):
    """A line of the plan."""

    part: str
    runs: str
    reason: str  # why this, and not the faster one


@dataclass
class Plan:
    """What runs; print it."""

    parts: list[Part] = field(default_factory=list)

    def add(self, part: str, runs: str, reason: str = "") -> None:
        self.parts.append(Part(part, runs, reason))

    def runs(self, part: str) -> str | None:
        """What runs for a part, None where the plan does not name it."""
        return next((p.runs for p in self.parts if p.part == part), None)

    def __str__(self) -> str:
        rows = [Part("part", "what runs", "why"), *self.parts]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{p:<{widths[0]}}  {r:<{widths[1]}}  {why}".rstrip() for p, r, why in rows]
        return "\n".join(lines)


def build(
    cfg: TranslatorConfig,
    stage1: Stage1,
    prompt: Prompt | None = None,
    device: torch.device | str = "cpu",
    adapters: dict[str, Tensor] | None = None,
    path: PathConfig | None = None,
) -> tuple[Translator, Plan]:
    """The model that `cfg` names, on `device`, as fast as it can be there.

    Args:
        prompt: skips the text encoders (it is in every checkpoint).
        adapters: the model will only sample: where everything can be multiplied in e4m3, the
            blocks' adapters are taken out of this dict of trained tensors and folded into the base.
        path: where the flow starts; None: from noise.

    Raises: ValueError: values that contradict each other, or what `make_translator` raises.
    """
    device, plan = torch.device(device), Plan()
    cfg = resolve(cfg, device, plan)
    translator = make_translator(cfg, stage1, prompt, device, path)
    mesh = all_ranks(device) if cfg.shard_base else None
    if cfg.fast == "off" or not translator.backbone.fast_blocks:
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward is only used where it was tried
    if cfg.fast != "off":
        stage1_convs.speed_up(stage1)
    plan.add("stage 1", *_stage1_facts(cfg.fast))
    if cfg.train_base:
        place(translator.flux, device, mesh)
        if device.type == "cuda":
            translator.to(memory_format=torch.channels_last)
        _compile_trained(translator, cfg.compile and adapters is None, plan)
    elif cfg.compile or cfg.base_dtype.startswith("fp8"):
        _install_blocks(translator, cfg, device, mesh, adapters, plan)
        stage1.to(memory_format=torch.channels_last)
        if cfg.compile:
            plan.add("compiled code", *compilation.keep_compiled_code())
            stage1.compile(dynamic=False)
    else:
        place(translator.flux, device, mesh)
        reason = "neither compiled nor fp8"
        if not translator.backbone.fast_blocks:
            reason = _no_fast_blocks(cfg)
        plan.add("FLUX blocks", "diffusers', patched", reason)
    return translator.to(device), plan


def _compile_trained(translator: Translator, compiled: bool, plan: Plan) -> None:
    """Compile FLUX's blocks, which repeat, where the base is trained.

    Not the convolutions before, after and in stage 1: each differs, and all together they take two
    minutes to compile. And only to train: a small model has made its images before that.
    """
    plan.add("FLUX blocks", "diffusers', patched" + (", compiled" if compiled else ""))
    if not compiled:
        return
    torch._dynamo.config.recompile_limit = compilation.RECOMPILES
    plan.add("compiled code", *compilation.keep_compiled_code())
    for block in (*translator.flux.transformer_blocks, *translator.flux.single_transformer_blocks):
        block.compile(dynamic=False)


def speed_up_stage1(stage1: Stage1, fast: str, compiled: bool | None = None) -> Plan:
    """The entry point for stage 1 alone.

    Args:
        fast: auto or off.
        compiled: whether its training step is going to be compiled; None: it is not trained.
    """
    plan = Plan()
    if fast == "auto":
        stage1_convs.speed_up(stage1)
    if compiled:
        stage1.to(memory_format=torch.channels_last)
    plan.add("stage 1", *_stage1_facts(fast))
    if compiled is not None:
        plan.add("its training step", "compiled" if compiled else "not compiled")
    if compiled:
        plan.add("compiled code", *compilation.keep_compiled_code())
    return plan


def choose_attention(plan: Plan, translator: Translator, batch: int, tokens: int) -> None:
    """Try the attention kernels at the shape of a training step, and note which one torch uses."""
    cfg, flux = translator.cfg, translator.flux.config
    device = translator.prompt.tokens.device
    reasons = {
        "model.fast=off": cfg.fast == "off",
        "fp32": cfg.train_base,
        _no_fast_blocks(cfg): not translator.backbone.fast_blocks,
    }
    if any(reasons.values()):
        reason = next(reason for reason, holds in reasons.items() if holds)
        plan.add("attention", "torch's choice", reason)
        return
    shape = batch, tokens, flux.num_attention_heads, flux.attention_head_dim
    plan.add("attention", *choose_kernel(device, *shape))


def resolve(
    cfg: TranslatorConfig, device: torch.device, plan: Plan | None = None
) -> TranslatorConfig:
    """`cfg` with the values that `fast` and `memory` stand for filled in; the plan says why.

    Raises: ValueError: a base that is trained cannot be fp8; with `fast: off`, and in a layout
        that models/fast has no blocks for, it can be neither compiled nor fp8.
    """
    plan = plan or Plan()
    memory, reason = _memory_preset(cfg, device)
    values = dict(MEMORY.get(memory, NO_PRESET))
    if memory == "24g" and cfg.memory == "auto" and not multiplies_e4m3(device):
        values |= dict(base_dtype="bf16")
        reason += "; no e4m3 in hardware, so bf16: share it by model.shard_base=true"
    if cfg.train_base and cfg.fast == "auto" and device.type == "cuda":
        values |= dict(compile=True)
    if not LAYOUTS[cfg.layout].fast_blocks:
        values |= dict(base_dtype="bf16", compile=False)
    found = {name: value for name, value in values.items() if getattr(cfg, name) is None}
    cfg = replace(cfg, **found)
    fp8 = cfg.base_dtype.startswith("fp8")
    if cfg.fast == "off" and (cfg.compile or fp8):
        raise ValueError(
            "model.fast=off is the plain model: it needs model.compile=false and base_dtype bf16"
            f" or fp32, got compile={cfg.compile}, base_dtype={cfg.base_dtype}"
        )
    if not LAYOUTS[cfg.layout].fast_blocks and (cfg.compile or fp8):
        raise ValueError(
            f"{_no_fast_blocks(cfg)}: it needs model.compile=false and base_dtype bf16 or fp32,"
            f" got compile={cfg.compile}, base_dtype={cfg.base_dtype}"
        )
    if cfg.train_base and fp8:
        raise ValueError(
            "model.train_base trains fp32 weights: it needs base_dtype bf16 or fp32, got"
            f" {cfg.base_dtype}, memory={cfg.memory}"
        )
    plan.add("memory preset", memory or "none", reason)
    emulated = fp8 and not multiplies_e4m3(device)
    reason = "emulated: this device does not multiply e4m3" if emulated else ""
    plan.add("frozen weights", "fp32, trained" if cfg.train_base else cfg.base_dtype, reason)
    every = {0: "none", 1: "every block", 2: "every other block"}
    number = cfg.gradient_checkpointing
    plan.add("recomputation", every.get(number, f"every {number}th block"))
    return cfg


def _memory_preset(cfg: TranslatorConfig, device: torch.device) -> tuple[str | None, str]:
    if cfg.fast == "off":
        return None, "model.fast=off"
    if cfg.memory != "auto":
        return cfg.memory, "as model.memory says"
    if device.type != "cuda":
        return None, "no CUDA device"
    if cfg.train_base or cfg.preset in ("demo", "small"):
        return None, "a small FLUX needs none"
    card = torch.cuda.get_device_properties(device)
    gib = card.total_memory / 2**30
    reason = f"{card.name}, {gib:.0f} GiB"
    preset = next((name for name, least in ENOUGH_GIB.items() if gib >= least), None)
    if preset is None:
        reason += f", less than the {min(ENOUGH_GIB.values())} GiB of the smallest preset"
    return preset, reason


def _no_fast_blocks(cfg: TranslatorConfig) -> str:
    return f"models/fast does not support the blocks of model.layout={cfg.layout}"


def _stage1_facts(fast: str) -> tuple[str, str]:
    return ("fused convolutions", "") if fast == "auto" else ("plain", "fast=off")


def _install_blocks(
    translator: Translator, cfg: TranslatorConfig, device: torch.device, mesh, adapters, plan: Plan
) -> None:
    """Move FLUX to the device with its blocks' fast forms."""
    flux, guidance = translator.flux, translator.guidance
    if adapters is not None and cfg.base_dtype.startswith("fp8") and mesh is None:
        samples, reason = fp8_blocks.choose(device, flux.config.attention_head_dim)
        if samples:
            fused_matrices.freeze(flux, device, cfg.base_dtype, adapters=adapters)
            sample_blocks.install(flux, guidance, cfg.compile)
            translator.run_with(sample_blocks.SampleRunner(flux))
            plan.add("FLUX blocks", "sampling, all in e4m3", reason)
            return
        plan.add("sampling", "the training blocks", reason)
    fused, reason = False, "the matrices are not bf16"
    if cfg.compile and cfg.base_dtype == "bf16":
        fused, reason = fused_gemm.choose(device)
    fused_matrices.freeze(flux, device, cfg.base_dtype, mesh, fused=fused)
    train_blocks.install(flux, guidance, cfg.compile, cfg.gradient_checkpointing)
    translator.run_with(train_blocks.TrainRunner(flux))
    plan.add("FLUX blocks", "fused, compiled" if cfg.compile else "fused, not compiled")
    plan.add("GELU and gates", "inside products" if fused else "apart from products", reason)
