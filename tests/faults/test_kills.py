"""SIGKILL at random moments of a run: what goes on from it ends with the same bits.

pytest tests/faults/test_kills.py    KILLS=50 asks for more kills on each number of ranks
"""

import os
import random
import subprocess
import sys

import pytest
import torch

from tests.test_loop import ROOT
from utils import checkpoint

KILLS = int(os.environ.get("KILLS", 2))
SCRIPT = """
import os, signal, sys, threading
from tests.test_loop import train
from utils import dist
dist.init("cpu")
after, folder, begun = float(sys.argv[1]), sys.argv[2], []

def on_loss(micro):
    if after and not begun and dist.rank() == dist.world_size() - 1:
        begun.append(threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)))
        begun[0].daemon = True
        begun[0].start()

train(folder, "training.steps=40", "pause=0.01", "noise=0.1", on_loss=on_loss)
dist.close()
"""


def run(folder, ranks, after):
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(script), str(after)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(folder)], cwd=ROOT, env=environment, capture_output=True, timeout=120
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, ranks):
    assert run(tmp_path / "whole", ranks, 0).returncode == 0
    chance, kills = random.Random(ranks), 0
    while kills < KILLS:
        folder = tmp_path / f"killed{kills}"
        for _ in range(4):
            done = run(folder, ranks, chance.uniform(0.02, 0.6) if kills < KILLS else 0)
            if done.returncode == 0:
                break
            kills += 1
        else:
            done = run(folder, ranks, 0)
        assert done.returncode == 0, done.stderr[-1000:]
        a, b = (checkpoint.load(checkpoint.latest(f)) for f in (tmp_path / "whole", folder))
        for part in ("model", "ema", "optimizer", "state"):
            assert _equal(a[part], b[part]), part


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
