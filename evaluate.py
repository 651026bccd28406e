"""Stage 4: a table of a trained model on held-out pairs, with rows that need no model.

    python evaluate.py --checkpoint runs/train/best_model.pth
    python evaluate.py --checkpoint runs/train/export --test_data datasets/other --split all
    python evaluate.py --checkpoint runs/unet/best_model.pth --boxes msrs/boxes --report

Rows: training mean (per pixel; a note if its pairs are missing), grey, inverted grey, and what the
checkpoint makes: stage 1's fused image, ours, or a baseline's. docs/evaluation.md explains the
metrics. Writes results.md, results.json, per_image.csv (and per_object.csv, report.html) to
--output_dir. Takes a checkpoint of any stage.
"""

import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from assembly import checkpoints, protocol, report, tables
from assembly.atlas import Atlas, label_set_of
from assembly.peers import PEERS, PeerPairs, note_of
from assembly.rows import codec_rows, decomposed, model_rows, reference_rows, training_mean
from assembly.scoring import Scorer
from assembly.stage1_scores import Stage1Scores
from baselines.training import BaselineConfig
from configs.schema import USE_FLAGS, EvaluateConfig
from data.radiometry import kelvin_measures
from data.stream import in_step
from utils import config, dist
from utils.loop import to_device
from utils.objects import find_boxes
from utils.run import code_version, command_line, entry


@torch.no_grad()
def main() -> None:
    cfg = config.load(EvaluateConfig, flags=USE_FLAGS)
    device = dist.init(cfg.device)
    opened = checkpoints.open_all(cfg, device)
    peer = PEERS[cfg.protocol] if cfg.protocol else None
    pairs: Any = PeerPairs(opened.pairs, peer) if peer else opened.pairs
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    mean, note = training_mean(opened.data, cfg.batch_size, not cfg.test_data, peer)
    references = [*reference_rows(mean), *codec_rows(opened)]
    own = model_rows(opened)
    boxes = None if peer else find_boxes(cfg.boxes, opened.pairs.cfg.path)
    atlas = None if peer else Atlas(label_set_of(opened.pairs), boxes)
    smallest = min(pairs.shapes or [pairs.size], key=min)
    scorer = Scorer(smallest, device, boxes, cfg.lpips, atlas, peer)
    of_maps = None
    if not peer:
        scorer.measures |= kelvin_measures(pairs.window, pairs.planck)
        if not isinstance(opened.trained, BaselineConfig):
            of_maps = Stage1Scores(pairs, device)
    ranks, started = (dist.rank(), dist.world_size()), time.perf_counter()
    batches = in_step(pairs, cfg.batch_size, *ranks, cfg.num_workers, cfg.limit)
    for batch in tqdm(batches, desc=f"evaluate {cfg.split}", unit="batch", disable=ranks[0] > 0):
        batch = to_device(batch, device)
        scorer.score([*references, *own], batch)
        if of_maps:
            of_maps.update(decomposed(opened, batch).maps, batch)
    found, maps = scorer.result(), of_maps.result() if of_maps else None
    chosen, cells = {}, {}
    if cfg.report and own:
        chosen = report.picks(found, own[-1].name)
        wanted = sorted({index for indices in chosen.values() for index in indices})
        cells = report.pictures(opened, own, wanted, device, boxes)
    if not dist.is_main():
        return
    notes = [*opened.pairs.notes, *([note] if note else []), *found.absent]
    notes += note_of(opened.pairs.window) if peer else []
    names = [row.name for row in own]
    whole = {
        **tables.summarise(found, names, atlas and atlas.not_measured, peer),
        "checkpoint": cfg.checkpoint,
        "data": cfg.test_data or opened.data.path,
        "split": cfg.split,
        "pairs": len(found.images) // len([*references, *own]),
        "size": list(pairs.size),
        "protocol": protocol.describe(cfg, opened, cfg.protocol),
        "stage1": maps,
        "note": "; ".join(notes),
        "run": {
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_an_image": found.seconds,
            "device": str(device),
            "commit": code_version()[0],
            "command": command_line(),
        },
    }
    tables.write(Path(cfg.output_dir), found, whole, names, peer)
    if cfg.report:
        path = report.write(Path(cfg.output_dir), whole, found, chosen, cells, names)
        print(f"report: {path}")


if __name__ == "__main__":
    entry(main)
