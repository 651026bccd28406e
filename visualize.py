"""Stage 4: one PNG a scene: visible, the maps of stage 1, fused and generated infrared, and truth.

    python visualize.py --checkpoint runs/train/best_model.pth --output_dir panels --limit 12
"""

from pathlib import Path

import torch
from tqdm import tqdm

from configs import restore
from configs.schema import USE_FLAGS, EvaluateConfig
from data.materials import MATERIALS, material_colors
from data.pseudo_labels import prepare_pseudo_labels
from data.stream import in_step
from models.sampler import translate
from utils import config, dist, panels
from utils.loop import to_device
from utils.run import entry
from utils.scenes import scene_cells, scene_figure

DEFAULT_SCENES = 12


@torch.no_grad()
def main() -> None:
    cfg = config.load(EvaluateConfig, flags=USE_FLAGS)
    device = dist.init(cfg.device)
    stage1, translator, _, data, pairs, sampling = restore.open_all(cfg, device)
    folder, colors = Path(cfg.output_dir), material_colors()
    names = [material.name for material in MATERIALS]

    ranks = dist.rank(), dist.world_size()
    limit = cfg.limit or DEFAULT_SCENES
    batches = in_step(pairs, cfg.batch_size, *ranks, cfg.num_workers, limit)
    for batch in tqdm(batches, desc="draw", unit="batch", disable=ranks[0] > 0):
        batch = to_device(batch, device)
        visible, infrared = batch["visible"], batch["infrared"][:, :1]
        labels = prepare_pseudo_labels(visible, infrared, batch["semantic"], data.labels)
        (intensity, material, context), fused = (
            translator.decompose(visible) if translator else stage1(visible)
        )
        ours = None
        if translator:
            ours = translate(translator, visible, batch["draw"].tolist(), sampling)
        if batch["filler"]:
            continue
        trained = data.labels.material_source != "none"  # else the map means nothing
        cells = scene_cells(
            colors, visible=visible, intensity=intensity,
            material_label=labels.material if trained else None,
            material=material if trained else None,
            context=context, fused=fused, generated=ours, infrared=infrared,
        )  # fmt: skip
        maps = material.argmax(1).cpu().numpy()
        for cell, name, source, seen in zip(cells, batch["name"], batch["source"], maps):
            heading = f"{source}  {name}" if source else name
            ids = [seen] if trained else []
            picture = scene_figure([cell], [name], names, colors, ids, heading)
            panels.save_png(folder / f"{source or 'scene'}_{name}.png", picture)
    dist.print0(f"panels in {folder}")


if __name__ == "__main__":
    entry(main)
