"""Stage 2: teach FLUX.1-Fill to paint the infrared half of a [visible | infrared] diptych.

    python train.py --decomposition_checkpoint runs/pretrain/best_model.pth
    torchrun --nproc_per_node=2 train.py --data_path datasets/mine --output_dir runs/mine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py

Trains LoRA and guidance (all of a random FLUX); the decomposition of stage 1 is frozen. To resume,
run the same command again.
"""

import torch

from assembly import checkpoints
from assembly.export import write_export
from assembly.latents import attach_latents
from assembly.translator_step import make_loss, make_predict
from configs.schema import FLAGS, TrainConfig, of_velocity
from data.materials import MATERIALS, material_colors
from data.pairs import Pairs, describe, open_pairs
from data.stream import collate, evenly_spaced, in_step, stream
from losses import flow
from models.fast.plan import Plan, choose_attention
from models.sampler import translate
from models.translator import Translator
from utils import config, dist, metrics
from utils.dryrun import dry_run
from utils.loop import fit, to_device
from utils.run import Run, entry
from utils.scenes import scene_cells, scene_figure


def main() -> None:
    cfg = config.load(TrainConfig, flags=FLAGS, default="configs/train.yaml")
    device = dist.init(cfg.run.device, cfg.run.deterministic, cfg.run.timeout)
    model, plan = checkpoints.new_translator(cfg, device)
    train(cfg, model, plan, device)


def train(cfg: TrainConfig, model: Translator, plan: Plan, device: torch.device) -> None:
    """Fit `model` as `cfg` says; stage 3 calls this too. `plan`: which fast parts it uses."""
    run = Run(cfg.run.output_dir, cfg)

    # data
    train_set, val_set = open_pairs(cfg.data, "train"), open_pairs(cfg.data, "val")
    for note in train_set.notes:
        dist.print0(f"data: {note}")
    if train_set.window:
        cfg.window, cfg.unit = [*train_set.window[:2]], train_set.window.unit
        cfg.planck = train_set.planck and [*train_set.planck]
    attach_latents(cfg, model, (train_set, val_set), device)
    ranks = dist.rank(), dist.world_size()
    training = cfg.training

    def batches(first: int):
        return stream(
            train_set, training.batch_size, training.seed, *ranks, first, cfg.data.num_workers
        )

    # objective
    tokens = len(model.backbone.ids(*train_set.size)) + cfg.model.text_tokens
    choose_attention(plan, model, training.batch_size, tokens)
    dist.print0(plan)
    predict = make_predict(cfg, model, device)
    loss_fn = make_loss(cfg, predict)

    # validation: the same samples, times and noise every time
    # a small model is compiled only for training batches: other shapes would be compiled again
    stance = "force_eager" if cfg.model.train_base else "default"

    names = of_velocity(cfg.flow)

    @torch.compiler.set_stance(stance)
    def eval_fn(model):
        bins = torch.zeros(2, len(flow.BIN_NAMES), device=device)
        total = torch.zeros(2, device=device)
        for batch in in_step(val_set, training.batch_size, *ranks, cfg.data.num_workers):
            loss_B, t, _, mean = predict(model, to_device(batch, device), len(val_set), seed=0)
            if batch["filler"]:
                continue
            total += torch.stack([loss_B.sum(), loss_B.new_tensor(len(loss_B))])
            bins += torch.stack(flow.loss_by_time_bin(loss_B, t, mean))
        loss, count = dist.sum_over_ranks(total).tolist()
        sums, counts = dist.sum_over_ranks(bins).cpu()
        means = zip(names, [loss / count, *(sums / counts).tolist()])
        return {**dict(means), **draw_scenes(cfg, model, val_set, device)}

    if cfg.run.dry_run:
        batch = to_device(next(batches(0)), device)
        return dry_run(cfg, model, describe(train_set), batch, lambda: loss_fn(model, batch)[0])
    flops = model.step_flops(*train_set.size)
    fit(cfg, model, loss_fn, batches, run, eval_fn, samples=len(train_set), sample_flops=flops)
    export(run)


def draw_scenes(cfg: TrainConfig, model: Translator, pairs: Pairs, device) -> dict:
    """Sample a few validation scenes: their picture and their mean PSNR and SSIM."""
    if cfg.run.images < 1:
        return {}
    picked = [pairs.get(i, shape=pairs.size) for i in evenly_spaced(len(pairs), cfg.run.images)]
    batch = to_device(collate(picked), device)
    visible, infrared = batch["visible"], batch["infrared"][:, :1]
    generated = translate(model, visible, batch["draw"], cfg.sampling)
    (intensity, material, context), fused = model.decompose(visible)
    colors, names = material_colors(), [m.name for m in MATERIALS]
    trained = cfg.data.labels.material_source != "none"  # else the map means nothing
    cells = scene_cells(
        colors,
        visible=visible,
        intensity=intensity,
        material=material if trained else None,
        context=context,
        fused=fused,
        generated=generated,
        infrared=infrared,
    )
    ids = list(material.argmax(1).cpu().numpy()) if trained else []
    return {
        "scenes": scene_figure(cells, batch["name"], names, colors, ids),
        "val_psnr": metrics.psnr(generated, infrared).mean().item(),
        "val_ssim": metrics.ssim(generated, infrared).mean().item(),
    }


def export(run: Run) -> None:
    """Write the best weights as a folder that generate.py and diffusers read."""
    best = run.dir / "best_model.pth"
    if dist.is_main() and best.is_file():
        write_export(best, run.dir / "export")


if __name__ == "__main__":
    entry(main)
