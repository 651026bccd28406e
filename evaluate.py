"""Stage 4: one table of a trained model on held-out pairs, beside rows that need no model.

    python evaluate.py --checkpoint runs/train/best_model.pth
    python evaluate.py --checkpoint runs/train/export --test_data datasets/other --split all
    python evaluate.py --checkpoint runs/unet/best_model.pth --boxes msrs/boxes --report

Rows: training mean (per pixel; where its pairs are not at hand, a note), grey, inverted grey, and
what the checkpoint makes: stage 1's fused image, ours, or a baseline's. docs/evaluation.md says
what is measured. Writes results.md, results.json, per_image.csv (and per_object.csv, report.html)
to --output_dir. Takes a checkpoint of any stage.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from assembly import checkpoints, features, protocol, report
from assembly.rows import codec_rows, decomposed, model_rows, reference_rows
from assembly.scoring import Found, Scorer
from baselines.training import BaselineConfig
from configs.schema import USE_FLAGS, EvaluateConfig
from data.pairs import open_pairs
from data.pseudo_labels import prepare_pseudo_labels
from data.radiometry import kelvin_measures
from data.stream import in_step, sequential
from losses.pretrain import material_cross_entropy
from utils import bootstrap, config, dist, metrics, results
from utils.loop import to_device
from utils.objects import Boxes
from utils.run import code_version, entry

MEAN_IMAGES = 400  # at most so many training images, evenly spaced, go into the training mean


@torch.no_grad()
def main() -> None:
    cfg = config.load(EvaluateConfig, flags=USE_FLAGS)
    device = dist.init(cfg.device)
    opened = checkpoints.open_all(cfg, device)
    pairs, data = opened.pairs, opened.data
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    mean, note = training_mean(data, cfg.batch_size, needed=not cfg.test_data)
    references = [*reference_rows(mean), *codec_rows(opened)]
    own = model_rows(opened)
    boxes = boxes_of(cfg, pairs.cfg.path)
    smallest = min(pairs.shapes or [pairs.size], key=min)
    scorer = Scorer(smallest, device, boxes, cfg.lpips)
    scorer.measures |= kelvin_measures(pairs.window, pairs.planck)
    of_maps = None if isinstance(opened.trained, BaselineConfig) else Stage1Scores(pairs, device)
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
    notes = [*pairs.notes, *([note] if note else []), *found.absent]
    facts = {
        "checkpoint": cfg.checkpoint,
        "data": cfg.test_data or data.path,
        "split": cfg.split,
        "pairs": len(found.images) // len([*references, *own]),
        "size": list(pairs.size),
        "protocol": protocol.describe(cfg, opened),
        "stage1": maps,
        "note": "; ".join(notes),
        "run": {
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_an_image": found.seconds,
            "device": str(device),
            "commit": code_version()[0],
        },
    }
    names = [row.name for row in own]
    whole = write(cfg, found, facts, names)
    if cfg.report:
        path = report.write(Path(cfg.output_dir), whole, found, chosen, cells, names)
        print(f"report: {path}")


def boxes_of(cfg: EvaluateConfig, path: str) -> Boxes | None:
    """The boxes that were asked for, else those beside the data, if any."""
    beside = Path(path) / "boxes"
    return Boxes(cfg.boxes or beside) if cfg.boxes or beside.is_dir() else None


def training_mean(data, batch_size: int, needed: bool) -> tuple[Tensor | None, str]:
    """(1, 1, H, W), the mean infrared image of the training split pixel by pixel, and no note.

    Images of several aspects are squashed to data.size for it: `reference_rows` stretches it back.
    Where the training data is not at hand: no image, and a note that says so, unless `needed`.
    """
    try:
        aspect = "squash" if data.aspect == "buckets" else data.aspect
        train = open_pairs(replace(data, aspect=aspect), "train")
    except ValueError as error:
        if needed:
            raise
        return None, f"no row of the training mean, its pairs are not at hand: {error}"
    total, count = 0, 0
    for batch in sequential(train, batch_size, num_workers=data.num_workers, limit=MEAN_IMAGES):
        total = total + batch["infrared"][:, :1].double().sum(0, keepdim=True)
        count += len(batch["infrared"])
    return (total / count).float(), ""


class Stage1Scores:
    """How well stage 1's maps agree with the labels: accuracy, mIoU, cross-entropy, Pearson."""

    def __init__(self, pairs, device):
        self.labels, self.matrix = pairs.cfg.labels, metrics.ConfusionMatrix(32, device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, maps, batch: dict) -> None:
        if batch["filler"]:
            return
        infrared = batch["infrared"][:, :1]
        labels = prepare_pseudo_labels(batch["visible"], infrared, batch["semantic"], self.labels)
        self.matrix.update(maps.material.argmax(1), labels.material)
        _, ce, known = material_cross_entropy(maps.material, labels.material)
        pearson = metrics.pearson(maps.intensity.clamp(0, 1), infrared)
        found = ce.sum(), known.sum(), pearson.sum(), ce.new_tensor(len(ce))
        self.sums += torch.stack(found).double()

    def result(self) -> dict[str, float]:
        ce, labelled, pearson, count = dist.sum_over_ranks(self.sums).tolist()
        return {
            **self.matrix.result(),
            "material_ce": ce / labelled if labelled else math.nan,
            "chance_ce": math.log(32),
            "labelled_pairs": int(labelled),
            "material_source": self.labels.material_source,
            "pearson_intensity": pearson / count,
        }


def write(cfg: EvaluateConfig, found: Found, facts: dict, own: list[str]) -> dict:
    """Write and print the tables; what results.json holds."""
    truth, sets = found.pooled.get("truth"), {}
    if truth is not None and len(truth) > 1:
        weights = bootstrap.weights(len(truth))
        for method in (name for name in found.pooled if name != "truth"):
            values = (
                features.kernel_distance(found.pooled[method], truth, w) for w in (None, weights)
            )
            sets[method] = {"kid_like": tuple(values)}
    summary = results.summarise(found.images, found.boxes, own, found.displacement, sets)
    run, stage1, (H, W) = facts["run"], facts["stage1"], facts["size"]
    lines = results.table(summary, run["seconds_an_image"])
    lines += ["", f"{facts['pairs']} pairs of `{facts['data']}` ({facts['split']}), {H} x {W},"]
    lines[-1] += f" {run['seconds']} s on {run['device']}; checkpoint `{facts['checkpoint']}`;"
    lines[-1] += f" protocol {facts['protocol']['id']}; ± half of the 95 % interval over images"
    if sampler := facts["protocol"]["sampler"]:
        lines.append("; ".join(f"{k} {v}" for k, v in sampler.items()))
    lines += [f"WARNING: {text}" for text in summary["warnings"]]
    lines += [*filter(None, [facts["note"]])]
    if stage1:
        lines += [materials_sentence(stage1)]
        lines.append(f"Pearson(intensity, infrared) {stage1['pearson_intensity']:.3f}")
    if own:
        lines += ["", *results.verdict_table(summary, own[-1])]
    if summary["objects"]:
        shown = [name for name in summary["methods"] if name in ("training mean", *own)]
        lines += ["", *results.object_table(summary, shown)]
    text = "\n".join(lines) + "\n"
    whole = {**summary, **facts}
    results.write(Path(cfg.output_dir), found.images, found.boxes, whole, text)
    print(text + f"written to {cfg.output_dir}: results.md, results.json, per_image.csv")
    return whole


def materials_sentence(stage1: dict) -> str:
    """What the material head is worth, in words."""
    if not stage1["labelled_pairs"]:
        return "materials: not scored, no pair has labels"
    text = f"materials ({stage1['material_source']} labels): cross-entropy"
    text += f" {stage1['material_ce']:.3f} (chance ln 32 = {stage1['chance_ce']:.3f}), accuracy"
    return f"{text} {stage1['accuracy']:.3f}, mIoU {stage1['miou']:.3f}"


if __name__ == "__main__":
    entry(main)
