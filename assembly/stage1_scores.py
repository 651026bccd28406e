"""How well stage 1's maps agree with the labels of held-out pairs."""

import math

import torch

from data.pairs import Pairs
from data.pseudo_labels import prepare_pseudo_labels
from losses.pretrain import material_cross_entropy
from utils import dist, metrics


class Stage1Scores:
    """Over all pairs: accuracy, mIoU and cross-entropy of materials, Pearson of the intensity."""

    def __init__(self, pairs: Pairs, device: torch.device):
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


def sentences(stage1: dict) -> list[str]:
    """What the material head and the intensity are worth, in words."""
    pearson = f"Pearson(intensity, infrared) {stage1['pearson_intensity']:.3f}"
    if not stage1["labelled_pairs"]:
        return ["materials: not scored, no pair has labels", pearson]
    text = f"materials ({stage1['material_source']} labels): cross-entropy"
    text += f" {stage1['material_ce']:.3f} (chance ln 32 = {stage1['chance_ce']:.3f}), accuracy"
    return [f"{text} {stage1['accuracy']:.3f}, mIoU {stage1['miou']:.3f}", pearson]
