"""Two machines, as network namespaces of this one: equal to one process; one is killed.

pytest tests/faults/test_nodes.py
KILLS=1 pytest tests/faults/test_nodes.py        the killed ones too, about two minutes
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.test_loop import ROOT, train
from utils import checkpoint

SCRIPT = """
import os, sys, time
from tests.test_loop import train
from utils import dist
from utils.run import entry

def main():
    dist.init("cpu", timeout=60)
    pause = float(os.environ["PAUSE"])
    train(
        sys.argv[1], "training.steps=12", "training.save_every=2", "training.batch_size=4",
        on_loss=lambda micro: time.sleep(pause),
    )

entry(main)
"""
CONF = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"
killing = pytest.mark.skipif("KILLS" not in os.environ, reason="two minutes: make faults runs it")


class Machine:
    """A network namespace with one address, in which a launcher runs."""

    def __init__(self, number: int, folder: Path):
        self.name, self.link = f"thermaflux{os.getpid()}n{number}", f"tf{os.getpid()}n{number}"
        self.number, self.folder, self.address = number, folder, f"10.77.0.{number + 1}"

    def up(self) -> None:
        ip("link", "set", self.link, "netns", self.name)
        inside = ("netns", "exec", self.name, "ip")
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "addr", "add", f"{self.address}/24", "dev", self.link)
        ip(*inside, "link", "set", self.link, "up")

    def torchrun(self, run: Path, nodes: str = "2", pause: float = 0.0) -> subprocess.Popen:
        command = [
            *("ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={nodes}", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_id=test"),
            *("--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29500"),
            f"--rdzv_conf=is_host={int(self.number == 0)},{CONF}",
            f"--local_addr={self.address}",
            *(str(self.folder / "script.py"), str(run)),
        ]
        more = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.link,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PAUSE": str(pause),
        }
        with (self.folder / f"log{self.number}").open("a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **more}, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """Everything in it at once, as when the power fails."""
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)

    def log(self) -> str:
        return (self.folder / f"log{self.number}").read_text()


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def machines(tmp_path):
    """Two of them with a cable between; skips where this user may not make them."""
    (tmp_path / "script.py").write_text(SCRIPT)
    both = [Machine(number, tmp_path) for number in (0, 1)]
    made = []
    try:
        for machine in both:
            ip("netns", "add", machine.name)
            made.append(machine)
        ip("link", "add", both[0].link, "type", "veth", "peer", "name", both[1].link)
        for machine in both:
            machine.up()
    except OSError as error:  # also: no program called ip
        for machine in made:
            ip("netns", "del", machine.name)
        pytest.skip(f"no network namespaces here: {error}")
    yield both
    for machine in both:
        machine.kill()
        ip("netns", "del", machine.name)


def ended_well(*launchers: subprocess.Popen, logs: list[Machine]) -> None:
    codes = [launcher.wait(timeout=150) for launcher in launchers]
    assert not any(codes), "\n".join(machine.log()[-2000:] for machine in logs)


def losses(folder: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[r["step"], r["loss"], r["grad_norm"]] for r in rows if "loss" in r])


def one_process(folder: Path) -> torch.Tensor:
    train(folder, "training.steps=12", "training.save_every=2", "training.batch_size=8")
    return losses(folder)


def until_saved(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not (folder / f"checkpoint_{step:08d}.pth").exists():
        assert time.monotonic() < deadline, f"no checkpoint of step {step} after 90 s"
        time.sleep(0.05)


def test_two_machines_give_the_losses_of_one_process(machines, tmp_path):
    launchers = [machine.torchrun(tmp_path / "run") for machine in machines]
    expected = one_process(tmp_path / "one")
    ended_well(*launchers, logs=machines)
    torch.testing.assert_close(losses(tmp_path / "run"), expected)


@killing
def test_a_machine_that_is_killed_and_comes_back_changes_no_loss(machines, tmp_path):
    first, second = machines
    survivor, killed = (m.torchrun(tmp_path / "run", pause=0.3) for m in machines)
    until_saved(tmp_path / "run", 4)
    second.kill()
    killed.wait()
    back = second.torchrun(tmp_path / "run")
    ended_well(survivor, back, logs=machines)
    assert "resumed from" in first.log()
    torch.testing.assert_close(losses(tmp_path / "run"), one_process(tmp_path / "one"))


@killing
def test_the_others_go_on_without_a_machine_that_does_not_come_back(machines, tmp_path):
    first, second = machines
    survivor, killed = (m.torchrun(tmp_path / "run", nodes="1:2", pause=0.3) for m in machines)
    until_saved(tmp_path / "run", 4)
    second.kill()
    killed.wait()
    ended_well(survivor, logs=[first])
    assert "was 2 x 4 x 1, is now 1 x 4 x 1" in first.log()
    state = checkpoint.load(checkpoint.latest(tmp_path / "run"))["state"]
    assert state["step"] == 12
