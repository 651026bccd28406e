"""What a killed process leaves: SIGKILL and SIGTERM inside prepare, exports, saves and reports.

pytest tests/faults/test_remains.py    REMAINS=300 asks for more kills of each kind
"""

import json
import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import generate
import prepare
from assembly import bundle
from data import writing
from data.decoding import decode_infrared, decode_visible
from tests import tiny_data as tiny
from tests.conftest import call_main
from tests.faults import forks
from tests.faults.test_written_whole import export
from utils import checkpoint, files, panels, results
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


def test_evaluation_killed_at_random_moments_leaves_whole_tables(tmp_path):
    chance, last = random.Random(4), 0

    def write(number):
        images = [{"image": i, "value": number} for i in range(500)]
        results.write(tmp_path, images, images, {"value": [number] * 500}, f"{number}\n" * 500)

    def forever(first):
        for number in range(first, 10**9):
            write(number)

    begun = time.perf_counter()
    assert forks.status(forks.start(partial(write, 0))) == 0
    seconds = time.perf_counter() - begun
    for _ in range(KILLS):
        forks.kill_after(forks.start(partial(forever, last + 1)), chance.uniform(0, 3 * seconds))
        for path in tmp_path.glob("*.csv"):
            lines = path.read_text().splitlines()[1:]
            assert len(lines) == 500 and len({line.split(",")[1] for line in lines}) == 1
        values = json.loads((tmp_path / "results.json").read_text())["value"]
        assert len(values) == 500 and len(set(values)) == 1 and values[0] >= last
        last = values[0]
    results.write(tmp_path, [], [], {}, "end")
    wanted = "per_image.csv", "per_object.csv", "results.json", "results.md"
    assert not leftovers(tmp_path, *wanted)


def test_generation_killed_at_random_moments_leaves_whole_images(tmp_path, monkeypatch):
    photographs, out, chance = tmp_path / "photographs", tmp_path / "out", random.Random(5)
    photographs.mkdir()
    for i in range(12):
        (photographs / f"{i}.png").write_bytes(tiny.png(tiny.visible(i, (128, 128))))
    size = SimpleNamespace(height_width=lambda: (64, 64), aspect="squash")
    trained = SimpleNamespace(window=(0, 65535), unit="counts", planck=None, data=size)
    loaded = SimpleNamespace(eval=lambda: None), trained, "plan"
    monkeypatch.setattr(generate.checkpoints, "load_translator", lambda *a, **k: loaded)
    monkeypatch.setattr(generate.checkpoints, "sampling_of", lambda *a: None)
    made = np.random.default_rng(0).random((128, 128), np.float32)
    monkeypatch.setattr(generate, "infrared_of", lambda _, images, *a: [made] * len(images))
    argv = "--checkpoint", photographs, "--image_path", photographs, "--output_dir", out
    make = partial(call_main, "generate", *argv, "--format", "png16", "--device", "cpu")

    begun = time.perf_counter()
    assert forks.status(forks.start(partial(quietly, make))) == 0
    seconds, killed = time.perf_counter() - begun, 0
    for _ in range(KILLS):
        shutil.rmtree(out)
        killed += forks.kill_after(forks.start(partial(quietly, make)), chance.uniform(0, seconds))
        out.mkdir(exist_ok=True)
        for path in out.glob("*.png"):
            assert decode_infrared(path.read_bytes(), path.name).dtype == np.uint16
            assert json.loads(path.with_suffix(".json").read_text())["unit"] == "counts"
    assert killed
    make()
    assert not leftovers(out, *(f"{i}.{kind}" for i in range(12) for kind in ("png", "json")))


def test_panels_killed_at_random_moments_are_whole(tmp_path):
    path, chance = tmp_path / "scene.png", random.Random(6)

    def forever():
        for number in range(10**9):
            panels.save_png(path, np.full((200, 200, 3), number % 256, np.uint8))

    for _ in range(KILLS):
        forks.kill_after(forks.start(forever), chance.uniform(0, 0.03))
        assert not path.exists() or len(np.unique(decode_visible(path.read_bytes(), "x"))) == 1
    panels.save_png(path, np.zeros((2, 2, 3), np.uint8))
    assert not leftovers(tmp_path, "scene.png")
