"""Does the compiled step of stage 1 have the gradients of the uncompiled one? After some training.

    python benchmarks/compiled.py                       ResNet-50, 256 pixels, one GPU, two minutes

Trains uncompiled for some steps, because a compiler's mistake may show only in a network that has
learnt something, then takes the gradients of one batch three times with the same weights: in fp32,
in bf16, and in bf16 compiled. Prints how far the last two are from the first, by part of the
network, and ends with an error where compiling moves one further than bf16 does.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assembly.stage1_step import stage1_step
from benchmarks.pretrain import scenes
from configs.schema import PretrainConfig
from losses.pretrain import MultiTaskPretrainLoss
from models.decomposition import DecompositionConfig
from models.stage1 import Stage1

PARTS = ("encoder", "decoder", "intensity_head", "material_head", "context_head", "fusion")
LEARNING_RATE = 7e-4  # of configs/small/pretrain.yaml
TIMES, APART = 2, 0.02  # farther than so many times bf16's distance, plus so much: another gradient


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    args = parse(argv)
    device = torch.device(args.device)
    found = gradient_distances(args, device, scenes(args, device))
    print("| gradient of | bf16 | bf16, compiled |\n|---|---|---|")
    print("\n".join(f"| {part} | {a:.4f} | {b:.4f} |" for part, (a, b) in found.items()))
    wrong = [part for part, (a, b) in found.items() if not b < TIMES * a + APART]
    if wrong:
        raise SystemExit(
            f"compiled, the gradient of {', '.join(wrong)} is another one: train with"
            f" compile=false on this machine (torch {torch.__version__})"
        )
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50", choices=["resnet18", "resnet50"])
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=350, help="of training before the comparison")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def gradient_distances(
    args: argparse.Namespace, device: torch.device, batches: list[dict]
) -> dict[str, tuple[float, float]]:
    """Part -> relative distance from fp32's gradient of bf16's, and of compiled bf16's."""
    torch.manual_seed(0)
    model = Stage1(DecompositionConfig(backbone=args.backbone)).to(device).train()
    model.to(memory_format=torch.channels_last)
    cfg = PretrainConfig()
    objective = MultiTaskPretrainLoss(cfg.loss)
    plain, compiled = (stage1_step(cfg.data.labels, objective, way) for way in (False, True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(args.steps):
        gradient(model, plain, batches[step % len(batches)], torch.bfloat16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    exact = gradient(model, plain, batches[0], torch.float32)
    others = [gradient(model, way, batches[0], torch.bfloat16) for way in (plain, compiled)]
    return {part: tuple(distance(exact, other, part) for other in others) for part in PARTS}


def gradient(model: Stage1, way, batch: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name of the parameter. BatchNorm's means move on, which no gradient sees in training."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch["visible"].device.type, dtype, enabled=dtype != torch.float32):
        loss, _ = way(model, batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(exact: dict[str, Tensor], other: dict[str, Tensor], part: str) -> float:
    names = [name for name in exact if part in name.split(".")]
    assert names, f"no parameter belongs to {part}"
    gap = sum((exact[name] - other[name]).square().sum() for name in names)
    return (gap / sum(exact[name].square().sum() for name in names)).sqrt().item()


if __name__ == "__main__":
    main()
