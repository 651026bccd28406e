"""Stage 1: learn to split a photograph into intensity, material and context.

    python pretrain.py --config configs/demo/pretrain.yaml
    torchrun --nproc_per_node=2 pretrain.py --data_path datasets/mine --output_dir runs/mine
    python pretrain.py physics=off --output_dir runs/without_physics

Trains the decomposition on pseudo-labels computed from each pair and, unless physics is off, the
fusion of its maps on the infrared image itself. To resume, run the same command again.
"""

import math

import numpy as np
import torch

from assembly.stage1_step import stage1_step
from configs.schema import FLAGS, PretrainConfig
from data.materials import MATERIALS, material_colors
from data.pairs import describe, open_pairs
from data.pseudo_labels import prepare_pseudo_labels
from data.stream import collate, evenly_spaced, sequential, stream
from losses.pretrain import MultiTaskPretrainLoss
from models.fast.plan import speed_up_stage1
from models.stage1 import Stage1
from utils import config, dist, metrics, panels
from utils.dryrun import dry_run
from utils.labels import IGNORE
from utils.loop import fit, to_device
from utils.run import Run, entry
from utils.scenes import scene_cells, scene_figure

NEAR_CHANCE = 0.9  # a cross-entropy above this share of ln(materials) has learnt next to nothing


def main() -> None:
    cfg = config.load(PretrainConfig, flags=FLAGS, default="configs/pretrain.yaml")
    pretrain(cfg, dist.init(cfg.run.device, cfg.run.deterministic, cfg.run.timeout))


def pretrain(cfg: PretrainConfig, device: torch.device) -> None:
    run = Run(cfg.run.output_dir, cfg)

    # data
    train_set, val_set = open_pairs(cfg.data, "train"), open_pairs(cfg.data, "val")
    for note in train_set.notes:
        dist.print0(f"data: {note}")
    ranks = dist.rank(), dist.world_size()
    batch_size, workers = cfg.training.batch_size, cfg.data.num_workers

    def batches(first: int):
        return stream(train_set, batch_size, cfg.training.seed, *ranks, first, workers)

    # model: the same random start on every rank, with or without physics
    torch.manual_seed(cfg.training.seed)
    model = dist.sync_batchnorm(Stage1(cfg.model, cfg.physics).to(device))
    alone = device.type == "cuda" and ranks[1] == 1 and cfg.fast == "auto"
    compiled = alone if cfg.compile is None else cfg.compile
    dist.print0(speed_up_stage1(model, cfg.fast, compiled))

    # objective
    frequency = material_frequency(cfg, train_set) if cfg.loss.balance else torch.zeros(1)
    if cfg.loss.balance and not frequency.any():
        dist.print0("no labelled material found: loss.balance has no effect")
    objective = MultiTaskPretrainLoss(cfg.loss, frequency.to(device) if frequency.any() else None)
    replayed = compiled and device.type == "cuda" and cfg.training.gradient_accumulation_steps == 1
    loss_fn = stage1_step(cfg.data.labels, objective, compiled, replayed)

    # validation
    last = {}

    @torch.compiler.set_stance("force_eager")  # its last batch and its scenes have other shapes
    def eval_fn(model: Stage1) -> dict:
        loader = sequential(val_set, batch_size, *ranks, workers)
        batches = (to_device(batch, device) for batch in loader)
        last.update(validate(cfg, model, objective, batches, device))
        if "NEAR CHANCE" in (materials := verdict(cfg, last)[0]):
            dist.print0(materials)  # at once: no need to wait for the end of a useless run
        scenes = draw_scenes(cfg, model, val_set, run, device) if dist.is_main() else {}
        return {**last, **learnt(model), **scenes}

    if cfg.run.dry_run:
        batch = to_device(next(batches(0)), device)
        return dry_run(cfg, model, describe(train_set), batch, lambda: loss_fn(model, batch)[0])
    fit(cfg, model, loss_fn, batches, run, eval_fn, samples=len(train_set))
    if last:
        dist.print0("\n".join([f"best model: {run.dir / 'best_model.pth'}", *verdict(cfg, last)]))


def material_frequency(cfg: PretrainConfig, pairs, most: int = 256) -> torch.Tensor:
    """Labelled pixels of each material in at most `most` evenly spaced training pairs: (M,)."""
    counts = torch.zeros(cfg.model.num_materials, dtype=torch.int64)
    samples = min(len(pairs), most)
    for i in range(samples):
        batch = collate([pairs.get(i * len(pairs) // samples)])
        material = prepare_pseudo_labels(
            batch["visible"], batch["infrared"], batch["semantic"], cfg.data.labels
        ).material
        counts += torch.bincount(material[material != IGNORE], minlength=len(counts))
    return counts


def validate(cfg: PretrainConfig, model: Stage1, objective, batches, device) -> dict[str, float]:
    """Every loss term and metric over the samples of all ranks, however batched. Collective."""
    sums: dict[str, tuple[float, float]] = {}
    confusion = metrics.ConfusionMatrix(cfg.model.num_materials, device)
    for batch in batches:
        visible, infrared = batch["visible"], batch["infrared"][:, :1]
        labels = prepare_pseudo_labels(
            visible, batch["infrared"], batch["semantic"], cfg.data.labels
        )
        maps, fused = model(visible)
        total, parts = objective(*maps, fused, labels, infrared)
        confusion.update(maps.material.argmax(dim=1), labels.material)
        heat = {name: f(maps.intensity, infrared) for name, f in metrics.OF_INTENSITY.items()}
        values = {"loss": total, **parts, **heat}
        if fused is not None:
            image = fused.mean(dim=1, keepdim=True).clamp(0, 1)
            values |= {name: f(image, infrared) for name, f in metrics.OF_FUSED.items()}
        labelled = parts["labelled"].item() * len(visible)
        for name, value in values.items():
            count = labelled if name == "material_ce" else len(visible)
            if count:
                total_sum, total_count = sums.get(name, (0.0, 0.0))
                sums[name] = total_sum + value.mean().item() * count, total_count + count
    shares = dist.gather(sums)
    names = dict.fromkeys(name for share in shares for name in share)
    means = {
        n: sum(x.get(n, (0, 0))[0] for x in shares) / sum(x.get(n, (0, 0))[1] for x in shares)
        for n in names
    }
    frequency = dist.sum_over_ranks(confusion.counts).sum(1).double()
    means |= {**confusion.result(), "commonest": (frequency.max() / frequency.sum()).item()}
    return {f"val_{name}": value for name, value in means.items()}


def learnt(model: Stage1) -> dict[str, float]:
    """What the fusion has learnt: its scalars, and the emissivity-like weight of every material."""
    if model.fusion is None:
        return {}
    weights = model.fusion.material_weights().tolist()
    named = {f"weight/{m.name.replace(' ', '_')}": w for m, w in zip(MATERIALS, weights)}
    return {f"fusion/{name}": float(x) for name, x in model.fusion.scalars().items()} | named


def draw_scenes(cfg: PretrainConfig, model: Stage1, pairs, run: Run, device) -> dict:
    """A picture of a few validation scenes: {"scenes": (H, W, 3) uint8}; also written as a PNG."""
    if cfg.run.images < 1:
        return {}
    picked = [pairs.get(i, shape=pairs.size) for i in evenly_spaced(len(pairs), cfg.run.images)]
    batch = to_device(collate(picked), device)
    visible, infrared = batch["visible"], batch["infrared"]
    labels = prepare_pseudo_labels(visible, infrared, batch["semantic"], cfg.data.labels)
    (intensity, material, context), fused = model(visible)
    colors, names = np.asarray(material_colors()), [m.name for m in MATERIALS]
    trained = cfg.data.labels.material_source != "none"  # else the map means nothing
    cells = scene_cells(
        colors,
        visible=visible,
        intensity=intensity,
        context=context,
        fused=fused,
        material=material if trained else None,
        infrared=infrared,
        material_label=labels.material if trained else None,
    )
    ids = [x.cpu().numpy() for x in (material.argmax(dim=1), labels.material)] if trained else []
    picture = scene_figure(cells, batch["name"], names, colors, ids)
    panels.save_png(run.dir / "scenes.png", picture)
    return {"scenes": picture}


def verdict(cfg: PretrainConfig, values: dict[str, float]) -> list[str]:
    """How good the maps are, in words: a line for materials, a line for heat."""
    source, chance = cfg.data.labels.material_source, math.log(cfg.model.num_materials)
    heat = f"Pearson(intensity, infrared) {values['val_pearson']:.3f}"
    if "val_psnr" in values:
        heat += f", fused infrared {values['val_psnr']:.2f} dB, SSIM {values['val_ssim']:.3f}"
    if not values["val_labelled"]:
        text = f"materials: no validation scene has labels (data.labels.material_source={source}),"
        return [f"{text} so the material map means nothing", f"heat: {heat}"]
    ce, common = values["val_material_ce"], values["val_commonest"]
    text = f"materials: cross-entropy {ce:.3f} (chance {chance:.3f}), accuracy "
    text += f"{values['val_accuracy']:.3f} (commonest material everywhere: {common:.3f}),"
    text += f" mIoU {values['val_miou']:.3f}"
    if source == "quantized":
        text += "; these are grey levels of the photograph, not materials"
    if values["val_labelled"] < 1:
        text += f"; {1 - values['val_labelled']:.0%} of the scenes have no labels"
    if ce > NEAR_CHANCE * chance or values["val_accuracy"] <= values["val_commonest"]:
        text += "; NEAR CHANCE: the materials were not learnt"
    return [text, f"heat: {heat}"]


if __name__ == "__main__":
    entry(main)
