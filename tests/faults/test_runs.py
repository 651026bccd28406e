"""Two runs in one folder, killed runs, damaged metrics and unfit checkpoints.

pytest tests/faults/test_runs.py
"""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from assembly import checkpoints
from tests.test_loop import ROOT, ToyConfig, rows_of, train, weights
from utils import checkpoint
from utils.run import Run

HOLD = """
import sys, time
from tests.test_loop import ToyConfig
from utils.run import Run
run = Run(sys.argv[1], ToyConfig())
run.start(0)
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_gone(tmp_path, holder, capsys):
    with pytest.raises(ValueError, match=rf"in use by host .+, pid {holder.pid}; end that run"):
        train(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    train(tmp_path)
    assert f"pid {holder.pid} ended without releasing it" in capsys.readouterr().out
    assert (tmp_path / "run.lock").read_text() == ""
    Run(tmp_path, ToyConfig()).start(0)
    assert "stale" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["[1]", "3", '{"loss": 1}', '{"step": "x"}', "[" * 10**5, "\udcff"]
)
def test_a_damaged_line_of_metrics_does_not_block_resuming(tmp_path, line):
    train(tmp_path, "training.steps=3")
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
    train(tmp_path)
    assert [row["step"] for row in rows_of(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6]


SPOILT = {
    "state": lambda parts: parts.pop("state"),
    "step": lambda parts: parts["state"].update(step="six"),
    "moment": lambda parts: parts["optimizer"]["state"][0].pop("exp_avg_sq"),
    "no tensor": lambda parts: parts["optimizer"]["state"][0].update(exp_avg=3),
    "ema": lambda parts: parts["ema"].pop("average"),
    "config": lambda parts: parts.pop("config"),
    "world": lambda parts: parts.pop("world_size"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_an_intact_checkpoint_of_wrong_contents_is_passed_over_or_refused(tmp_path, capsys, spoil):
    whole, _ = train(tmp_path)
    last = tmp_path / "checkpoint_00000006.pth"
    parts = checkpoint.load(last)
    spoil(parts)
    checkpoint.save(last, parts)
    again, _ = train(tmp_path)
    assert f"passing over {last}" in capsys.readouterr().out
    assert torch.equal(weights(whole), weights(again))
    checkpoint.save(tmp_path / "named.pth", parts)
    with pytest.raises(ValueError, match=r"named.pth cannot be resumed from"):
        train(tmp_path / "other", f"run.resume={tmp_path / 'named.pth'}")


def test_a_truncated_best_model_is_no_dead_end(tmp_path, capsys):
    train(tmp_path, "training.eval_every=3", eval_fn=lambda model: {"val_loss": 1.0})
    best = tmp_path / "best_model.pth"
    best.write_bytes(best.read_bytes()[:500])
    assert checkpoints.file_of(tmp_path).name == "checkpoint_00000006.pth"
    assert f"passing over {best}, which is damaged" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"best_model.pth is damaged.*use .*checkpoint_00000006"):
        checkpoints.file_of(best)
    again = ["training.eval_every=3", "training.steps=9"]
    train(tmp_path, *again, eval_fn=lambda model: {"val_loss": 2.0})
    assert not checkpoint.damaged(best)  # chosen anew


def test_the_free_space_is_said_as_it_was_when_the_write_failed(tmp_path, monkeypatch):
    def free(folder):
        return SimpleNamespace(free=2**20 * (5 if list(tmp_path.glob("*.tmp")) else 900))

    def full(parts, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", free)
    with pytest.raises(OSError, match="5 MiB are free there: .*No space left"):
        checkpoint.save(tmp_path / "checkpoint_1.pth", {"model": {}})
