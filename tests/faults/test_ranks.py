"""Two ranks: one that hangs, is killed and restarted by torchrun, or cannot write.

pytest tests/faults/test_ranks.py
"""

import os
import subprocess
import sys

import pytest

from tests.faults.test_kills import _equal
from tests.test_loop import ROOT, train
from utils import checkpoint, dist

SCRIPT = """
import os, signal, sys, time
from tests.test_loop import train
from utils import dist
from utils.run import entry

def main():
    folder, what = sys.argv[1:]
    dist.init("cpu", timeout=4 if what == "hang" else 60)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def on_loss(micro):
        if what == "hang" and dist.rank() == 1 and micro == 3:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits 30 s to kill it
            time.sleep(100)
        if what == "kill" and micro == 4 + 3 * attempt and dist.rank() == 1 - attempt:
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder, "training.steps=12", "training.save_every=2", "noise=0.1", on_loss=on_loss)

entry(main)
"""


@pytest.fixture
def torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(folder, what, *options):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
        return subprocess.run(
            [sys.executable, *command, str(tmp_path / "script.py"), str(folder), what],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def summary(done):
    """The launcher's own report, which comes after all else."""
    return done.stderr.partition("Root Cause")[2]


def test_a_folder_that_cannot_be_written_is_one_sentence_on_every_rank(tmp_path, torchrun):
    (tmp_path / "file").write_text("")
    done = torchrun(tmp_path / "file" / "run", "nothing")
    said = "Not a directory: '" + str(tmp_path / "file" / "run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error (rank")]
    assert len(errors) == 2 and all(said in line for line in errors), done.stderr[-3000:]
    assert said in summary(done)
    assert "RuntimeError" not in done.stderr  # gloo's, of the rank that did not fail


def test_a_rank_that_hangs_is_named(tmp_path, torchrun):
    done = torchrun(tmp_path / "run", "hang")
    said = "rank 1 did not arrive within 4 s (run.timeout)"
    assert f"error (rank 0): {said}" in done.stderr, done.stderr[-3000:]
    assert said in summary(done)
    assert done.returncode == 1


def test_torchrun_goes_on_after_killed_ranks_and_ends_with_the_same_bits(
    tmp_path, torchrun, capsys
):
    done = torchrun(tmp_path / "killed", "kill", "--max-restarts=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("resumed from") == 2
    assert torchrun(tmp_path / "whole", "nothing").returncode == 0
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / f)) for f in ("whole", "killed"))
    for part in ("model", "ema", "optimizer", "state"):
        assert _equal(a[part], b[part]), part

    # and with one rank instead of two it goes on where the data were
    assert dist.world_size() == 1
    train(tmp_path / "whole", "training.steps=14", "training.save_every=2", "noise=0.1")
    assert "was 2 x 8 x 1, is now 1 x 8 x 1" in capsys.readouterr().out
    assert checkpoint.load(checkpoint.latest(tmp_path / "whole"))["state"]["position"] == 208
