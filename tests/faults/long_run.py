"""20,000 steps with evaluation and saving: does memory grow, do steps become slower?

python -m tests.faults.long_run --output_dir runs/long --steps 20000

Stage 1 of the demo, smaller (32 pixels, width 8, batch 2), in one process. Prints the resident
memory and the time of a step in the first and last tenth after a warm-up of 1,000 steps.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from tests.test_loop import ROOT

SMALLER = [
    "data.size=32",
    "data.synthetic_scenes={train: 64, val: 8, test: 8}",
    "data.cache=ram",
    "model.width=8",
    "training.batch_size=2",
    "training.log_every=50",
    "training.eval_every=500",
    "training.save_every=500",
    "training.keep_last=3",
    "run.images=1",
    "--device=cpu",
]

TOY = """
import sys
from tests.test_loop import train
often = ["training.log_every=50", "training.eval_every=500", "training.save_every=500"]
train(sys.argv[1], f"training.steps={sys.argv[2]}", "training.keep_last=3", *often,
      eval_fn=lambda model: {"val_loss": 1.0})
"""


def resident(pid: int) -> float:
    """MiB of the process in memory; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) / 1024
    except (OSError, StopIteration):
        return 0.0


def watch(command: list[str], rows: Path, every: float) -> list[tuple[int, float]]:
    """(step, MiB) of a run, sampled until it ends. Raises: CalledProcessError: it failed."""
    process, samples = subprocess.Popen(command, cwd=ROOT), []
    while process.poll() is None:
        time.sleep(every)
        size = resident(process.pid)
        if size and rows.exists() and (lines := rows.read_text().splitlines()[:-1]):
            samples.append((json.loads(lines[-1])["step"], size))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--toy", action="store_true", help="the loop on a linear model")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    args = parser.parse_args()
    if args.toy:
        command = [sys.executable, "-c", TOY, str(args.output_dir), str(args.steps)]
    else:
        stage1 = ["pretrain.py", "--config", "configs/demo/pretrain.yaml", *SMALLER]
        stage1 += [f"training.steps={args.steps}", "--output_dir", str(args.output_dir)]
        command = [sys.executable, *stage1]
    rows = args.output_dir / "metrics.jsonl"
    sizes = watch(command, rows, args.every)
    logged = [json.loads(line) for line in rows.read_text().splitlines()]
    times = [(r["step"], 1000 * r["step_s"]) for r in logged if "step_s" in r]
    (args.output_dir / "memory.json").write_text(json.dumps(sizes))
    first, tenth = min(1000, args.steps // 10), (args.steps - min(1000, args.steps // 10)) // 10
    for name, pairs, unit in (("memory", sizes, "MiB"), ("step", times, "ms")):
        begin = [x for step, x in pairs if first < step <= first + tenth]
        end = [x for step, x in pairs if step > args.steps - tenth]
        print(
            f"{name}: {median(begin):.1f} {unit} -> {median(end):.1f} {unit}"
            f" (medians; most {max(x for _, x in pairs):.1f})"
        )
    boards = sum(p.stat().st_size for p in args.output_dir.glob("events*")) / 2**20
    kept = len(list(args.output_dir.glob("checkpoint_*.pth")))
    print(f"TensorBoard: {boards:.1f} MiB; checkpoints kept: {kept}")


if __name__ == "__main__":
    main()
