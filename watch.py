"""A live table of training runs in a terminal, read from their metrics.jsonl; also over ssh.

    python watch.py runs/train                       the newest values, every few seconds
    python watch.py runs/a runs/b runs/ablate/*/*    several runs side by side
    python watch.py --once runs/train                one table, for scripts

Reads files alone: no GPU, nothing of the run itself, and none of torch. Ctrl-C ends it.
"""

import argparse
import shutil
import sys
import textwrap
import time
from pathlib import Path

from utils.run_files import (
    age,
    duration,
    last_checkpoint,
    read_rows,
    state,
    steps_wanted,
    warnings,
)

CLEAR = "\x1b[H\x1b[2J"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two tables")
    args = parser.parse_args()
    if args.every <= 0:
        parser.error(f"--every must be above 0, got {args.every:g}")
    if absent := [str(folder) for folder in args.folders if not folder.is_dir()]:
        parser.error(f"no such folder: {', '.join(absent)}")
    while True:
        text = table([look(folder) for folder in args.folders], width())
        if args.once:
            return print(text)
        head = f"{time.strftime('%H:%M:%S')}, every {args.every:g} s; Ctrl-C ends the table alone"
        print(f"{CLEAR}{head}\n\n{text}", flush=True)
        time.sleep(args.every)


def width() -> int:
    """Columns of the terminal; of a pipe as many as are needed."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6


def look(folder: Path) -> dict[str, str]:
    """What a table shows of one run, every value as text."""
    file = folder / "metrics.jsonl"
    rows, stands = read_rows(file), state(folder / "run.lock")
    training = [row for row in rows if "loss" in row]
    latest, validated = (training or [{}])[-1], [r for r in rows if "val_loss" in r]
    checked = (validated or [{}])[-1]
    shown = {"run": str(folder), "state": stands}
    total = steps_wanted(folder)
    shown["step"] = str(rows[-1]["step"] if rows else 0) + (f" of {total}" if total else "")
    shown["last report"] = f"{duration(age(file))} ago" if rows else "-"
    shown["loss"] = number(latest.get("loss"))
    shown["validation loss"] = number(checked.get("val_loss"))
    if checked:
        shown["validation loss"] += f" at step {checked['step']}"
    if "val_psnr" in checked:
        shown["PSNR"] = f"{number(checked['val_psnr'])} dB"
    if "val_ssim" in checked:
        shown["SSIM"] = number(checked["val_ssim"])
    shown["images/s"] = number(latest.get("images_per_s"))
    if "eval_s" in latest:
        share = f", {latest['eval_share']:.0%} of the time" if latest.get("eval_share") else ""
        shown["an evaluation"] = f"{number(latest['eval_s'])} s{share}"
    if stands == "running":
        shown["time left"] = duration(latest.get("left_s"))
    shown["last checkpoint"] = last_checkpoint(folder)
    shown["warnings"] = "; ".join(warnings(folder, rows, training, stands))
    return shown


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def table(runs: list[dict[str, str]], columns: int) -> str:
    """Names at the left, a column a run, as many as fit; others below, warnings at the end."""
    runs = [dict(run, run=shortened(run["run"], max(columns - 20, 20))) for run in runs]
    names = list(dict.fromkeys(name for run in runs for name in run if name != "warnings"))
    left = max(map(len, names)) + 2
    blocks: list[list[dict[str, str]]] = [[]]
    for run in runs:
        if blocks[-1] and left + sum(map(breadth, [*blocks[-1], run])) > columns:
            blocks.append([])
        blocks[-1].append(run)
    lines = []
    for block in blocks:
        for name in names:
            cells = [f"{run.get(name, '-'):<{breadth(run)}}" for run in block]
            lines.append(f"{name:<{left}}{''.join(cells)}".rstrip()[:columns])
        lines.append("")
    for run in runs:
        if run["warnings"]:
            whose = f", {run['run']}" if len(runs) > 1 else ""
            lines += textwrap.wrap(f"warning{whose}: {run['warnings']}", columns)
    return "\n".join(lines).rstrip()


def shortened(path: str, columns: int) -> str:
    """The end of a path that is too long, which tells runs apart."""
    return path if len(path) <= columns else f"...{path[3 - columns :]}"


def breadth(run: dict[str, str]) -> int:
    """Columns of a run."""
    return max(len(text) for name, text in run.items() if name != "warnings") + 3


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
