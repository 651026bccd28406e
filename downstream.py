"""Is generated infrared useful? A detector and a segmenter train on it and are tested on real.

    python downstream.py --checkpoint runs/train/best_model.pth --boxes msrs/boxes
    python downstream.py --checkpoint runs/train --test_data datasets/other --train_split train

Every row trains the same small model with the same number of steps: on real infrared, on both
greys, on each image that the checkpoint makes, and on few real pairs with and without generated
images. Every one is tested on the same held-out real infrared. docs/downstream.md says what the
numbers mean. Writes results.md, results.json and a curve for each task to --output_dir.
"""

import json
import time
from pathlib import Path

import torch

from assembly import checkpoints, downstream, protocol
from assembly.downstream import REAL, DownstreamConfig
from configs.schema import USE_FLAGS
from data.pairs import open_pairs
from utils import bootstrap, config, dist, results
from utils.files import write_whole
from utils.objects import find_boxes
from utils.panels import pixels_of, save_png
from utils.result_plots import curve_figure
from utils.run import code_version, entry

OWN_FLAGS = ("train_split", "task", "train_steps", "train_batch", "train_lr", "seeds")


def main() -> None:
    flags = USE_FLAGS | {name: name for name in OWN_FLAGS}
    cfg = config.load(DownstreamConfig, flags=flags)
    device = dist.init(cfg.device, deterministic=True)
    if device.type == "cuda":  # an operation without a deterministic kernel warns, and runs
        torch.use_deterministic_algorithms(True, warn_only=True)
    if dist.world_size() > 1:
        raise ValueError("downstream.py runs on one device: start it without torchrun")
    started = time.perf_counter()
    opened = checkpoints.open_all(cfg, device)
    test, pool = opened.pairs, open_pairs(opened.pairs.cfg, cfg.train_split)
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    truths = [downstream.truth_of(pairs, cfg.limit) for pairs in (pool, test)]
    tasks = downstream.tasks_of(cfg, find_boxes(cfg.boxes, test.cfg.path), *truths)
    seen, note = downstream.leak(opened, pool, cfg.limit)
    print(note)
    rows = downstream.rows_of(opened)
    images = downstream.collect(pool, rows, cfg, device)
    shown = downstream.collect(test, [], cfg, device)[REAL]
    best = rows[-1].name if rows[-1].of_model else None
    made = downstream.recipes([row.name for row in rows], best, len(images[REAL]), cfg.shares)
    found, lines = {}, []
    for task in tasks:
        scores = downstream.run(task, made, images, shown, cfg, device)
        summary = downstream.summarise(made, scores, len(shown))
        summary["curve"] = downstream.curve_of(summary, best)
        found[task.name] = summary
        save_png(Path(cfg.output_dir) / f"{task.name}.png", pixels_of(curve_figure(summary)))
        lines += [f"## {task.name}", "", *table(summary), "", *sentences(summary), ""]
    facts = {
        "tasks": found,
        "best": best,
        "train_pairs": len(images[REAL]),
        "test_images": len(shown),
        "seen_by_generator": seen,
        "note": note,
        "training": {name: getattr(cfg, name) for name in (*OWN_FLAGS, "classes", "shares")},
        "protocol": protocol.describe(cfg, opened),
        "run": {
            "seconds": round(time.perf_counter() - started, 1),
            "device": str(device),
            "commit": code_version()[0],
        },
    }
    write(cfg, facts, lines)


def table(summary: dict) -> list[str]:
    """Markdown: a row per recipe, the best first; ± is half of the 95 % interval."""
    main = summary["metric"]
    metrics = [name for name, x in summary["rows"][REAL].items() if isinstance(x, dict)]
    head = f"| trained on | {' | '.join(metrics)} | {main}, seeds | against {REAL} |"
    lines = [head, "|---" * (len(metrics) + 3) + "|"]
    for name in summary["order"]:
        row = summary["rows"][name]
        cells = [value_text(row[m]) for m in metrics]
        cells.append(" ".join(f"{x:.3f}" for x in row[main]["seeds"]))
        cells.append(summary["differences"][name][REAL]["verdict"] if name != REAL else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def value_text(score: dict) -> str:
    low, high = score["interval"]
    return f"{score['value']:.3f} ± {(high - low) / 2:.3f}"


def sentences(summary: dict) -> list[str]:
    """The order, and how much generated images add to few real ones, in words."""
    main, rows = summary["metric"], summary["rows"]
    order = []
    for name in summary["order"]:
        low, high = rows[name][main]["interval"]
        order.append(f"{name} {rows[name][main]['value']:.3f} ({low:.3f} to {high:.3f})")
    lines = [f"order by {main}: {'; '.join(order)}"]
    curve = summary["curve"]
    alone = {point["real"]: point["row"] for point in curve["without"]}
    for point in curve["with"]:
        worth = point["worth"]
        equal = f"as good as {worth:.0f} real ones" if worth is not None else "above all real ones"
        if worth == curve["without"][0]["real"]:
            equal = f"no better than {worth:.0f} real ones"
        text = f"{point['row']}: {main} {point['value']:.3f}, {equal}"
        if other := alone.get(point["real"]):
            found = summary["differences"][point["row"]][other]
            low, high = found["interval"]
            text += f"; {found['verdict']} against {other}"
            text += f" ({found['difference']:+.3f}, {low:+.3f} to {high:+.3f})"
        lines.append(text)
    return [f"- {line}" for line in lines]


def write(cfg: DownstreamConfig, facts: dict, lines: list[str]) -> None:
    """Write and print the tables."""
    training = facts["training"]
    text = "\n".join(
        [
            *lines,
            f"{facts['test_images']} real test images ({cfg.split}), {facts['train_pairs']}"
            f" training pairs ({cfg.train_split}); {training['train_steps']} steps of"
            f" {training['train_batch']} images for every row, seeds {cfg.seeds}; ± half of the"
            f" {100 * bootstrap.LEVEL:g} % interval over test images and seeds;"
            f" {facts['run']['seconds']} s on {facts['run']['device']}; checkpoint"
            f" `{cfg.checkpoint}`; protocol {facts['protocol']['id']}",
            "",
            facts["note"],
        ]
    )
    out = Path(cfg.output_dir)
    write_whole(out / "results.json", json.dumps(results.finite(facts), indent=1) + "\n")
    write_whole(out / "results.md", text + "\n")
    print(f"{text}\nwritten to {out}: results.md, results.json, a curve for each task")


if __name__ == "__main__":
    entry(main)
