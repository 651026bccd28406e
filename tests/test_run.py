"""The run directory and the way a script ends.

pytest tests/test_run.py
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import dist
from utils import run as run_module
from utils.run import Run, RunConfig, entry

ROOT = Path(__file__).resolve().parent.parent


@dataclass(kw_only=True)
class ToyConfig:
    run: RunConfig = field(default_factory=RunConfig)
    lr: float = 1e-4


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_directory_describes_the_run_and_appears_with_its_first_row(tmp_path):
    run = Run(tmp_path / "a/b", ToyConfig())
    assert not (tmp_path / "a").exists()
    run.log(1, loss=torch.tensor(0.5), psnr=float("inf"))
    run.close()
    found = {path.name for path in run.dir.iterdir()}
    assert {"config.yaml", "command.txt", "commit.txt", "code.diff", "metrics.jsonl"} <= found
    assert yaml.safe_load((run.dir / "config.yaml").read_text())["lr"] == 1e-4
    assert len((run.dir / "commit.txt").read_text().strip()) in (40, len("unknown"))
    assert rows(run.dir) == [{"step": 1, "loss": 0.5, "psnr": None}]


def test_tensorboard_gets_scalars_pictures_and_the_configuration(tmp_path):
    run = Run(tmp_path, ToyConfig())
    run.log(3, loss=0.5)
    run.image(3, "panel", np.zeros((4, 6, 3), np.uint8))
    run.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(3, 0.5)]
    assert board.Tags()["images"] == ["panel"] and "config/text_summary" in board.Tags()["tensors"]


def test_resuming_drops_the_rows_after_the_step_and_half_a_line(tmp_path):
    run = Run(tmp_path, ToyConfig())
    for step in range(1, 5):
        run.log(step, loss=step)
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold the second
    run = Run(tmp_path, ToyConfig())
    run.start(2)
    run.log(3, loss=30)
    run.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    assert (tmp_path / "command.txt").read_text().count("# ") == 2
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]


def test_starting_again_without_a_checkpoint_starts_the_curve_again(tmp_path):
    for value in (1.0, 2.0):
        run = Run(tmp_path, ToyConfig())
        run.start(0)
        run.log(0, loss=value)
        run.close()
    assert rows(tmp_path) == [{"step": 0, "loss": 2.0}]


def test_what_is_logged_after_the_end_is_added_and_takes_nothing_away(tmp_path):
    run = Run(tmp_path, ToyConfig())
    run.start(0)
    run.log(1, loss=1.0)
    run.close()
    run.log(2, loss=2.0)  # the same run, opened again
    run.close()
    late = Run(tmp_path, ToyConfig())  # a finished run, started again
    late.log(3, loss=3.0)
    late.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "rank", lambda: 1)
    run = Run(tmp_path / "x", ToyConfig())
    run.start(0)
    run.log(1, loss=1.0)
    run.image(1, "panel", np.zeros((4, 6, 3), np.uint8))
    run.close()
    assert not (tmp_path / "x").exists()


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_module.code_version() == ("unknown", "")


def test_the_uncommitted_change_is_kept(tmp_path, monkeypatch):
    repository = tmp_path / "utils"
    repository.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("before\n")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / "code.py").write_text("after\n")
    (tmp_path / "new.py").write_text("")
    monkeypatch.setattr(run_module, "__file__", str(repository / "run.py"))
    commit, diff = run_module.code_version()
    assert len(commit) == 40 and "-before\n+after\n" in diff and "# untracked: new.py" in diff


def script(body, **environment):
    """Run a `main` with this body as a user would."""
    code = f"from utils.run import entry\ndef main():\n    {body}\nentry(main)\nprint('went on')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_a_mistake_of_the_user_ends_in_one_line_and_code_2():
    done = script(r"raise ValueError('the file\nis empty')")
    assert (done.returncode, done.stderr, done.stdout) == (2, "error: the file is empty\n", "")


def test_too_little_memory_on_the_gpu_is_one_sentence_with_a_preset_to_try():
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
    done = script(f"import torch; raise torch.OutOfMemoryError({text!r})")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "Tried to allocate 2.00 GiB" in done.stderr and "model.memory=48g" in done.stderr


def test_the_traceback_can_be_asked_for():
    done = script("open('/nowhere/x')", THERMAFLUX_TRACEBACK="1")
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.endswith("error: [Errno 2] No such file or directory: '/nowhere/x'\n")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="ours"):
        entry(lambda: (_ for _ in ()).throw(RuntimeError("ours")))


def test_an_orderly_stop_keeps_its_code():
    with pytest.raises(SystemExit) as stop:
        entry(lambda: sys.exit(0))
    assert stop.value.code == 0
