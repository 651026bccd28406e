"""Do the fast ways learn as plain bf16 does? The `small` FLUX on a made-up task, same seeds.

First the whole small model is trained on one task (a frozen random base would have nothing to
adapt), then adapters and guidance learn another: on its bf16 base with plain blocks, on that base
in fp8, and, where quack-kernels runs, on the bf16 base with fused products.
"""

from copy import deepcopy
from dataclasses import replace

import torch
from torch.nn import functional as F

from losses import flow
from models.decomposition import DecompositionConfig
from models.fast import fused_gemm, fused_matrices, train_blocks
from models.fast.plan import build
from models.lora import LoraConfig
from models.stage1 import Stage1
from models.translator import Translator, TranslatorConfig

SIZE, BATCH = 128, 16
LAST = 4  # compare the mean loss of the last quarter of the steps
INJECT = {0: ["intensity"], 1: ["intensity", "material", "context"]}


def learning_gap(steps: int, device: str, preset: str = "small") -> dict[str, float]:
    """Mean losses over the last quarter of `steps`, and the fast ways' relative differences."""
    cfg = TranslatorConfig(
        preset=preset, text_tokens=16, train_base=True, inject=INJECT, lora_config=LoraConfig(r=16)
    )
    torch.manual_seed(0)
    stage1 = Stage1(DecompositionConfig(backbone="resnet18"))
    whole = build(cfg, deepcopy(stage1), device=device)[0]
    base_losses = train(whole, steps, device, lr=1e-3, task=0)
    result = dict(
        steps=steps,
        base_first=base_losses[:5].mean().item(),
        base_last=base_losses[-len(base_losses) // LAST :].mean().item(),
    )
    for way in ("bf16", "fp8", "fused"):
        if way == "fused" and not fused_gemm.choose(torch.device(device))[0]:
            continue
        adapted = replace(cfg, train_base=False, base_dtype="bf16")
        losses = train(adapt(whole, adapted, way, stage1, device), steps, device, lr=1e-3, task=1)
        result[f"{way}_first"] = losses[:5].mean().item()
        result[way] = losses[-max(steps // LAST, 1) :].mean().item()
        result[f"{way}_curve"] = [round(x, 5) for x in losses[:: max(steps // 10, 1)].tolist()]
        if way != "bf16":
            result[f"{way}_difference"] = result[way] / result["bf16"] - 1
    return result


def adapt(whole: Translator, cfg: TranslatorConfig, way: str, stage1: Stage1, device) -> Translator:
    """`whole`'s base, frozen as `way` says, with the same fresh adapters every time."""
    torch.manual_seed(1)
    plain = build(cfg, deepcopy(stage1), device=device)[0]
    state = {n: x for n, x in whole.state_dict().items() if "lora" not in n}
    plain.load_state_dict(state, strict=False)
    if way != "bf16":
        fused_matrices.freeze(
            plain.flux, device, "fp8" if way == "fp8" else "bf16", fused=way == "fused"
        )
        train_blocks.install(plain.flux, plain.guidance, compiled=False)
        plain.run_with(train_blocks.TrainRunner(plain.flux))
    return plain


def train(model: Translator, steps: int, device: str, lr: float, task: int) -> torch.Tensor:
    """Loss of every step; data, noise and times are functions of the step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    panel = model.backbone.painted(SIZE, SIZE, device)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * task + step)
        visible, infrared = (x.to(device) for x in scenes(generator, task))
        noise = torch.randn(BATCH, *model.backbone.state_shape(SIZE, SIZE), generator=generator)
        t = torch.rand(BATCH, generator=generator).to(device)
        noise, t = noise.to(device), model.round_time(t)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = model(visible, infrared, noise, t)
        error = flow.velocity_error(out.velocity, out.data, noise)
        loss = flow.flow_loss(error, panel).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).float().cpu()


def scenes(generator: torch.Generator, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth colour fields, and an infrared that is a fixed function of them (another per task)."""
    coarse = torch.rand(BATCH, 3, 6, 6, generator=generator)
    visible = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    r, g, b = visible.split(1, dim=1)
    infrared = (r * (1 - g)).sqrt() if task == 0 else (b - r).abs().clamp(0, 1)
    return visible, infrared.expand(-1, 3, -1, -1)
