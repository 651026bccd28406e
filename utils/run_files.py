"""How a run stands, from the files in its folder alone: also while it is written, without torch."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Literal

TAIL = 2**18  # bytes of metrics.jsonl that are read from its end
SILENT = 600  # seconds without a row after which a run that still goes on counts as silent
TREND = 50  # rows whose median loss the newest is compared with


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


def state(path: Path) -> Literal["running", "ended", "killed"]:
    """What run.lock tells: it names the process that writes here, and is emptied at the end.

    A process of another machine is believed to live. The lock itself is not tried: a run that
    starts at that moment would find it taken.
    """
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        return "ended"
    holder = re.fullmatch(r"host (.*), pid (\d+)", text)
    if holder is None:
        return "ended"
    if holder[1] != socket.gethostname():
        return "running"
    try:
        os.kill(int(holder[2]), 0)
    except PermissionError:  # another user's, which lives
        return "running"
    except (ProcessLookupError, OverflowError):
        return "killed"
    return "running"


def steps_wanted(folder: Path) -> int | None:
    """training.steps of the run's config.yaml; None: it ends by epochs or seconds."""
    try:
        text = (folder / "config.yaml").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^training:\n(?:  .*\n)*?  steps: (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def last_checkpoint(folder: Path) -> str:
    found = {p: re.fullmatch(r"checkpoint_(\d+)\.pth", p.name) for p in folder.glob("*.pth")}
    steps = {int(match[1]): path for path, match in found.items() if match}
    if not steps:
        return "none"
    return f"step {max(steps)}, {duration(age(steps[max(steps)]))} ago"


def warnings(folder: Path, rows: list, training: list, stands: str) -> list[str]:
    """What a person should look at, each in a few words."""
    sentences = []
    if stands == "killed":
        sentences.append("it ended without closing its files; the same command goes on")
    if not rows:
        return [*sentences, "no rows in metrics.jsonl yet"]
    quiet = age(folder / "metrics.jsonl")
    if stands == "running" and quiet > SILENT:
        sentences.append(f"silent for {duration(quiet)}")
    if skipped := (training or [{}])[-1].get("skipped"):
        sentences.append(f"{skipped:.0f} steps left out, not finite")
    losses = [row["loss"] for row in training]
    if None in losses[-1:]:
        sentences.append("loss is not finite")
    finite = sorted(x for x in losses[-TREND:] if x is not None)
    if finite and losses[-1] is not None and losses[-1] > 3 * finite[len(finite) // 2] > 0:
        sentences.append("loss is more than 3 times its recent median")
    wait = (training or [{}])[-1].get("data_wait") or 0
    if wait > 0.2:
        sentences.append(f"{wait:.0%} of the time waits for data: raise data.num_workers")
    checked = [r["val_loss"] for r in rows if r.get("val_loss") is not None]
    if len(checked) >= 4 and min(checked[-3:]) > min(checked[:-3]):
        sentences.append("the last three validations did not improve")
    return sentences


def age(path: Path) -> float:
    """Seconds since a file was written."""
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else 0.0


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
