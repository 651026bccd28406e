"""What a killed process leaves: SIGKILL and SIGTERM inside prepare, exports, saves and reports.

pytest tests/faults/test_remains.py    REMAINS=300 asks for more kills of each kind
"""

import json
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import prepare
from assembly import bundle
from data import writing
from tests.faults import forks
from tests.faults.test_written_whole import export
from utils import checkpoint, files
from utils.run import entry

KILLS = int(os.environ.get("REMAINS", 5))
PREPARE = ["--synthetic", "9", "--size", "16", "--num_workers", "2", "--overwrite"]


def leftovers(folder, *wanted):
    return sorted(set(os.listdir(folder)) - set(wanted))


def quietly(work):
    """Without what it prints, in a forked child."""
    # tqdm's lock is shared by forked processes: killed with it, the child would stop its parent
    tqdm.set_lock(threading.RLock())
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    work()


def make(out):
    prepare.main([*PREPARE, "--out", str(out)])


def hashes(out):
    manifest = json.loads((out / "manifest.json").read_text())
    return [shard["sha256"] for shard in manifest["shards"]]


def workers_of(group):
    """Processes that are left of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_prepare_killed_at_random_moments_leaves_nothing_after_the_next_run(tmp_path):
    out, chance = tmp_path / "set", random.Random(0)
    begun = time.perf_counter()
    assert forks.status(forks.start(partial(quietly, partial(make, out)))) == 0
    whole, seconds, killed = hashes(out), time.perf_counter() - begun, 0
    for _ in range(KILLS):
        child = forks.start(partial(quietly, partial(make, out)))
        killed += forks.kill_after(child, chance.uniform(0, seconds))
        files.clear_remains(out) if not out.exists() else None
        assert hashes(out) == whole
        for _ in range(100):
            if not workers_of(child):
                break
            time.sleep(0.02)
        assert not workers_of(child), "worker processes outlive their parent"
    assert killed
    make(out)
    assert hashes(out) == whole and not leftovers(tmp_path, "set")
    writing.check(str(out))


def test_prepare_leaves_nothing_at_sigterm(tmp_path):
    out = tmp_path / "set"
    many = [*PREPARE, "--synthetic", "2000", "--out", str(out)]

    def begin():
        quietly(partial(entry, partial(prepare.main, many)))

    child = forks.start(begin)
    while not os.listdir(tmp_path):
        time.sleep(0.01)
    assert forks.kill_after(child, 1.0, signal.SIGTERM)  # its workers have begun
    assert not leftovers(tmp_path)


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    out = tmp_path / "set"
    with files.whole_folder(out) as part:
        child = forks.start(lambda: files.clear_remains(out))
        assert forks.status(child) == 0
        assert part.exists()
    assert out.exists()


def test_a_folder_killed_between_its_two_renames_gets_its_name_back(tmp_path, capsys):
    (tmp_path / ".set.old-1").mkdir()
    (tmp_path / ".set.new-1").mkdir()
    files.clear_remains(tmp_path / "set")
    assert os.listdir(tmp_path) == ["set"] and "is back" in capsys.readouterr().out


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside other files"])
def test_an_export_killed_at_random_moments_is_old_or_new_or_none(tmp_path, others):
    folder, chance = tmp_path / "export", random.Random(1)
    if others:
        folder.mkdir()
        (folder / "mine.txt").write_text("kept")

    def forever(first):
        for value in range(first, first + 10**6):
            export(folder, float(value))

    last = 0
    for _ in range(KILLS):
        assert forks.kill_after(forks.start(partial(forever, last + 1)), chance.uniform(0, 0.05))
        if not others:
            files.clear_remains(folder)
        if bundle.is_bundle(folder):
            value = bundle.read_bundle(folder)[1]["w"]
            assert value.unique().numel() == 1 and value[0] >= last
            last = int(value[0])
    export(folder, -1.0)
    assert bundle.read_bundle(folder)[1]["w"][0] == -1
    assert not leftovers(tmp_path, "export")
    assert not leftovers(folder, *bundle.FILES, "mine.txt")
    assert (folder / "mine.txt").exists() == others


def test_a_save_killed_at_random_moments_leaves_whole_checkpoints(tmp_path):
    chance = random.Random(2)

    def forever(first):
        for step in range(first, 10**6):
            model = {"w": torch.full((50_000,), float(step))}
            checkpoint.save(tmp_path / f"checkpoint_{step:08d}.pth", {"model": model}, keep=2)

    last = 0
    for _ in range(KILLS):
        forks.kill_after(forks.start(partial(forever, last + 1)), chance.uniform(0.01, 0.08))
        for path in tmp_path.glob(checkpoint.PATTERN):
            assert not checkpoint.damaged(path)
        if found := checkpoint.newest(tmp_path):
            assert (found[1]["model"]["w"] == checkpoint.step_of(found[0])).all()
            assert checkpoint.step_of(found[0]) >= last
            last = checkpoint.step_of(found[0])
    assert last


def test_a_report_killed_at_random_moments_is_old_or_new(tmp_path):
    path, chance = tmp_path / "results.md", random.Random(3)

    def forever():
        for number in range(10**9):
            files.write_whole(path, f"{number}\n" * 2000)

    for _ in range(KILLS):
        forks.kill_after(forks.start(forever), chance.uniform(0, 0.03))
        if path.exists():
            lines = path.read_text().splitlines()
            assert len(lines) == 2000 and len(set(lines)) == 1
    (tmp_path / ".results.md.1.part").write_text("half")  # the last kill may have left none
    files.write_whole(path, "end")
    assert not leftovers(tmp_path, "results.md")
