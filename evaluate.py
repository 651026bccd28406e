"""Stage 4: one table of a trained model on held-out pairs, beside rows that need no model.

    python evaluate.py --checkpoint runs/train/best_model.pth
    python evaluate.py --checkpoint runs/train/export --test_data datasets/other --split all

Rows: training mean (per pixel; where its pairs are not at hand, a note), grey, inverted grey,
stage 1's fused image, and ours; --lpips adds a column. Writes results.md, results.json and
per_image.csv to --output_dir. Takes a checkpoint of any stage.
"""

import csv
import io
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from assembly import checkpoints
from configs.schema import USE_FLAGS, EvaluateConfig
from data.pairs import open_pairs
from data.pseudo_labels import prepare_pseudo_labels
from data.stream import in_step, sequential
from losses.pretrain import material_cross_entropy
from models.sampler import translate
from utils import config, dist, files, metrics
from utils.loop import to_device
from utils.run import code_version, entry

METRICS = {
    "psnr": ("PSNR dB", metrics.psnr),
    "ssim": ("SSIM", metrics.ssim),
    "mae": ("MAE", metrics.mae),
    "rank": ("rank corr.", metrics.rank_correlation),
}
TITLES = {name: title for name, (title, _) in METRICS.items()} | {"lpips": "LPIPS"}
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
MEAN_IMAGES = 400  # at most so many training images, evenly spaced, go into the training mean


@torch.no_grad()
def main() -> None:
    cfg = config.load(EvaluateConfig, flags=USE_FLAGS)
    device = dist.init(cfg.device)
    stage1, translator, _, data, pairs, sampling = checkpoints.open_all(cfg, device)
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    mean, note = training_mean(data, cfg.batch_size, needed=not cfg.test_data)
    note = "; ".join([*pairs.notes, *([note] if note else [])])
    luma = torch.tensor(LUMA, device=device).view(1, 3, 1, 1)
    scores, rows, started = Stage1Scores(pairs.cfg.labels, device), [], time.perf_counter()
    measures = {name: f for name, (_, f) in METRICS.items()}
    if cfg.lpips:
        measures["lpips"] = metrics.Lpips(device)

    ranks = dist.rank(), dist.world_size()
    batches = in_step(pairs, cfg.batch_size, *ranks, cfg.num_workers, cfg.limit)
    for batch in tqdm(batches, desc=f"evaluate {cfg.split}", unit="batch", disable=ranks[0] > 0):
        batch = to_device(batch, device)
        visible, infrared = batch["visible"], batch["infrared"][:, :1]
        grey = (visible * luma).sum(1, keepdim=True).clamp(0, 1)
        seen = translator.decompose(visible) if translator else stage1(visible)
        images = {} if mean is None else {"training mean": mean.to(device).expand_as(infrared)}
        images |= {"grey": grey, "inverted grey": 1 - grey}
        if seen.fused is not None:
            images["fused (stage 1)"] = seen.fused.mean(1, keepdim=True).clamp(0, 1)
        if translator:
            images["ours"] = translate(translator, visible, batch["draw"], sampling)
        if batch["filler"]:
            continue
        rows += score(images, infrared, batch, measures)
        scores.update(seen.maps, batch)
    rows = [row for share in dist.gather(rows) for row in share]
    facts = {
        "checkpoint": cfg.checkpoint,
        "data": cfg.test_data or data.path,
        "split": cfg.split,
        "pairs": sum(row["method"] == "grey" for row in rows),
        "size": list(pairs.size),
        "seconds": round(time.perf_counter() - started, 1),
        "device": str(device),
        "sampling": sampling and asdict(sampling),
        "commit": code_version()[0],
        "stage1": scores.result(),
        "note": note,
    }
    if dist.is_main():
        write(Path(cfg.output_dir), rows, facts)


def training_mean(data, batch_size: int, needed: bool) -> tuple[Tensor | None, str]:
    """(1, 1, H, W), the mean infrared image of the training split pixel by pixel, and no note.

    Where the training data is not at hand: no image, and a note that says so, unless `needed`.
    """
    try:
        train = open_pairs(data, "train")
    except ValueError as error:
        if needed:
            raise
        return None, f"no row of the training mean, its pairs are not at hand: {error}"
    total, count = 0, 0
    for batch in sequential(train, batch_size, num_workers=data.num_workers, limit=MEAN_IMAGES):
        total = total + batch["infrared"][:, :1].double().sum(0, keepdim=True)
        count += len(batch["infrared"])
    return (total / count).float(), ""


def score(images: dict[str, Tensor], infrared: Tensor, batch: dict, measures: dict) -> list[dict]:
    """One row a method and image."""
    rows = []
    for method, image in images.items():
        values = {name: f(image, infrared).tolist() for name, f in measures.items()}
        for i, (name, source) in enumerate(zip(batch["name"], batch["source"])):
            numbers = {metric: x[i] for metric, x in values.items()}
            rows.append({"source": source, "name": name, "method": method, **numbers})
    return rows


class Stage1Scores:
    """How well stage 1's maps agree with the labels: accuracy, mIoU, cross-entropy, Pearson."""

    def __init__(self, labels, device):
        self.labels, self.matrix = labels, metrics.ConfusionMatrix(32, device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, maps, batch: dict) -> None:
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


def write(folder: Path, rows: list[dict], facts: dict) -> None:
    """Write and print the table."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = [name for name in TITLES if name in rows[0]]
    means = {}
    for m in methods:
        own = [row for row in rows if row["method"] == m]
        means[m] = {name: sum(row[name] for row in own) / facts["pairs"] for name in names}
    lines = [f"| method | {' | '.join(TITLES[name] for name in names)} |"]
    lines += ["|---" * (len(names) + 1) + "|"]
    for method, values in means.items():
        numbers = (f"{x:.2f}" if name == "psnr" else f"{x:.3f}" for name, x in values.items())
        lines.append(f"| {method} | {' | '.join(numbers)} |")
    stage1, H, W = facts["stage1"], *facts["size"]
    lines += ["", f"{facts['pairs']} pairs of `{facts['data']}` ({facts['split']}), {H} x {W},"]
    lines[-1] += f" {facts['seconds']} s on {facts['device']}; checkpoint `{facts['checkpoint']}`"
    if facts["sampling"]:
        lines.append("; ".join(f"{k} {v}" for k, v in facts["sampling"].items()))
    lines += [*filter(None, [facts["note"]]), materials_sentence(stage1)]
    lines.append(f"Pearson(intensity, infrared) {stage1['pearson_intensity']:.3f}")
    text = "\n".join(lines) + "\n"
    numbers = json.dumps(finite({"methods": means, **facts}), indent=1) + "\n"
    table = csv.DictWriter(each := io.StringIO(newline=""), list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    files.write_whole(folder / "per_image.csv", each.getvalue())
    files.write_whole(folder / "results.json", numbers)
    files.write_whole(folder / "results.md", text)
    print(text + f"written to {folder}: results.md, results.json, per_image.csv")


def finite(value):
    """The same nested values with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def materials_sentence(stage1: dict) -> str:
    """What the material head is worth, in words."""
    if not stage1["labelled_pairs"]:
        return "materials: not scored, no pair has labels"
    text = f"materials ({stage1['material_source']} labels): cross-entropy"
    text += f" {stage1['material_ce']:.3f} (chance ln 32 = {stage1['chance_ce']:.3f}), accuracy"
    return f"{text} {stage1['accuracy']:.3f}, mIoU {stage1['miou']:.3f}"


if __name__ == "__main__":
    entry(main)
