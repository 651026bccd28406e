"""Is generated infrared useful for training? Recipes of training images, and their scores.

Dimension key:  N training pairs   n samples of an image   S seeds   R resamples
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from assembly.checkpoints import Opened
from assembly.downstream_tasks import DetectorTask, Scores, SegmenterTask, Task, Truth, train
from assembly.rows import Row, model_rows, reference_rows
from configs.schema import HeldOutConfig
from data.materials import TABLES
from data.order import permutation
from data.pairs import Pairs, open_pairs
from data.pseudo_labels import material_labels
from data.stream import evenly_spaced, sequential
from utils import bootstrap
from utils.labels import IGNORE
from utils.loop import to_device
from utils.objects import Boxes
from utils.problems import missing

REAL = "real"


@dataclass(kw_only=True)
class DownstreamConfig(HeldOutConfig):
    """downstream.py. `split` is the one that is tested on; `test_data` is read for both splits."""

    output_dir: str = "runs/downstream"
    train_split: Literal["train", "val", "test"] = "val"  # pairs the generator did not train on
    task: Literal["auto", "detector", "segmenter"] = "auto"  # auto: what the labels allow
    boxes: str | None = None  # folder of YOLO boxes; null: `boxes` in the data set's folder, if any
    classes: list[str] = field(default_factory=lambda: ["person", "car"])  # classes of the boxes
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train_steps: int = 400  # optimizer steps, the same for every row
    train_batch: int = 8
    train_lr: float = 2e-3
    # shares of the real pairs, for the curve
    shares: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.split in (self.train_split, "all"):
            yield f"training on {self.train_split} and testing on {self.split} would share images"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            yield f"seeds must be different numbers from 0 on, got {self.seeds}"
        if self.train_steps < 1 or self.train_batch < 2 or self.train_lr <= 0:
            yield (
                "train_steps >= 1, train_batch >= 2 and train_lr > 0 are needed, got"
                f" {self.train_steps}, {self.train_batch} and {self.train_lr:g}"
            )
        if not all(0 < share < 1 for share in self.shares):
            yield f"shares must lie between 0 and 1, got {self.shares}"
        if not self.classes or len(set(self.classes)) < len(self.classes):
            yield f"classes must be different names, at least one, got {self.classes}"

    def obstacles(self) -> Iterator[str]:
        yield from super().obstacles()
        yield from missing("boxes", self.boxes)


class Recipe(NamedTuple):
    """Where the training images of one row come from; half of each batch from either."""

    name: str
    real: int  # so many real images, those of the first pairs in a seeded order
    generated: str | None  # this kind of image for the photographs of all pairs


def recipes(kinds: list[str], best: str | None, total: int, shares: list[float]) -> list[Recipe]:
    """Real alone, every other kind alone, then `best` beside more and more of `total` real pairs.

    Args: kinds: of images, without the real ones; best: what joins them, None for nothing.
    """
    found = [Recipe(REAL, total, None), *(Recipe(kind, 0, kind) for kind in kinds)]
    counts = sorted({max(1, round(share * total)) for share in shares} - {total})
    found += [Recipe(f"{count} {REAL}", count, None) for count in counts]
    if best is not None:
        found += [Recipe(f"{count} {REAL} + {best}", count, best) for count in counts]
        found.append(Recipe(f"{REAL} + {best}", total, best))
    return found


def batches(
    recipe: Recipe, images: dict[str, Tensor], batch_size: int, seed: int
) -> Iterator[tuple[Tensor, list[int], bool]]:
    """Endless (images (B, 1, H, W) uint8, which scenes they show, whether to mirror them)."""
    rng, total = np.random.default_rng([seed, 2]), len(images[REAL])
    chosen = permutation(seed, 0, total)[: recipe.real]
    mixed = recipe.generated is not None and recipe.real > 0
    drawn = {True: batch_size - batch_size // 2, False: batch_size}[mixed]
    while True:
        parts, indices = [], []
        if recipe.real:
            own = rng.choice(chosen, drawn)
            parts.append(images[REAL][own, :1])
            indices += own.tolist()
        if recipe.generated is not None:
            made = images[recipe.generated]
            own = rng.integers(0, total, batch_size - len(indices))
            parts.append(made[own, rng.integers(0, made.shape[1], len(own))][:, None])
            indices += own.tolist()
        yield torch.cat(parts), indices, bool(rng.integers(2))


@torch.no_grad()
def collect(
    pairs: Pairs, rows: list[Row], cfg: DownstreamConfig, device: torch.device
) -> dict[str, Tensor]:
    """{kind: (N, n, H, W) uint8}, as 8-bit files would hold them: the real ones and each row's."""
    real = Row(REAL, lambda batch: batch["infrared"][:, :1], False)
    parts: dict[str, list[Tensor]] = {row.name: [] for row in (real, *rows)}
    loaded = sequential(pairs, cfg.batch_size, num_workers=cfg.num_workers, limit=cfg.limit)
    for batch in tqdm(loaded, desc=f"images of {pairs.split}", unit="batch"):
        batch = to_device(batch, device)
        for row in (real, *rows):
            image = row.image(batch).float().clamp(0, 1)
            parts[row.name].append((image * 255).round().byte().cpu())
    return {name: torch.cat(own) for name, own in parts.items()}


def truth_of(pairs: Pairs, limit: int) -> Truth:
    """Names and material labels of a split's pairs."""
    indices = evenly_spaced(len(pairs), limit)
    maps = torch.full((len(indices), *pairs.size), IGNORE, dtype=torch.uint8)
    # a generator that was trained without labels says nothing of those that the data hold
    table = pairs.source.table or pairs.cfg.labels.material_source
    if table in TABLES:
        labels = replace(pairs.cfg.labels, material_source=table)
        for i, index in enumerate(indices):
            sample = pairs.get(index)
            maps[i] = material_labels(sample["visible"][None], sample["semantic"][None], labels)[0]
    return Truth([(pairs.sources[i], pairs.names[i]) for i in indices], maps)


def tasks_of(
    cfg: DownstreamConfig, boxes: Boxes | None, train_truth: Truth, test_truth: Truth
) -> list[Task]:
    """The tasks that were asked for. Raises: ValueError: what they lack."""
    found: list[Task] = []
    labelled = bool((train_truth.materials != IGNORE).any())
    if cfg.task == "detector" and boxes is None:
        raise ValueError("the detector needs boxes: there is no folder `boxes` beside the data")
    if cfg.task == "auto" and boxes is None and not labelled:
        raise ValueError(
            "there is nothing to learn: no folder of boxes (--boxes) for a detector, and no"
            " material labels in the data for a segmenter"
        )
    if boxes is not None and cfg.task != "segmenter":
        found.append(DetectorTask(boxes, cfg.classes, train_truth, test_truth))
    if cfg.task == "segmenter" or (cfg.task == "auto" and labelled):
        found.append(SegmenterTask(train_truth, test_truth))
    return found


def rows_of(opened: Opened) -> list[Row]:
    """Kinds of images made from a photograph; the last is the model's best, if it makes any."""
    return [*reference_rows(None), *model_rows(opened)]


def leak(opened: Opened, pool: Pairs, limit: int) -> tuple[int | None, str]:
    """How many of the training pairs the generator was trained on, None if unknown; and a sentence.

    Pairs of another data set than the generator's are compared by their content.
    """
    same = pool.cfg.path == opened.data.path and pool.cfg.size == opened.data.size
    count = len(evenly_spaced(len(pool), limit))
    where = f"the {count} training pairs ({pool.split} of {pool.cfg.path})"
    if same:
        seen = count if pool.split == "train" else 0
        if pool.split == "val":
            where += ", among which its best checkpoint was chosen,"
    else:
        try:
            known = open_pairs(opened.data, "train")
        except ValueError as error:
            return None, f"whether the generator was trained on {where} is not known: {error}"
        contents = {known.source.content(i) for i in range(len(known))}
        seen = sum(pool.source.content(i) in contents for i in evenly_spaced(len(pool), limit))
    if not seen:
        return 0, f"the generator was trained on none of {where}"
    return seen, (
        f"LEAK: the generator was trained on {seen} of {where}: its images of them are better than"
        " those of new photographs will be, and so may be the rows made from them"
    )


def run(
    task: Task,
    made: list[Recipe],
    images: dict[str, Tensor],
    test: Tensor,
    cfg: DownstreamConfig,
    device: torch.device,
) -> dict[str, list[Scores]]:
    """{recipe: scores on the real test images (M, 1, H, W) uint8, one a seed}."""
    found: dict[str, list[Scores]] = {recipe.name: [] for recipe in made}
    plan = [(seed, recipe) for seed in cfg.seeds for recipe in made]
    for seed, recipe in tqdm(plan, desc=f"train {task.name}", unit="model"):
        stream = batches(recipe, images, cfg.train_batch, seed)
        model = train(task, stream, cfg.train_steps, cfg.train_lr, seed, device)
        with torch.no_grad():
            found[recipe.name].append(task.scores(model, test, cfg.train_batch))
    return found


def summarise(made: list[Recipe], found: dict[str, list[Scores]], images: int) -> dict:
    """Values, intervals, order and differences of all rows, as plain values.

    An interval draws `images` test images and the seeds again, the same for every row.
    """
    metrics = next(iter(found.values()))[0].METRICS
    weights = bootstrap.weights(images)
    by_seed = bootstrap.weights(len(next(iter(found.values()))), seed=1)
    by_seed /= by_seed.sum(1, keepdims=True)
    rows: dict[str, dict[str, Any]] = {}
    spread: dict[str, dict[str, np.ndarray]] = {}
    for recipe in made:
        scores = found[recipe.name]
        once = [own.draws(np.ones((1, images))) for own in scores]
        drawn = [own.draws(weights) for own in scores]
        spread[recipe.name] = {
            m: (np.stack([own[m] for own in drawn], 1) * by_seed).sum(1) for m in metrics
        }
        rows[recipe.name] = {"real": recipe.real, "generated": recipe.generated}
        for m in metrics:
            values = [float(own[m][0]) for own in once]
            draws = spread[recipe.name][m]
            rows[recipe.name][m] = {
                "value": float(np.mean(values)),
                "interval": bootstrap.interval(draws[~np.isnan(draws)]),
                "seeds": values,
            }
    main = metrics[0]
    order = sorted(rows, key=lambda name: -rows[name][main]["value"])
    versus = {
        name: {
            other: difference(rows, spread, name, other, main, images)
            for other in rows
            if other != name
        }
        for name in rows
    }
    return {"metric": main, "rows": rows, "order": order, "differences": versus}


def difference(
    rows: dict, spread: dict, name: str, other: str, metric: str, images: int
) -> dict[str, Any]:
    """`name` less `other`: on the same images and seeds; no verdict where the seeds disagree."""
    own, theirs = rows[name][metric], rows[other][metric]
    draws = spread[name][metric] - spread[other][metric]
    interval = bootstrap.interval(draws[~np.isnan(draws)])
    verdict = bootstrap.verdict(interval, True, images)
    signs = {a > b for a, b in zip(own["seeds"], theirs["seeds"])}
    return {
        "difference": own["value"] - theirs["value"],
        "interval": interval,
        "verdict": verdict if len(signs) == 1 else bootstrap.UNKNOWN,
    }


def curve_of(summary: dict, best: str | None) -> dict[str, list[dict]]:
    """Points by number of real pairs, without and with generated images beside them."""
    found: dict[str, list[dict]] = {"without": [], "with": []}
    for name, row in summary["rows"].items():
        kind = {None: "without", best: "with"}.get(row["generated"])
        if kind:
            score = row[summary["metric"]]
            point = {k: score[k] for k in ("value", "interval")}
            found[kind].append({"row": name, "real": row["real"], **point})
    for points in found.values():
        points.sort(key=lambda point: point["real"])
    for point in found["with"]:
        point["worth"] = worth(found["without"], point["value"])
    return found


def worth(without: list[dict], value: float) -> float | None:
    """How many real pairs alone reach a value, straight lines between points; None: not all do.

    At most the first point's number where even that one is above the value.
    """
    before = None
    for point in without:
        if point["value"] >= value:
            if before is None:
                return float(point["real"])
            share = (value - before["value"]) / (point["value"] - before["value"])
            return before["real"] + share * (point["real"] - before["real"])
        before = point
    return None
