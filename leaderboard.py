"""A page with one table per protocol, made only from results.json files.

    python leaderboard.py
    python leaderboard.py --results runs/board --output runs/board.md

Every results.json below --results is one entry, named by its folder. Beside it, or in the folder
above, `commands.txt` may say what made its checkpoint: lines with # describe it, the others are
commands. Rows of different protocol ids never share a table. Equal files give equal bytes.
"""

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from assembly import peers
from assembly.peers import PEERS
from utils import config, results
from utils.files import read_limited, write_whole
from utils.run import entry

MOST_BYTES = 64 * 2**20
INTRODUCTION = """# Leaderboard

Made by `python leaderboard.py` from the results.json files in `docs/leaderboard`; not to be edited.
A table holds entries with one protocol id: the same images, pixels and metrics. Between tables no
number may be compared. ± is half of the 95 % interval over images. Rows that need no model stand
once if they are equal. [evaluation.md](evaluation.md) explains columns and protocols.
"""


@dataclass(kw_only=True)
class LeaderboardConfig:
    """leaderboard.py."""

    results: str = "docs/leaderboard"  # folder with results.json files, at any depth
    output: str = "docs/leaderboard.md"


class Entry(NamedTuple):
    name: str
    found: dict[str, Any]  # what results.json holds
    about: list[str]  # lines of commands.txt that describe it
    commands: list[str]  # what made the checkpoint, then what evaluated it


def main() -> None:
    cfg = config.load(LeaderboardConfig, flags={"results": "results", "output": "output"})
    entries = read(Path(cfg.results))
    write_whole(cfg.output, page(entries))
    print(f"{len(entries)} results in {cfg.output}")


def read(folder: Path) -> list[Entry]:
    """The entries below a folder, by name.

    Raises: ValueError: there are none, or a file is not one of evaluate.py.
    """
    files = sorted(folder.rglob("results.json"))
    if not files:
        raise ValueError(f"no results.json below {folder}; evaluate.py writes them")
    return [_entry(file, folder) for file in files]


def _entry(file: Path, folder: Path) -> Entry:
    try:
        found = json.loads(read_limited(file, MOST_BYTES))
        last = found["run"]["command"]
        found["protocol"]["id"], found["methods"], found["intervals"], found["differences"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a results.json of this version of evaluate.py ({error!r})"
        ) from None
    about, commands = [], []
    beside = [file.parent / "commands.txt", file.parent.parent / "commands.txt"]
    if known := next((path for path in beside if path.is_file()), None):
        lines = read_limited(known, MOST_BYTES).decode().splitlines()
        about = [line.lstrip("# ") for line in lines if line.startswith("#")]
        commands = [line for line in lines if line.strip() and not line.startswith("#")]
    name = file.parent.relative_to(folder).as_posix() if file.parent != folder else folder.name
    return Entry(name, found, about, [*commands, last])


def page(entries: list[Entry]) -> str:
    """The whole page; entries of one protocol id together, in the order of their names."""
    by_id: dict[str, list[Entry]] = {}
    for one in entries:
        by_id.setdefault(one.found["protocol"]["id"], []).append(one)
    lines = [INTRODUCTION]
    for identity, own in by_id.items():
        lines += section(identity, own)
    return "\n".join(lines)


def section(identity: str, entries: list[Entry]) -> list[str]:
    """One protocol: what it measures, the table, and how to make each row again."""
    first = entries[0].found
    frozen, (height, width) = first["protocol"]["frozen"], first["size"]
    peer = PEERS.get(frozen.get("name", ""))
    title = f"As {peer.title} measures" if peer else "Our protocol"
    lines = [f"## {title}: {identity}", ""]
    lines.append(
        f"{first['pairs']} pairs, {height} x {width}, split {frozen['split']}"
        f" (`{frozen['split_hash'][:12]}`). Range: {frozen['range']}. Resize: {frozen['resize']}."
        f" Crop: {frozen['crop']}."
    )
    if peer:
        lines += ["", f"Not confirmed: {'; '.join(peer.unconfirmed)}."]
    merged, seconds = merge(entries)
    lines += ["", *(peers.table(merged, peer, seconds) if peer else results.table(merged, seconds))]
    for one in entries:
        run = one.found["run"]
        lines += ["", f"**{one.name}** {' '.join(one.about)}".rstrip(), ""]
        lines.append(f"Checkpoint `{one.found['protocol']['checkpoint_hash'][:12]}`, commit")
        lines[-1] += f" `{run['commit'][:12]}`, {run['device']}."
        if note := one.found["note"]:
            lines[-1] += f" {html.escape(note[0].upper() + note[1:], quote=False)}."
        lines += ["", "```bash", *one.commands, "```"]
    return [*lines, ""]


def merge(entries: list[Entry]) -> tuple[dict[str, Any], dict[str, float]]:
    """{methods, intervals} of all entries, best PSNR (else first measure) first, and seconds."""
    rows: dict[str, tuple[dict, dict, float]] = {}
    for name, found, *_ in entries:
        for method, values in found["methods"].items():
            ours = method in found["differences"]
            label = f"{name}: {method}" if ours else method
            row = _numbers(values), _numbers(found["intervals"][method])
            if label in rows and repr(rows[label][:2]) != repr(row):
                label = f"{name}: {method}"  # a reference of other training pairs
            if label not in rows:
                rows[label] = (*row, found["run"]["seconds_an_image"].get(method, math.nan))
    first = next(n for n in results.COLUMNS if any(n in values for values, *_ in rows.values()))

    def place(label: str) -> tuple[float, str]:
        value = rows[label][0].get(first, math.nan)
        return (math.inf if math.isnan(value) else -results.COLUMNS[first].better * value), label

    order = sorted(rows, key=place)
    merged = {
        "methods": {x: rows[x][0] for x in order},
        "intervals": {x: rows[x][1] for x in order},
    }
    return merged, {x: rows[x][2] for x in order}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """null stands for what is not finite."""
    whole = {k: [math.nan if y is None else y for y in x] if isinstance(x, list) else x
             for k, x in values.items()}  # fmt: skip
    return {key: math.nan if x is None else x for key, x in whole.items()}


if __name__ == "__main__":
    entry(main)
