"""One training step of stage 1, as public code writes it and as ours, in one run on one card.

    python benchmarks/pretrain.py                          ResNet-50, 512 pixels, two minutes
    python benchmarks/pretrain.py --backbone resnet18 --size 64 --batch 2 --device cpu --steps 3

`peer` is a plain loop: fp32, labels made sample by sample, `.item()` of every loss term at every
step, and the network as models/decomposition.py writes it. The other rows are this project's own
loop (utils/loop.py: fit) with the convolutions of models/fast and one more of its means each; the
last is what a GPU gets by default. The same weights, scenes and losses everywhere.
`peer, plain decoder` is the peer with the reference decoder (DecompositionConfig.decoder: plain),
whose heads run at full size.
The scenes lie on the device: the data path does not count (benchmarks/loader.py times that).
Prints markdown, writes JSON.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assembly.stage1_step import stage1_step
from configs.schema import PretrainConfig
from data.pairs import DataConfig, open_pairs
from data.pseudo_labels import PseudoLabels, prepare_pseudo_labels
from data.stream import collate
from losses.pretrain import MultiTaskPretrainLoss
from models.decomposition import DecompositionConfig
from models.fast.plan import speed_up_stage1
from models.stage1 import Stage1
from utils.loop import TrainingConfig, fit, to_device
from utils.run import Run, RunConfig

OURS = {
    "fp32": dict(mixed_precision="no", compile=False),
    "bf16": dict(mixed_precision="bf16", compile=False),
    "compiled": dict(mixed_precision="bf16", compile=True),  # and channels last
    "replayed": dict(mixed_precision="bf16", compile=True, replayed=True),
}
WARM_SHARE = 3  # of the steps: the first third is not timed


@dataclass
class Row:
    way: str
    batch: int
    seconds: float  # a step
    images_s: float
    times_peer: float
    peak_gib: float
    loss: float  # mean of the last steps: the ways must agree


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    device = torch.device(args.device)
    batches = scenes(args, device)
    rows = [timed("peer", args, device, batches, peer_loop)]
    rows.append(timed("peer, plain decoder", args, device, batches, peer_loop, decoder="plain"))
    for way in args.ways:
        rows.append(timed(way, args, device, batches, our_loop, **OURS[way]))
    for row in rows:
        row.times_peer = row.images_s / rows[0].images_s
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.backbone}, {args.size} x {args.size}")
    print(table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps(dict(device=name, rows=[asdict(r) for r in rows])))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50", choices=["resnet18", "resnet50"])
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--ways", nargs="+", default=list(OURS), choices=list(OURS), help="beside the peers"
    )
    parser.add_argument("--steps", type=int, default=60, help="of each way; two thirds are timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(argv)


def scenes(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Two batches of synthetic scenes on the device."""
    count = 2 * args.batch
    cfg = DataConfig(size=args.size, synthetic_scenes={"train": count, "val": 1, "test": 1})
    pairs = open_pairs(cfg, "train")
    found = [pairs.get(i) for i in range(count)]
    return [to_device(collate(found[i : i + args.batch]), device) for i in (0, args.batch)]


def timed(way: str, args, device, batches: list[dict], loop, decoder: str = "skips", **how) -> Row:
    """Seconds a step and the last losses of `loop`, which returns both."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = Stage1(DecompositionConfig(backbone=args.backbone, decoder=decoder)).to(device)
    if loop is not peer_loop:
        speed_up_stage1(model, "auto")
    seconds, loss = loop(model.train(), batches, args.steps, **how)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    row = Row(way, args.batch, seconds, args.batch / seconds, 1.0, peak, loss)
    print(json.dumps(asdict(row)), flush=True)
    return row


def peer_loop(model: Stage1, batches: list[dict], steps: int) -> tuple[float, float]:
    cfg, objective = PretrainConfig(), MultiTaskPretrainLoss(PretrainConfig().loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    first, losses = steps // WARM_SHARE, []
    for step in range(steps):
        if step == first:
            start = time.perf_counter()
        batch = batches[step % len(batches)]
        labels = labels_by_sample(batch, cfg)
        maps, fused = model(batch["visible"])
        loss, parts = objective(*maps, fused, labels, batch["infrared"][:, :1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        {name: part.item() for name, part in parts.items()}  # to the log, as public loops do
    seconds = (time.perf_counter() - start) / (steps - first)
    return seconds, sum(losses[first:]) / len(losses[first:])


def labels_by_sample(batch: dict, cfg: PretrainConfig) -> PseudoLabels:
    images = zip(*(batch[name] for name in ("visible", "infrared", "semantic")))
    found = [prepare_pseudo_labels(*(x[None] for x in one), cfg.data.labels) for one in images]
    return PseudoLabels(*(torch.cat(parts) for parts in zip(*found)))


def our_loop(
    model: Stage1,
    batches: list[dict],
    steps: int,
    mixed_precision: str,
    compile: bool,
    replayed: bool = False,
) -> tuple[float, float]:
    first = steps // WARM_SHARE
    training = TrainingConfig(
        batch_size=len(batches[0]["visible"]),
        steps=steps,
        mixed_precision=mixed_precision,
        schedule="constant",
        log_every=first,
        eval_every=0,
        save_every=0,
    )
    if compile:
        model.to(memory_format=torch.channels_last)
    objective = MultiTaskPretrainLoss(PretrainConfig().loss)
    with tempfile.TemporaryDirectory() as folder:
        cfg = PretrainConfig(training=training, run=RunConfig(output_dir=folder))
        loss_fn = stage1_step(cfg.data.labels, objective, compile, replayed)
        fit(cfg, model, loss_fn, lambda position: itertools.cycle(batches), Run(folder, cfg))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    timed = [row for row in rows if row["step"] > first]
    return tuple(sum(row[key] for row in timed) / len(timed) for key in ("step_s", "loss"))


def table(rows: list[Row]) -> str:
    lines = [
        "| way | batch | s/step | images/s | times peer | peak GiB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.way} | {r.batch} | {r.seconds:.4f} | {r.images_s:.1f} | {r.times_peer:.2f} |"
        f" {r.peak_gib:.1f} | {r.loss:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
