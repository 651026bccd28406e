"""A live table of training runs in a terminal, read from their metrics.jsonl; also over ssh.

    python watch.py runs/train                       the newest values, every few seconds
    python watch.py runs/a runs/b runs/ablate/*/*    several runs side by side
    python watch.py --once runs/train                one table, for scripts

Reads files alone: no GPU, nothing of the run itself, and none of torch. Ctrl-C ends it.
"""

import argparse
import json
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

TAIL = 2**18  # bytes of metrics.jsonl that are read from its end
SILENT = 600  # seconds without a row after which a run that still goes on is said to be silent
TREND = 50  # rows whose median loss the newest is compared with
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
        print(f"{CLEAR}{time.strftime('%H:%M:%S')}, every {args.every:g} s\n\n{text}", flush=True)
        time.sleep(args.every)


def width() -> int:
    """Columns of the terminal; of a pipe as many as are needed."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6


def look(folder: Path) -> dict[str, str]:
    """What a table shows of one run, every value as text."""
    rows = read_rows(folder / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    latest, validated = (training or [{}])[-1], [r for r in rows if "val_loss" in r]
    checked = (validated or [{}])[-1]
    running = is_running(folder / "run.lock")
    shown = {"run": str(folder), "state": "running" if running else "not running"}
    shown["step"] = str(rows[-1]["step"]) if rows else "-"
    shown["loss"] = number(latest.get("loss"))
    shown["validation"] = number(checked.get("val_loss"))
    for name in ("val_psnr", "val_ssim"):
        if name in checked:
            shown[name[4:].upper()] = number(checked[name])
    shown["images/s"] = number(latest.get("images_per_s"))
    if "eval_s" in latest:
        share = f", {latest['eval_share']:.0%} of the time" if latest.get("eval_share") else ""
        shown["evaluation"] = f"{number(latest['eval_s'])} s{share}"
    shown["time left"] = duration(latest.get("left_s")) if running else "-"
    shown["last checkpoint"] = last_checkpoint(folder)
    shown["warnings"] = "; ".join(warnings(folder, rows, training, running))
    return shown


def read_rows(path: Path) -> list[dict]:
    """The last rows of a file that is being written; what is no whole row is passed over."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut at its beginning, or not yet written to its end
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def is_running(path: Path) -> bool:
    """Whether the process that run.lock names lives; of another machine's it is believed.

    The lock itself is not tried: a run that starts at that moment would find it taken.
    """
    try:
        said = re.fullmatch(r"host (.*), pid (\d+)", path.read_text(errors="replace").strip())
    except OSError:
        return False
    if said is None or said[1] != socket.gethostname():
        return said is not None
    try:
        os.kill(int(said[2]), 0)
    except PermissionError:  # another user's, which lives
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def last_checkpoint(folder: Path) -> str:
    found = {p: re.fullmatch(r"checkpoint_(\d+)\.pth", p.name) for p in folder.glob("*.pth")}
    steps = {int(match[1]): path for path, match in found.items() if match}
    if not steps:
        return "none"
    return f"step {max(steps)}, {duration(age(steps[max(steps)]))} ago"


def warnings(folder: Path, rows: list, training: list, running: bool) -> list[str]:
    """What a person should look at, each in a few words."""
    said = []
    if not rows:
        return ["no rows in metrics.jsonl yet"]
    quiet = age(folder / "metrics.jsonl")
    if running and quiet > SILENT:
        said.append(f"silent for {duration(quiet)}")
    if skipped := (training or [{}])[-1].get("skipped"):
        said.append(f"{skipped:.0f} steps left out, not finite")
    losses = [row["loss"] for row in training]
    if None in losses[-1:]:
        said.append("loss is not finite")
    finite = sorted(x for x in losses[-TREND:] if x is not None)
    if finite and losses[-1] is not None and losses[-1] > 3 * finite[len(finite) // 2] > 0:
        said.append("loss is 3 times its median of late")
    wait = (training or [{}])[-1].get("data_wait") or 0
    if wait > 0.2:
        said.append(f"{wait:.0%} of the time waits for data: more data.num_workers")
    checked = [r["val_loss"] for r in rows if r.get("val_loss") is not None]
    if len(checked) >= 4 and min(checked[-3:]) > min(checked[:-3]):
        said.append("validation has not improved three times")
    return said


def age(path: Path) -> float:
    """Seconds since a file was written."""
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else 0.0


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(runs: list[dict[str, str]], columns: int) -> str:
    """Names at the left, a column a run, as many as fit; others below, warnings at the end."""
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
    lines += [f"warning, {run['run']}: {run['warnings']}" for run in runs if run["warnings"]]
    return "\n".join(lines).rstrip()


def breadth(run: dict[str, str]) -> int:
    """Columns of a run."""
    return max(len(text) for name, text in run.items() if name != "warnings") + 3


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
