"""The table of running and finished runs.

pytest tests/test_watch.py
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

import watch
from tests.conftest import call_main
from utils import run_files

TRAINING = {
    "loss": 0.5,
    "images_per_s": 12.34,
    "left_s": 3725.0,
    "eval_s": 7.25,
    "eval_share": 0.08,
}


@pytest.fixture
def make_run(tmp_path):
    def make(name, rows, holder=None):
        folder = tmp_path / name
        folder.mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "run.lock").write_text(
            holder or f"host {socket.gethostname()}, pid {os.getpid()}"
        )
        return folder

    return make


def lines(text):
    """first column -> the others"""
    return {line[:17].strip(): line[17:].strip() for line in text.splitlines() if line}


def test_a_running_run_shows_where_it_stands(make_run, capsys):
    folder = make_run(
        "a", [{"step": 20, **TRAINING}, {"step": 20, "val_loss": 0.4, "val_psnr": 21.5}]
    )
    (folder / "checkpoint_00000010.pth").touch()
    (folder / "checkpoint_00000020.pth").touch()
    (folder / "best_model.pth").touch()
    (folder / "config.yaml").write_text("data:\n  steps: 3\ntraining:\n  seed: 1\n  steps: 60\n")
    call_main("watch", "--once", folder)
    out = capsys.readouterr().out
    found = lines(out)
    assert found["run"] == str(folder) and found["state"] == "running"
    assert found["step"] == "20 of 60"
    assert found["loss"] == "0.5" and found["validation loss"] == "0.4 at step 20"
    assert found["PSNR"] == "21.5 dB" and found["last report"] == "0 s ago"
    assert found["images/s"] == "12.34" and found["time left"] == "1 h 2 min"
    assert found["an evaluation"] == "7.25 s, 8% of the time"
    assert found["last checkpoint"] == "step 20, 0 s ago"
    assert "warning" not in out and "\x1b" not in out


def test_runs_side_by_side_and_below_where_the_terminal_is_narrow(make_run):
    folders = [make_run(name, [{"step": i, "loss": float(i)}]) for i, name in enumerate("abc")]
    runs = [watch.look(folder) for folder in folders]
    wide, narrow = watch.table(runs, 10**6), watch.table(runs, 2 * watch.breadth(runs[0]) + 20)
    assert [x for x in wide.splitlines() if x.startswith("step")] == [
        line for line in wide.splitlines() if line.split() == ["step", "0", "1", "2"]
    ]
    steps = [line.split() for line in narrow.splitlines() if line.startswith("step")]
    assert steps == [["step", "0", "1"], ["step", "2"]]


def test_nothing_is_wider_than_the_terminal_and_the_end_of_a_long_name_is_kept(make_run):
    folder = make_run("long" * 20, [{"step": 1, "loss": None, "skipped": 3.0, "data_wait": 0.5}])
    shown = watch.table([watch.look(folder / ".." / folder.name)], 80).splitlines()
    assert max(map(len, shown)) <= 80 and shown[0].endswith("..." + ("long" * 20)[-57:])
    assert " ".join(shown).endswith("50% of the time waits for data: raise data.num_workers")


@pytest.mark.parametrize(
    "seconds, text",
    [(None, "-"), (7.6, "8 s"), (61, "1 min 1 s"), (3725, "1 h 2 min"), (266_400, "3 d 2 h")],
)
def test_durations_name_their_units(seconds, text):
    assert run_files.duration(seconds) == text


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"step": 1, "loss": None}], "loss is not finite"),
        ([{"step": 1, "loss": 1.0, "skipped": 2.0}], "2 steps left out, not finite"),
        ([*({"step": i, "loss": 1.0} for i in range(9)), {"step": 9, "loss": 5.0}], "3 times its"),
        ([{"step": 1, "loss": 1.0, "data_wait": 0.5}], "50% of the time waits for data"),
        (
            [{"step": i, "val_loss": x} for i, x in enumerate([1, 2, 3, 2])],
            "validations did not improve",
        ),
        ([], "no rows in metrics.jsonl yet"),
    ],
)
def test_what_a_person_should_look_at_is_a_warning(make_run, rows, said):
    folder = make_run("a", rows)
    assert said in watch.look(folder)["warnings"]
    run = watch.look(folder)
    assert "\nwarning: " in watch.table([run], 80)
    assert f"\nwarning, {folder}: " in watch.table([run, run], 200)


def test_a_run_that_says_nothing_for_long_is_silent(make_run):
    folder = make_run("a", [{"step": 1, "loss": 1.0}])
    then = time.time() - 4000
    os.utime(folder / "metrics.jsonl", (then, then))
    assert watch.look(folder)["warnings"] == "silent for 1 h 6 min"
    (folder / "run.lock").write_text("")  # it ended in order
    assert watch.look(folder)["state"] == "ended" and not watch.look(folder)["warnings"]


def test_a_killed_run_is_not_running_and_one_elsewhere_is_believed(make_run):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone = make_run("gone", [], f"host {socket.gethostname()}, pid {child.pid}")
    assert watch.look(gone)["state"] == "killed" and "goes on" in watch.look(gone)["warnings"]
    assert "time left" not in watch.look(gone)
    assert watch.look(make_run("far", [], "host elsewhere, pid 1"))["state"] == "running"


def test_half_a_row_and_a_long_file_are_no_trouble(make_run):
    folder = make_run("a", [{"step": i, "loss": 1.0, "pad": "x" * 100} for i in range(4000)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4000, "lo')
    assert 1000 < len(run_files.read_rows(folder / "metrics.jsonl")) < 4000
    assert watch.look(folder)["step"] == "3999"


def test_what_is_no_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call_main("watch", tmp_path / "none")
    assert stop.value.code == 2 and "no such folder" in capsys.readouterr().err


def test_it_needs_no_torch():
    code = "import sys, watch; print('torch' in sys.modules)"
    root = os.path.dirname(watch.__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root, text=True)
    assert done.stdout.strip() == "False"
