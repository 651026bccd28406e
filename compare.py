"""Train several methods for equal times; one table with mean and spread over the seeds.

    python compare.py --data_path datasets/mine --output_dir runs/compare
    CUDA_VISIBLE_DEVICES=1 python compare.py --data_path datasets/mine --only unet --seed 1
    python compare.py --data_path datasets/mine --no_train        the table of what is there

configs/compare.yaml lists the methods: the commands that train each, with their shares of the time.
Each is then evaluated on the same pairs. Runs may be started one by one, or at the same time on
different GPUs; every call ends with the table of all finished runs. To resume, run the same command
again: finished runs are kept.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from assembly.ablation import read_json, with_files
from assembly.comparison import CompareConfig, commands_of
from utils import bootstrap, config, results
from utils.files import write_whole
from utils.run import entry

ROOT = Path(__file__).resolve().parent
REFERENCES = ("training mean", "grey", "inverted grey")  # the same in every run
CEILING = "codec round trip"  # of a method, and no image that it makes
NUMBERS = ("index", *results.COLUMNS, "shift_x", "shift_y", "contrast", "true_contrast", "auc")
FLAGS = ("data_path", "output_dir", "seconds", "only", "seed", "device", "boxes", "train")


def main() -> None:
    flags = {name: name for name in FLAGS}
    cfg = config.load(CompareConfig, flags=flags, default="configs/compare.yaml")
    failed = []
    if cfg.train:
        for seed in cfg.seeds if cfg.seed is None else [cfg.seed]:
            for name in cfg.methods if cfg.only is None else [cfg.only]:
                failed += run(cfg, name, seed)
    write_table(cfg)
    if failed:
        print("\n".join(["", f"{len(failed)} failed:", *failed]), file=sys.stderr)
        raise SystemExit(1)


def run(cfg: CompareConfig, name: str, seed: int) -> list[str]:
    """Train and evaluate one method, with its output in log.txt; sentences about what failed.

    Raises: ValueError: the folder was made with other values.
    """
    folder = Path(cfg.output_dir) / name / f"seed_{seed}"
    commands = commands_of(cfg, name, seed)
    marker, now = folder / "compare.json", [with_files(command) for command in commands]
    made = read_json(marker)
    if made.get("commands", now) != now:
        raise ValueError(
            f"{folder} was made with other values; remove it, or choose another --output_dir"
        )
    if made.get("finished"):
        print(f"{name}, seed {seed}: finished before", flush=True)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(marker, json.dumps({"commands": now, "finished": False}) + "\n")
    for command in commands:
        print(f"{name}, seed {seed}: {command[0]}, log in {folder / 'log.txt'}", flush=True)
        with open(folder / "log.txt", "ab") as log:
            whole = [sys.executable, str(ROOT / command[0]), *command[1:]]
            code = subprocess.call(whole, stdout=log, stderr=subprocess.STDOUT)
        if code:
            return [f"{name}, seed {seed}: {command[0]} ended with {code}, see {folder}/log.txt"]
    write_whole(marker, json.dumps({"commands": now, "finished": True}) + "\n")
    return []


def write_table(cfg: CompareConfig) -> None:
    """Write and print compare.md and compare.json from the runs that are finished."""
    runs = {
        (name, seed): Path(cfg.output_dir) / name / f"seed_{seed}" / "results"
        for name in cfg.methods
        for seed in cfg.seeds
    }
    done = {k: p for k, p in runs.items() if read_json(p.parent / "compare.json").get("finished")}
    if not done:
        return print("no run is finished yet")
    found = {key: read_json(folder / "results.json") for key, folder in done.items()}
    if len({x["protocol"]["id"] for x in found.values()}) > 1:
        ids = ", ".join(f"{n} {s}: {x['protocol']['id']}" for (n, s), x in found.items())
        raise ValueError(f"the runs were measured on different pairs or sizes ({ids})")
    images, boxes, seconds, displaced = [], [], {}, {}
    for (name, _), folder in done.items():
        for rows, file in ((images, "per_image.csv"), (boxes, "per_object.csv")):
            rows += [{**row, "method": label(name, row["method"])} for row in read(folder / file)]
        whole = read_json(folder / "results.json")
        seconds |= {label(name, m): x for m, x in whole["run"]["seconds_an_image"].items()}
        displaced |= {label(name, m): x for m, x in whole["displacement"].items()}
    labels = list(dict.fromkeys(row["method"] for row in images))
    labels.sort(key=lambda x: x not in REFERENCES)
    images.sort(key=lambda row: labels.index(row["method"]))
    own = [x for x in labels if x.partition(": ")[2] not in ("", CEILING)]
    summary = results.summarise(images, boxes, own, displaced)
    summary["seeds"] = {x: over_seeds(found, x) for x in labels}
    doubt(summary)
    count = {name: sum(n == name for n, _ in done) for name in cfg.methods}
    lines = [*results.table(summary, seconds), ""]
    lines.append("± half of the 95 % interval over images, which are averaged over seeds.")
    lines += [
        f"{cfg.seconds:g} s of training each; finished seeds: "
        + ", ".join(f"{name} {n}" for name, n in count.items()),
        "",
    ]
    lines += ["Means of single seeds, standard deviation between them:", "", *seeds_table(summary)]
    for name in (x for x in own if x.startswith(f"{list(cfg.methods)[-1]}: ")):
        lines += ["", *results.verdict_table(summary, name)]
    lines += ["", "ahead, behind: over the images and with every seed; compare.json has all pairs."]
    if boxes:
        lines += ["", *results.object_table(summary, own)]
    text = "\n".join(lines) + "\n"
    out = Path(cfg.output_dir)
    write_whole(out / "compare.json", json.dumps(results.finite(summary), indent=1) + "\n")
    write_whole(out / "compare.md", text)
    print(text + f"written to {out}: compare.md, compare.json")


def label(name: str, method: str) -> str:
    """The row of a run in the common table."""
    return method if method in REFERENCES else f"{name}: {method}"


def read(path: Path) -> list[dict]:
    """The rows of per_image.csv or per_object.csv with their numbers; [] without the file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: (int if k == "index" else float)(x) if k in NUMBERS else x for k, x in row.items() if x}
        for row in rows
    ]


def over_seeds(found: dict, name: str) -> dict[str, dict[int, float]]:
    """{metric: {seed: its mean in that run}} of a row of the common table."""
    values: dict[str, dict[int, float]] = {}
    for (method, seed), whole in found.items():
        for row, means in whole["methods"].items():
            for metric, value in means.items() if label(method, row) == name else ():
                values.setdefault(metric, {})[seed] = float("nan") if value is None else value
    return values


def doubt(summary: dict) -> None:
    """Withdraw a verdict that one of the seeds contradicts."""
    for name, others in summary["differences"].items():
        for other, metrics in others.items():
            for metric, found in metrics.items():
                a, b = (summary["seeds"][x][metric] for x in (name, other))
                signs = {(a[seed] - b[seed]) * found["difference"] > 0 for seed in a.keys() & b}
                if signs != {True}:
                    found["verdict"] = bootstrap.UNKNOWN


def seeds_table(summary: dict) -> list[str]:
    """Markdown: mean and standard deviation over the seeds' own means, of the model's rows."""
    rows = {x: own for x, own in summary["seeds"].items() if x in summary["differences"]}
    names = [n for n in results.COLUMNS if any(n in own for own in rows.values())]
    titles = " | ".join(results.COLUMNS[n].title for n in names)
    lines = [f"| method | seeds | {titles} |", "|---" * (len(names) + 2) + "|"]
    for method, own in rows.items():
        cells = []
        for n in names:
            x, digits = list(own.get(n, {}).values()), results.COLUMNS[n].digits
            spread = f" ± {np.std(x, ddof=1):.{digits}f}" if len(x) > 1 else ""
            cells.append(f"{np.mean(x):.{digits}f}{spread}" if x else "")
        count = max(map(len, own.values()))
        lines.append(f"| {method} | {count} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    entry(main)
