"""Compare variants of a run with equal seeds and steps: mean and spread over the seeds.

    python ablate.py --config configs/ablate/decoder.yaml --output_dir runs/ablate/decoder
    python ablate.py --config configs/ablate/losses.yaml --jobs 3 'overrides=[data.path=datasets/x]'

Each run is a process of its own with a log beside its checkpoints. A run that fails is named and
the others go on. To resume, run the same command again: what is finished is not run again.
"""

import json
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from assembly.ablation import AblateConfig, cell, command_of, read_json, with_files, write_board
from utils import config
from utils.files import write_whole
from utils.run import entry

DEFAULT_COLUMNS = (
    "val_loss val_material_ce val_accuracy val_miou val_pearson val_rank val_edge_sharpness"
    " val_psnr val_ssim ours/psnr ours/ssim ours/mae ours/rank images_per_s"
).split()
RATES = ("images_per_s", "step_s")  # the median of a run's rows: the first includes the start-up
STOPPED = "stopped by a signal"  # a script that saved and left before its end, with exit code 0


@dataclass
class Step:
    """One command of the grid; variants that share it share the run."""

    name: str
    arguments: list[str]  # the script and what follows it
    folder: Path
    before: "Step | None"  # what must have finished first
    depth: int  # steps before it
    result: Future | None = None


def main() -> None:
    flags = {name: name for name in ("output_dir", "jobs", "dry_run")}
    cfg = config.load(AblateConfig, flags=flags)
    runs = plan(cfg)
    steps = list({str(s.folder): s for chain in runs.values() for s in chain}.values())
    if cfg.dry_run:
        print("\n".join(shlex.join(["python", *s.arguments]) for s in steps))
        return
    failures = run_all(steps, cfg.jobs)
    write(cfg, {key: chain for key, chain in runs.items() if chain[-1].result.result() is None})
    if failures:
        print("\n".join(["", f"{len(failures)} failed:", *failures]), file=sys.stderr)
        raise SystemExit(1)


def plan(cfg: AblateConfig) -> dict[tuple[str, int], list[Step]]:
    """(variant, seed) -> its steps, stage by stage.

    Raises: ValueError: a command that its script would refuse, or a folder with other values.
    """
    runs, shared = {}, {}
    for seed in cfg.seeds:
        for variant in cfg.variants:
            chain, folders, key = [], {}, ()
            for stage in cfg.stages:
                folder = Path(cfg.output_dir) / variant / f"seed_{seed}" / stage
                arguments = command_of(cfg, stage, variant, seed, folders)
                key = (*key, *arguments)  # equal so far: the same run
                if key not in shared:
                    name, before = f"{variant}, seed {seed}, {stage}", chain[-1] if chain else None
                    whole = [*arguments, "--output_dir", str(folder)]
                    shared[key] = Step(name, whole, folder, before, len(chain))
                chain.append(shared[key])
                folders[stage] = str(chain[-1].folder)
            runs[variant, seed] = chain
    for step in shared.values():
        now = with_files(step.arguments)
        made = read_json(step.folder / "ablate.json").get("command", now)
        if made != now:
            changed = [x for x in [*now, *made] if (x in made) != (x in now)]
            raise ValueError(
                f"{step.folder} was made with other values ({', '.join(changed)});"
                " remove it, or choose another --output_dir"
            )
    return runs


def run_all(steps: list[Step], jobs: int) -> list[str]:
    """Run what is not finished, cfg.jobs at once; a sentence for every run that failed."""
    order = sorted(steps, key=lambda step: step.depth)  # what others wait for comes first
    pool = ThreadPoolExecutor(jobs)
    try:
        for i, step in enumerate(order, 1):
            step.result = pool.submit(run, step, f"[{i}/{len(order)}] {step.name}")
        return [text for step in order if (text := step.result.result())]
    except BaseException:
        pool.shutdown(cancel_futures=True)  # interrupted: the running ones save and stop
        raise


def run(step: Step, title: str) -> str | None:
    """Run one command with its output in log.txt; None if it finished, else what went wrong."""
    if step.before and step.before.result.result() is not None:
        return f"{step.name}: not run, as {step.before.name} failed"
    marker, log = step.folder / "ablate.json", step.folder / "log.txt"
    if read_json(marker).get("finished"):
        print(f"{title}: finished before", flush=True)
        return None
    step.folder.mkdir(parents=True, exist_ok=True)
    command = with_files(step.arguments)
    write_whole(marker, json.dumps({"command": command, "finished": False}) + "\n")
    print(f"{title}: started, log in {log}", flush=True)
    started = time.perf_counter()
    script = Path(__file__).resolve().parent / step.arguments[0]
    with open(log, "ab") as file:
        code = subprocess.call(
            [sys.executable, str(script), *step.arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    seconds = f"{time.perf_counter() - started:.0f} s"
    if code or STOPPED in last:
        print(f"{title}: FAILED after {seconds}", flush=True)
        return f"{step.name} (exit code {code}, {log}): {last}"
    write_whole(marker, json.dumps({"command": command, "finished": True}) + "\n")
    print(f"{title}: done in {seconds}", flush=True)
    return None


def measured(chain: list[Step]) -> dict[str, float]:
    """The last value of everything that a run's steps logged; for equal names the last step's."""
    found = {}
    for step in chain:
        path = step.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        found |= {n: x for row in rows for n, x in row.items() if x is not None}
        for name in RATES:
            if seen := [row[name] for row in rows if row.get(name) is not None]:
                found[name] = statistics.median(seen)
        results = read_json(step.folder / "results.json")
        groups = {**results.get("methods", {}), "stage1": results.get("stage1", {})}
        for group, values in groups.items():
            numbers = {name: x for name, x in values.items() if isinstance(x, float)}
            found |= {f"{group}/{name}": x for name, x in numbers.items() if isfinite(x)}
    return found


def write(cfg: AblateConfig, runs: dict[tuple[str, int], list[Step]]) -> None:
    """table.md and table.json over the runs that finished; printed too."""
    values = {key: measured(chain) for key, chain in runs.items()}
    known = {name for found in values.values() for name in found}
    columns = [c for c in cfg.columns or DEFAULT_COLUMNS if c in known]
    if absent := sorted(set(cfg.columns) - known):
        print(f"no finished run logged {', '.join(absent)}: left out of the table")
    table = {}
    for variant in cfg.variants:
        seeds = [seed for seed in cfg.seeds if (variant, seed) in values]
        folders = [str(runs[variant, seed][-1].folder) for seed in seeds]
        table[variant] = {"seeds": seeds, "folders": folders, "metrics": {}}
        for name in columns:
            each = [values[variant, s].get(name) for s in seeds]
            some = [x for x in each if x is not None]
            table[variant]["metrics"][name] = {
                "mean": statistics.fmean(some) if some else None,
                "std": statistics.stdev(some) if len(some) > 1 else None,
                "values": each,
            }
    # of the runs themselves: the code may have changed since the first of them
    files = [s.folder / "commit.txt" for chain in runs.values() for s in chain]
    commits = ", ".join(sorted({f.read_text().strip() for f in files if f.is_file()})) or "unknown"
    lines = [f"| variant | runs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for variant, row in table.items():
        cells = [cell(**row["metrics"][name]) for name in columns]
        lines.append(f"| {variant} | {len(row['seeds'])} | {' | '.join(cells)} |")
    seeds = ", ".join(map(str, cfg.seeds))
    lines += ["", f"Mean ± standard deviation (n - 1) over seeds {seeds}; commit {commits}."]
    if cfg.jobs > 1:
        lines.append(f"{cfg.jobs} runs shared the machine: images_per_s compares nothing else.")
    text, folder = "\n".join(lines) + "\n", Path(cfg.output_dir)
    write_whole(folder / "table.md", text)
    facts = {"variants": table, "config": config.to_dict(cfg), "commit": commits}
    write_whole(folder / "table.json", json.dumps(facts, indent=1) + "\n")
    write_board(cfg, values, columns)
    print(f"\n{text}written to {folder}: table.md, table.json, tensorboard")


if __name__ == "__main__":
    entry(main)
