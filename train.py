"""Stage 2: teach FLUX.1-Fill to paint the infrared half of a [visible | infrared] diptych.

    python train.py --decomposition_checkpoint runs/pretrain/best_model.pth
    torchrun --nproc_per_node=2 train.py --data_path datasets/mine --output_dir runs/mine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py

Trains LoRA and guidance (all of a random FLUX); the decomposition of stage 1 is frozen. To resume,
run the same command again.
"""

import torch

from assembly import checkpoints
from assembly.latents import attach_latents
from configs.schema import FLAGS, TrainConfig
from data.materials import MATERIALS, material_colors
from data.pairs import Pairs, describe, open_pairs
from data.pseudo_labels import prepare_pseudo_labels
from data.stream import collate, evenly_spaced, in_step, stream
from losses import flow
from losses.pretrain import MultiTaskPretrainLoss
from models.bundle import save_bundle
from models.codec import in_infrared_panel, tokens_shape
from models.fast.plan import Plan, choose_attention
from models.sampler import noise_for, translate
from models.translator import Translator
from utils import checkpoint, config, dist, metrics
from utils.dryrun import dry_run
from utils.loop import fit, to_device
from utils.run import Run, entry
from utils.scenes import scene_cells, scene_figure


def main() -> None:
    cfg = config.load(TrainConfig, flags=FLAGS, default="configs/train.yaml")
    device = dist.init(cfg.run.device, cfg.run.deterministic)
    model, plan = checkpoints.new_translator(cfg, device)
    train(cfg, model, plan, device)


def train(cfg: TrainConfig, model: Translator, plan: Plan, device: torch.device) -> None:
    """Fit `model` as `cfg` says; stage 3 calls this too. `plan`: what of it is fast."""
    run = Run(cfg.run.output_dir, cfg)

    # data
    train_set, val_set = open_pairs(cfg.data, "train"), open_pairs(cfg.data, "val")
    for note in train_set.notes:
        dist.print0(f"data: {note}")
    if train_set.window:
        cfg.window = [train_set.window.low, train_set.window.high]
    attach_latents(cfg, model, (train_set, val_set), device)
    ranks = dist.rank(), dist.world_size()
    training = cfg.training

    def batches(first: int):
        return stream(
            train_set, training.batch_size, training.seed, *ranks, first, cfg.data.num_workers
        )

    # objective
    tokens = tokens_shape(*train_set.size)[0] + cfg.model.text_tokens
    choose_attention(plan, model, training.batch_size, tokens)
    dist.print0(plan)
    predict = make_predict(cfg, model, train_set.size, device)
    loss_fn = make_loss(cfg, predict)

    # validation: the same samples, times and noise every time
    def eval_fn(model):
        bins = torch.zeros(2, flow.TIME_BINS, device=device)
        total = torch.zeros(2, device=device)
        for batch in in_step(val_set, training.batch_size, *ranks, cfg.data.num_workers):
            loss_B, t, _ = predict(model, to_device(batch, device), len(val_set), seed=0)
            if batch["filler"]:
                continue
            total += torch.stack([loss_B.sum(), loss_B.new_tensor(len(loss_B))])
            bins += torch.stack(flow.loss_by_time_bin(loss_B, t))
        loss, count = dist.sum_over_ranks(total).tolist()
        sums, counts = dist.sum_over_ranks(bins).cpu()
        found = {f"val_loss_t{i}": x for i, x in enumerate((sums / counts).tolist())}
        return {"val_loss": loss / count, **found, **draw_scenes(cfg, model, val_set, device)}

    if cfg.run.dry_run:
        batch = to_device(next(batches(0)), device)
        return dry_run(cfg, model, describe(train_set), batch, lambda: loss_fn(model, batch)[0])
    flops = model.step_flops(*train_set.size)
    fit(cfg, model, loss_fn, batches, run, eval_fn, samples=len(train_set), sample_flops=flops)
    export(cfg, model, run)


def make_predict(cfg: TrainConfig, model: Translator, size: tuple[int, int], device):
    """predict(model, batch, group, seed) -> loss (B,), t (B,), prediction; the model may be DDP's.

    Times and noise are functions of (seed, draw), so that ranks, accumulation and resuming agree.
    """
    shape, infrared_N = tokens_shape(*size), in_infrared_panel(*size, device)
    round_time, infrared_only = model.round_time, cfg.flow.visible_weight == 0

    def predict(model, batch: dict, group: int, seed: int):
        draws = batch["draw"]
        times = flow.sample_times(draws, group, seed, cfg.flow.mean, cfg.flow.std, cfg.flow.shift)
        t = round_time(times.to(device, non_blocking=True))
        noise = noise_for(draws, shape, seed, device)
        encoded = (batch["latents"], batch["masked"]) if "latents" in batch else None
        out = model(batch["visible"], batch["infrared"], noise, t, encoded, infrared_only)
        error = flow.velocity_error(out.velocity, out.data, noise)
        return flow.flow_loss(error, infrared_N, cfg.flow.visible_weight), t, out

    return predict


def make_loss(cfg: TrainConfig, predict):
    """The loss of a step: the velocity error, and in stage 3 stage 1's loss on the maps."""
    training, weight = cfg.training, cfg.training.lambda_decomposition_consistency
    if weight and cfg.model.freeze_decomposition:
        raise ValueError(
            "training.lambda_decomposition_consistency > 0 has no effect on a frozen"
            " decomposition; use finetune.py or --no_freeze_decomposition"
        )
    if cfg.loss.balance:
        raise ValueError(
            "loss.balance needs the frequency of each material, which only pretrain.py"
            " counts; leave it 0 here"
        )
    group = training.batch_size * training.gradient_accumulation_steps * dist.world_size()
    stage1_loss = MultiTaskPretrainLoss(cfg.loss)

    def loss_fn(model, batch: dict):
        loss_B, t, out = predict(model, batch, group, training.seed)
        loss = training.lambda_generation * loss_B.mean()
        parts = {"generation": loss_B.detach().mean(), **by_time(loss_B, t)}
        if not cfg.model.freeze_decomposition:  # of weight 0 too: DDP needs all that is trained
            labels = prepare_pseudo_labels(
                batch["visible"], batch["infrared"], batch["semantic"], cfg.data.labels
            )
            maps, fused = out.stage1
            consistency, terms = stage1_loss(*maps, fused, labels, batch["infrared"][:, :1])
            loss = loss + weight * consistency
            parts["consistency"] = consistency.detach()
            parts |= {f"stage1_{name}": value for name, value in terms.items()}
        return loss, parts

    return loss_fn


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
