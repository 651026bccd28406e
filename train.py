"""Stage 2: teach FLUX.1-Fill to paint the infrared half of a [visible | infrared] diptych.

    python train.py --decomposition_checkpoint runs/pretrain/best_model.pth
    torchrun --nproc_per_node=2 train.py --data_path datasets/mine --output_dir runs/mine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py

Trains LoRA and guidance (all of a random FLUX); the decomposition of stage 1 is frozen. To resume,
run the same command again.
"""

import torch

from configs import restore
from configs.schema import FLAGS, TrainConfig
from data.materials import MATERIALS, material_colors
from data.pairs import Pairs, describe, open_pairs
from data.pseudo_labels import prepare_pseudo_labels
from data.stream import collate, evenly_spaced, sequential, stream
from losses import flow
from losses.pretrain import MultiTaskPretrainLoss
from models.bundle import save_bundle
from models.codec import in_infrared_panel, tokens_shape
from models.sampler import noise_for, translate
from models.translator import Translator
from utils import checkpoint, config, dist, metrics
from utils.dryrun import dry_run
from utils.loop import fit, to_device
from utils.run import Run, entry
from utils.scenes import scene_cells, scene_figure


def main() -> None:
    cfg = config.load(TrainConfig, flags=FLAGS, default="configs/train.yaml")
    device = dist.init(cfg.run.device)
    train(cfg, restore.new_translator(cfg, device), device)


def train(cfg: TrainConfig, model: Translator, device: torch.device) -> None:
    """Fit `model` as `cfg` says; stage 3 calls this too."""
    run = Run(cfg.run.output_dir, cfg)

    # data
    train_set, val_set = open_pairs(cfg.data, "train"), open_pairs(cfg.data, "val")
    if train_set.window:
        cfg.window = [train_set.window.low, train_set.window.high]
    ranks = dist.rank(), dist.world_size()
    batch_size, seed = cfg.training.batch_size, cfg.training.seed

    def batches(first: int):
        return stream(train_set, batch_size, seed, *ranks, first, cfg.data.num_workers)

    # objective
    H, W = train_set.size
    shape, infrared_N = tokens_shape(H, W), in_infrared_panel(H, W, device)
    group = batch_size * cfg.training.gradient_accumulation_steps * dist.world_size()
    round_time, stage1_loss = model.round_time, MultiTaskPretrainLoss(cfg.loss)
    consistency_weight = cfg.training.lambda_decomposition_consistency
    if consistency_weight and cfg.model.freeze_decomposition:
        raise ValueError("training.lambda_decomposition_consistency > 0 has no effect on a frozen"
                         " decomposition; use finetune.py or --no_freeze_decomposition")

    def predict(model, batch, group, seed):
        """Per-sample loss (B,), times (B,) and the prediction; a function of (seed, draws)."""
        draws = batch["draw"].tolist()
        times = flow.sample_times(draws, group, seed, cfg.flow.mean, cfg.flow.std, cfg.flow.shift)
        t = round_time(times.to(device))
        noise = noise_for(draws, shape, seed, device)
        out = model(batch["visible"], batch["infrared"], noise, t)
        error = flow.velocity_error(out.velocity, out.data, noise)
        return flow.flow_loss(error, infrared_N, cfg.flow.visible_weight), t, out

    def loss_fn(model, batch):
        loss_B, t, out = predict(model, batch, group, seed)
        generation = loss_B.mean()
        parts = {"generation": generation.detach(), **by_time(loss_B, t)}
        loss = cfg.training.lambda_generation * generation
        if consistency_weight:
            labels = prepare_pseudo_labels(
                batch["visible"], batch["infrared"], batch["semantic"], cfg.data.labels
            )
            consistency, terms = stage1_loss(
                *out.stage1.maps, out.stage1.fused, labels, batch["infrared"][:, :1]
            )
            loss = loss + consistency_weight * consistency
            parts |= {"consistency": consistency.detach()}
            parts |= {f"stage1_{name}": value for name, value in terms.items()}
        return loss, parts

    # validation: the same samples, times and noise every time
    def eval_fn(model):
        totals = torch.zeros(2, device=device)
        bins = torch.zeros(2, flow.TIME_BINS, device=device)
        for batch in sequential(val_set, batch_size, *ranks, cfg.data.num_workers):
            batch = to_device(batch, device)
            loss_B, t, _ = predict(model, batch, len(val_set), seed=0)
            totals += torch.stack([loss_B.sum(), torch.tensor(len(loss_B), device=device)])
            bins += torch.stack(flow.loss_by_time_bin(loss_B, t))
        total, count = dist.sum_over_ranks(totals).tolist()
        sums, counts = dist.sum_over_ranks(bins).cpu()
        result = {"val_loss": total / count}
        result |= {f"val_loss_t{i}": x for i, x in enumerate((sums / counts).tolist())}
        return result | draw_scenes(cfg, model, val_set, device)

    if cfg.run.dry_run:
        batch = to_device(next(batches(0)), device)
        return dry_run(cfg, model, describe(train_set), batch, lambda: loss_fn(model, batch)[0])
    model.flops_per_sample = model.step_flops(H, W)
    fit(cfg, model, loss_fn, batches, run, eval_fn, samples=len(train_set))
    export(cfg, model, run)


def by_time(loss_B: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean loss in ten bins of t; NaN (which the log leaves out) in bins without a sample."""
    sums, counts = flow.loss_by_time_bin(loss_B, t)
    return {f"loss_t{i}": x for i, x in enumerate(sums / counts)}


def draw_scenes(cfg: TrainConfig, model: Translator, pairs: Pairs, device) -> dict:
    """Sample a few validation scenes: their picture and their mean PSNR and SSIM."""
    if cfg.run.images < 1:
        return {}
    picked = [pairs.get(i) for i in evenly_spaced(len(pairs), cfg.run.images)]
    batch = to_device(collate(picked), device)
    visible, infrared = batch["visible"], batch["infrared"][:, :1]
    generated = translate(model, visible, batch["draw"].tolist(), cfg.sampling)
    (intensity, material, context), fused = model.decompose(visible)
    colors = material_colors()
    cells = scene_cells(
        colors, visible=visible, intensity=intensity, material=material, context=context,
        fused=fused, generated=generated, infrared=infrared,
    )  # fmt: skip
    names, ids = [m.name for m in MATERIALS], list(material.argmax(1).cpu().numpy())
    return {
        "scenes": scene_figure(cells, batch["name"], names, colors, ids),
        "val_psnr": metrics.psnr(generated, infrared).mean().item(),
        "val_ssim": metrics.ssim(generated, infrared).mean().item(),
    }


def export(cfg: TrainConfig, model: Translator, run: Run) -> None:
    """Write the best weights as a folder that generate.py and diffusers read."""
    best = run.dir / "best_model.pth"
    if dist.is_main() and best.is_file():
        parts = checkpoint.load(best)
        checkpoint.load_into(model, parts["model"], best)
        state = checkpoint.trained_state(model)
        save_bundle(run.dir / "export", model, state, config.to_dict(cfg), parts["versions"])
        print(f"best model: {best}; exported to {run.dir / 'export'}")


if __name__ == "__main__":
    entry(main)
