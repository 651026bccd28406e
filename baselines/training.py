"""What the baselines share: their configuration, and training with the common loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from baselines.networks import BaselineModelConfig, Network, build
from configs.schema import FLAGS
from data.pairs import DataConfig, Pairs, describe, open_pairs
from data.stream import collate, evenly_spaced, sequential, stream
from utils import config, dist, metrics, panels
from utils.dryrun import dry_run
from utils.loop import TrainingConfig, fit, to_device
from utils.optimizer import OptimizerConfig, schedule_problems
from utils.problems import Checked
from utils.run import Run, RunConfig

MEASURES = {"val_loss": metrics.mae, "val_psnr": metrics.psnr, "val_ssim": metrics.ssim}


@dataclass(kw_only=True)
class BaselineConfig(Checked):
    """unet.py and pix2pix.py."""

    model: BaselineModelConfig = field(default_factory=BaselineModelConfig)
    lambda_l1: float = 100.0  # pix2pix: weight of L1 beside the adversarial loss
    compile: bool | None = None  # compile the training step; null: only with one GPU
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/baseline"))

    def problems(self) -> Iterator[str]:
        yield from schedule_problems(self)
        if not self.lambda_l1 >= 0:
            yield f"lambda_l1 must not be negative, got {self.lambda_l1}"
        if self.data.latents is not None:
            yield "data.latents is for train.py and finetune.py; leave it null here"
        if self.training.best_metric.removeprefix("-") not in MEASURES:
            yield (
                f"training.best_metric is {self.training.best_metric}; this run's evaluations"
                f" give {', '.join(MEASURES)}"
            )


def train(
    name: str, step: Callable[[BaselineConfig, nn.Module, Tensor, Tensor], tuple[Tensor, dict]]
) -> None:
    """Train the baseline `name` as the command line says.

    Args: step: (cfg, model, visible, infrared (B, 1, H, W)) -> loss, parts to log.
    """
    cfg = config.load(BaselineConfig, flags=FLAGS, default=f"configs/baselines/{name}.yaml")
    if cfg.model.baseline != name:
        raise ValueError(f"this script trains {name}; model.baseline is {cfg.model.baseline}")
    device = dist.init(cfg.run.device, cfg.run.deterministic, cfg.run.timeout)
    run = Run(cfg.run.output_dir, cfg)
    train_set, val_set = open_pairs(cfg.data, "train"), open_pairs(cfg.data, "val")
    for note in train_set.notes:
        dist.print0(f"data: {note}")
    ranks, training = (dist.rank(), dist.world_size()), cfg.training

    def batches(first: int):
        workers = cfg.data.num_workers
        return stream(train_set, training.batch_size, training.seed, *ranks, first, workers)

    torch.manual_seed(training.seed)  # the same random start on every rank
    model = dist.sync_batchnorm(build(cfg.model).to(device))
    on_gpu = device.type == "cuda"
    order = torch.channels_last if on_gpu else torch.contiguous_format
    model.to(memory_format=order)
    alone = on_gpu and ranks[1] == 1
    compiled = alone if cfg.compile is None else cfg.compile
    run_step = torch.compile(step, dynamic=False) if compiled else step

    def loss_fn(model: nn.Module, batch: dict):
        images = batch["visible"], batch["infrared"][:, :1]
        return run_step(cfg, model, *(x.contiguous(memory_format=order) for x in images))

    def eval_fn(model: Network) -> dict:
        found = validate(model, val_set, training.batch_size, cfg.data.num_workers, device)
        return {**found, **(draw_scenes(cfg, model, val_set, run, device) if ranks[0] == 0 else {})}

    if cfg.run.dry_run:
        batch = to_device(next(batches(0)), device)
        return dry_run(cfg, model, describe(train_set), batch, lambda: loss_fn(model, batch)[0])
    fit(cfg, model, loss_fn, batches, run, eval_fn, samples=len(train_set))
    dist.print0(f"best model: {run.dir / 'best_model.pth'}")


def validate(model: Network, pairs: Pairs, batch_size: int, workers: int, device) -> dict:
    """The mean of every measure over the pairs of all ranks. Collective."""
    sums = torch.zeros(len(MEASURES) + 1, dtype=torch.float64, device=device)
    for batch in sequential(pairs, batch_size, dist.rank(), dist.world_size(), workers):
        batch = to_device(batch, device)
        made = model.generate(batch["visible"], batch["draw"])
        true = batch["infrared"][:, :1]
        values = [f(made, true).double().sum() for f in MEASURES.values()]
        sums += torch.stack([*values, values[0].new_tensor(len(made))])
    *totals, count = dist.sum_over_ranks(sums).tolist()
    return {name: total / count for name, total in zip(MEASURES, totals)}


def draw_scenes(cfg: BaselineConfig, model: Network, pairs: Pairs, run: Run, device) -> dict:
    """A picture of a few validation scenes: {"scenes": (H, W, 3) uint8}; also written as a PNG."""
    if cfg.run.images < 1:
        return {}
    picked = [pairs.get(i, shape=pairs.size) for i in evenly_spaced(len(pairs), cfg.run.images)]
    batch = to_device(collate(picked), device)
    made = model.generate(batch["visible"], batch["draw"])
    columns = batch["visible"], made[:, 0], batch["infrared"][:, 0]
    photos, *thermal = (x.float().cpu().numpy() for x in columns)
    rows = [[panels.rgb(p), *map(panels.thermal_colors, t)] for p, *t in zip(photos, *thermal)]
    titles = ["visible", "generated", "infrared"]
    picture = panels.grid(rows, titles, batch["name"], color_bar="normalised infrared")
    panels.save_png(run.dir / "scenes.png", picture)
    return {"scenes": picture}
