"""Stage 4: one PNG per scene, and what stage 1 has learnt about the materials.

    python visualize.py --checkpoint runs/train/best_model.pth --output_dir panels --limit 12

Scenes: visible, the maps of stage 1, fused and generated infrared, and truth. emissivity.png: the
learnt weight of each material against the prior. confusion.png: labelled against predicted.
curves.png: how the fusion was learnt, if metrics.jsonl lies beside the checkpoint.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from assembly import checkpoints
from baselines.training import BaselineConfig
from configs.schema import USE_FLAGS, HeldOutConfig
from data.materials import MATERIALS, emissivity_prior, material_colors
from data.pseudo_labels import NONE, QUANTIZED, prepare_pseudo_labels
from data.stream import in_step, sequential
from models.sampler import translate
from utils import config, dist, metrics, panels, plots
from utils.loop import to_device
from utils.run import entry, read_rows
from utils.scenes import scene_cells, scene_figure

DEFAULT_SCENES = 12
LONGEST = 200  # bytes of a file name
UNSAFE = re.compile(r"[^\w.-]+")
NAMES = [material.name for material in MATERIALS]


@torch.no_grad()
def main() -> None:
    cfg = config.load(HeldOutConfig, flags=USE_FLAGS)
    device = dist.init(cfg.device)
    opened = checkpoints.open_all(cfg, device)
    if isinstance(opened.trained, BaselineConfig):
        raise ValueError(
            f"{cfg.checkpoint} is a baseline, which has no maps to draw; evaluate.py --report"
            " shows its images"
        )
    for note in opened.pairs.notes:
        dist.print0(f"data: {note}")
    folder = Path(cfg.output_dir)
    draw_scenes(cfg, opened, folder, device)
    counts, accuracy = count_materials(cfg, opened, device)
    if dist.is_main():
        draw_confusion(counts, accuracy, folder / "confusion.png")
        draw_emissivity(opened, counts, folder / "emissivity.png")
        draw_curves(cfg.checkpoint, counts, folder / "curves.png")
        print(f"panels in {folder}")


def draw_scenes(cfg: HeldOutConfig, opened: checkpoints.Opened, folder: Path, device) -> None:
    """A panel for each of (by default) DEFAULT_SCENES scenes."""
    stage1, translator, _, _, pairs, sampling = opened
    colors, ranks = material_colors(), (dist.rank(), dist.world_size())
    limit = cfg.limit or DEFAULT_SCENES
    files = file_names(pairs.names, pairs.sources)
    batches = in_step(pairs, cfg.batch_size, *ranks, cfg.num_workers, limit)
    for batch in tqdm(batches, desc="draw", unit="batch", disable=ranks[0] > 0):
        batch = to_device(batch, device)
        visible, infrared = batch["visible"], batch["infrared"][:, :1]
        labels = prepare_pseudo_labels(visible, infrared, batch["semantic"], pairs.cfg.labels)
        (intensity, material, context), fused = (
            translator.decompose(visible) if translator else stage1(visible)
        )
        ours = None
        if translator:
            ours = translate(translator, visible, batch["draw"], sampling)
        if batch["filler"]:
            continue
        trained = pairs.cfg.labels.material_source != NONE  # else the map means nothing
        cells = scene_cells(
            colors,
            visible=visible,
            intensity=intensity,
            material_label=labels.material if trained else None,
            material=material if trained else None,
            context=context,
            fused=fused,
            generated=ours,
            infrared=infrared,
        )
        maps = material.argmax(1).cpu().numpy()
        for cell, name, source, draw, seen in zip(
            cells, batch["name"], batch["source"], batch["draw"], maps
        ):
            heading = f"{source}  {name}" if source else name
            ids = [seen] if trained else []
            picture = scene_figure([cell], [name], NAMES, colors, ids, heading)
            panels.save_png(folder / f"{files[draw]}.png", picture)


def file_names(names: list[str], sources: list[str]) -> list[str]:
    """One unique file name per pair; a pair's name may be a path, or occur twice."""
    files = [UNSAFE.sub("_", f"{s or 'scene'}_{n}") for n, s in zip(names, sources)]
    files = [file.encode()[:LONGEST].decode(errors="ignore") for file in files]
    often = {file for file, count in Counter(files).items() if count > 1}
    return [f"{file}_{i}" if file in often else file for i, file in enumerate(files)]


def count_materials(
    cfg: HeldOutConfig, opened: checkpoints.Opened, device
) -> tuple[Tensor, dict[str, float]]:
    """(M, M) pixels by label and prediction over the split (or --limit pairs), {accuracy, miou}.

    All zero where labels are none or quantized, which are not materials. Collective.
    """
    stage1, translator, _, _, pairs, _ = opened
    matrix, ranks = metrics.ConfusionMatrix(len(NAMES), device), (dist.rank(), dist.world_size())
    if pairs.cfg.labels.material_source not in (NONE, QUANTIZED):
        batches = sequential(pairs, cfg.batch_size, *ranks, cfg.num_workers, cfg.limit)
        for batch in tqdm(batches, desc="materials", unit="batch", disable=ranks[0] > 0):
            batch = to_device(batch, device)
            visible, infrared = batch["visible"], batch["infrared"]
            labels = prepare_pseudo_labels(visible, infrared, batch["semantic"], pairs.cfg.labels)
            maps = (translator.decompose(visible) if translator else stage1(visible))[0]
            matrix.update(maps.material.argmax(1), labels.material)
    return dist.sum_over_ranks(matrix.counts).cpu(), matrix.result()


def draw_confusion(counts: Tensor, scores: dict[str, float], path: Path) -> None:
    if not counts.any():
        return print(f"no {path.name}: no pixel of these scenes has a material label")
    title = (
        f"materials, percent of each row: accuracy {scores['accuracy']:.3f}, "
        f"mIoU {scores['miou']:.3f}"
    )
    figure = plots.confusion_figure(counts.numpy(), NAMES, title)
    panels.save_png(path, panels.pixels_of(figure))


def draw_emissivity(opened: checkpoints.Opened, counts: Tensor, path: Path) -> None:
    source = opened.pairs.cfg.labels.material_source
    if opened.stage1.fusion is None or source in (NONE, QUANTIZED):
        why = "physics is off" if opened.stage1.fusion is None else f"material labels are {source}"
        return print(f"no {path.name}: {why}, so no weight belongs to a material")
    learned, prior = opened.stage1.fusion.material_weights().cpu(), emissivity_prior()
    share = counts.sum(1) / counts.sum().clamp(min=1)
    occurs = share > 0
    pair = (x[occurs].view(1, 1, 1, -1) for x in (learned, prior))
    rank = metrics.rank_correlation(*pair).item() if occurs.sum() > 1 else float("nan")
    figure = plots.emissivity_figure(
        learned.numpy(), prior.numpy(), share.numpy(), NAMES, material_colors(), rank
    )
    panels.save_png(path, panels.pixels_of(figure))


def draw_curves(checkpoint: str, counts: Tensor, path: Path) -> None:
    """From the run's log; stage 2 and exported folders lack these values."""
    beside = Path(checkpoint)
    log = (beside if beside.is_dir() else beside.parent) / "metrics.jsonl"
    rows = read_rows(log) if log.is_file() else []
    if not any("fusion/power" in row for row in rows):
        return print(f"no {path.name}: {log} has no fusion/power; stage 1's run with physics has")
    shown = np.flatnonzero(counts.sum(1)) if counts.any() else range(len(NAMES))
    figure = plots.curves_figure(rows, NAMES, material_colors(), shown)
    panels.save_png(path, panels.pixels_of(figure))


if __name__ == "__main__":
    entry(main)
