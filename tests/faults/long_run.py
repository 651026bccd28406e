"""20,000 steps with evaluation and saving: does memory grow, do steps become slower?

python -m tests.faults.long_run --output_dir runs/long --steps 20000

Stage 2 of the demo, with its model and at 32 pixels and batch 1, in one process; --run names the
others: stage 1 of it (32 pixels, width 8, batch 2), or the loop on a linear model. Prints the
resident memory and the time of a step in the first and last tenth after a warm-up of 1,000 steps,
or of a fifth if there are fewer, and how fast a straight line through all after it rises.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import linear_regression, median

from tests.test_loop import ROOT

SMALLER = [
    "data.size=32",
    "data.synthetic_scenes={train: 64, val: 8, test: 8}",
    "data.cache=ram",
    "training.log_every=50",
    "training.eval_every=500",
    "training.save_every=500",
    "training.keep_last=3",
    "run.images=1",
    "--device=cpu",
]

STAGE_1 = ["--config", "configs/demo/pretrain.yaml", "model.width=8", "training.batch_size=2"]
STAGE_2 = ["--config", "configs/demo/train.yaml", "training.batch_size=1"]

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


def watch(command: list[str], rows: Path, every: float, most: float) -> list[tuple[int, float]]:
    """(step, MiB) of a run, looked at until it ends, by SIGTERM after `most` seconds.

    Raises: CalledProcessError: it failed before.
    """
    process, samples, begun = subprocess.Popen(command, cwd=ROOT), [], time.monotonic()
    while process.poll() is None and time.monotonic() < begun + most:
        time.sleep(every)
        size = resident(process.pid)
        if size and rows.exists() and (lines := rows.read_text().splitlines()[:-1]):
            samples.append((json.loads(lines[-1])["step"], size))
    if process.poll() is None:
        process.terminate()
        process.wait()
    elif process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return samples


def command_of(kind: str, out: Path, steps: int) -> list[str]:
    """The command of a run; for stage 2 a stage 1 of 100 steps is trained beside it first."""
    python = [sys.executable]
    if kind == "toy":
        return [*python, "-c", TOY, str(out), str(steps)]

    def stage1(where: Path, steps: int) -> list[str]:
        length = [f"training.steps={steps}", "--output_dir", str(where)]
        return [*python, "pretrain.py", *STAGE_1, *SMALLER, *length]

    if kind == "stage1":
        return stage1(out, steps)
    first = out.with_name(out.name + "-stage1")
    subprocess.run([*stage1(first, 100), "training.eval_every=100"], cwd=ROOT, check=True)
    beside = ["--decomposition_checkpoint", str(first / "best_model.pth"), "--output_dir", str(out)]
    return [*python, "train.py", *STAGE_2, *SMALLER, f"training.steps={steps}", *beside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--run", choices=["stage2", "stage1", "toy"], default="stage2")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end it after so many")
    args = parser.parse_args()
    command = command_of(args.run, args.output_dir.resolve(), args.steps)
    rows = args.output_dir / "metrics.jsonl"
    sizes = watch(command, rows, args.every, 60 * args.minutes)
    logged = [json.loads(line) for line in rows.read_text().splitlines()]
    times = [(r["step"], 1000 * r["step_s"]) for r in logged if "step_s" in r]
    (args.output_dir / "memory.json").write_text(json.dumps(sizes))
    steps = times[-1][0]
    first = min(1000, steps // 5)  # past the first evaluation, which allocates
    tenth = (steps - first) // 10
    for name, pairs, unit in (("memory", sizes, "MiB"), ("step", times, "ms")):
        begin = [x for step, x in pairs if first < step <= first + tenth]
        end = [x for step, x in pairs if step > steps - tenth]
        rise = linear_regression(*zip(*(p for p in pairs if p[0] > first), strict=True)).slope
        print(
            f"{name}: {median(begin):.1f} {unit} -> {median(end):.1f} {unit} (medians;"
            f" most {max(x for _, x in pairs):.1f}; a line rises {1000 * rise:+.2f} in 1,000 steps)"
        )
    boards = sum(p.stat().st_size for p in args.output_dir.glob("events*")) / 2**20
    kept = len(list(args.output_dir.glob("checkpoint_*.pth")))
    print(f"{steps} steps; TensorBoard: {boards:.1f} MiB; checkpoints kept: {kept}")


if __name__ == "__main__":
    main()
