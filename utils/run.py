"""The run directory (resolved config, command, commit, curves) and how a script starts and ends.

runs/x/  config.yaml  command.txt  commit.txt  code.diff  metrics.jsonl  events.out.tfevents.*
         run.lock (locked while a process writes here; names it)
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np
import torch

from utils import config, dist, trackers
from utils.problems import Checked, Problems


@dataclass(kw_only=True)
class RunConfig(Checked):
    output_dir: str = "runs/default"
    resume: str | None = None  # a checkpoint or a folder of them; null: the newest in output_dir
    dry_run: bool = False  # print config, sizes and the memory of one step, then stop
    device: str = "auto"  # auto, cpu or cuda
    images: int = 4  # scenes drawn at every evaluation
    deterministic: bool = False  # on a GPU: the same bits in every run, with slower kernels
    timeout: float = 1800.0  # seconds that a rank waits for the others before the run ends
    # in addition to metrics.jsonl; wandb needs the extra [wandb]
    report_to: list[Literal["tensorboard", "wandb"]] = field(
        default_factory=lambda: ["tensorboard"]
    )

    def problems(self) -> Iterator[str]:
        if not self.output_dir.strip():
            yield "output_dir is empty; name a folder"
        if not 1 <= self.timeout <= 10**6:
            yield f"timeout must be 1 to 1,000,000 seconds, got {self.timeout}"

    def obstacles(self) -> Iterator[str]:
        if self.resume is not None and not Path(self.resume).exists():
            yield f"run.resume is {self.resume}, but there is no such file or folder"
        yield from (f"run.{sentence}" for sentence in trackers.missing([*self.report_to]))


class Run:
    """Writes one run's directory from rank 0; on other ranks every method does nothing.

    The directory is created with the first thing written to it, so that a run which stops at a
    wrong argument leaves nothing behind.
    """

    def __init__(self, directory: str | Path, cfg: Any):
        self.dir = Path(directory)
        self.cfg = cfg
        self.described = False  # whether config, command and commit are written
        self._first: int | None = None  # trackers drop what they have from this step on
        self._trackers: list[trackers.Tracker] = []
        self._lock: IO[str] | None = None

    def start(self, step: int | None = None) -> None:
        """Describe the run; drop the rows after `step` that an earlier start wrote (None: none).

        Raises: ValueError: another process writes to this folder. OSError: it cannot be written.
        """
        self.described = True
        if dist.is_main():
            self._describe(step)

    def _describe(self, step: int | None) -> None:
        self._take_lock()
        (self.dir / "config.yaml").write_text(config.to_yaml(self.cfg), encoding="utf-8")
        with open(self.dir / "command.txt", "a", encoding="utf-8") as file:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(
                f"# {when}, from step {step or 0}, {dist.world_size()} process(es)\n"
                f"{command_line()}\n"
            )
        commit, diff = code_version()
        (self.dir / "commit.txt").write_text(commit + "\n", encoding="utf-8")
        (self.dir / "code.diff").write_text(diff, encoding="utf-8")
        if step is not None:
            self._first = step + 1 if step else 0
            _drop_rows_after(self.dir / "metrics.jsonl", step)

    def log(self, step: int, **scalars: Any) -> None:
        """One row of numbers (or tensors of one element) to metrics.jsonl and run.report_to."""
        if not dist.is_main():
            return
        values = {name: float(value) for name, value in scalars.items()}
        opened = self._opened()
        # JSON has no NaN; a PSNR of identical images is infinite
        row = {name: x if math.isfinite(x) else None for name, x in values.items()}
        with open(self.dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for tracker in opened:
            tracker.scalars(step, values)

    def image(self, step: int, tag: str, array: Any) -> None:
        """One picture (H, W, 3), uint8 or float in [0, 1], to run.report_to."""
        if dist.is_main():
            for tracker in self._opened():
                tracker.image(step, tag, np.asarray(array))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        if self._lock:
            self._lock.truncate(0)  # an orderly end: the next run finds no stale holder
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        if self._lock is None:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.dir)

    def _opened(self) -> list[trackers.Tracker]:
        """The trackers, opened again if a row comes after `close`."""
        if not self.described:
            self.start()
        self._take_lock()
        if not self._trackers:
            names = self.cfg.run.report_to
            if "tensorboard" in names:
                text = config.to_yaml(self.cfg)
                self._trackers.append(trackers.TensorBoard(self.dir, self._first, text))
            if "wandb" in names:
                fresh = self._first == 0
                values = config.to_dict(self.cfg)
                self._trackers.append(trackers.Wandb(self.dir, fresh, values))
            self._first = None  # once: they may be closed and opened again
        return self._trackers


def lock_folder(folder: Path) -> IO[str]:
    """Lock `folder` for this process; closing the returned file, or the process's end, unlocks it.

    A POSIX lock: forked workers do not inherit it, and network file systems that lock see it.

    Raises: ValueError: another process has it. OSError: the folder cannot be written.
    """
    path = folder / "run.lock"
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115, it stays open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            dist.print0(f"{path} cannot be locked here ({error}): start no second run in {folder}")
            return file
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "an unknown process"
        file.close()
        raise ValueError(
            f"{folder} is in use by {holder}; end that run or choose another run.output_dir"
        ) from None
    file.seek(0)
    if stale := " ".join(file.read(200).split()):
        dist.print0(f"{path} is stale: {stale} ended without releasing it")
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
    file.flush()
    return file


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows up to `step`; at step 0 none, since nothing of that attempt was kept."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step] if step > 0 else []
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl without damaged ones, which a killed process may leave."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def command_line() -> str:
    """How this process was started, as one would type it."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def code_version() -> tuple[str, str]:
    """(commit, uncommitted changes) of this repository; ("unknown", "") without git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, timeout=30, check=True
        )
        return done.stdout.decode("utf-8", errors="replace")

    try:
        untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
        diff = git("diff", "--no-ext-diff", "HEAD")
        return git("rev-parse", "HEAD").strip(), diff + "".join(
            f"# untracked: {name}\n" for name in untracked
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown", ""


def entry(main: Callable[[], None]) -> None:
    """Run a script's `main`. Errors that the user can fix end in one line and exit code 2.

    ValueError and OSError are printed as `error: ...` without a traceback, several `Problems` as a
    numbered list, unless the environment has THERMAFLUX_TRACEBACK=1. Anything else is a bug of
    ours and keeps its traceback. torchrun's own summary shows the same.
    """
    if "RANK" not in os.environ and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, partial(_end_in_order, os.getpid()))
    try:
        main()
    except Problems as error:
        _refuse(str(error), error)
    except (ValueError, OSError) as error:
        _refuse(" ".join(str(error).split()), error)
    except torch.OutOfMemoryError as error:
        _refuse(out_of_memory(error), error)
    except RuntimeError as error:
        if (sentence := dist.lost_ranks(error)) is None:
            _tell_launcher("".join(traceback.format_exception(error)))
            raise
        _refuse(sentence, error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as stop:
        if not stop.code:
            dist.close()
        raise
    dist.close()


def _end_in_order(owner: int, number: int, frame: Any) -> None:
    """At SIGTERM: unwind the stack, so that temporary files are deleted. Workers end at once."""
    if os.getpid() != owner:
        os._exit(128 + number)
    raise SystemExit(128 + number)


def _refuse(sentence: str, error: Exception) -> NoReturn:
    """Print what is wrong, tell the launcher, and end with code 2.

    Without dist.close(): the other ranks may be in a collective; torchrun ends them.
    """
    if os.environ.get("THERMAFLUX_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    who = f" (rank {dist.rank()})" if dist.world_size() > 1 else ""
    sys.stderr.write(f"error{who}: {sentence}\n")  # in one piece: other ranks write here too
    _tell_launcher(f"error: {sentence}")
    sys.stdout.flush()
    if dist.world_size() > 1:
        os._exit(2)  # threads of a collective that never ends would keep the process
    raise SystemExit(2) from None


def _tell_launcher(message: str) -> None:
    """Fill the file that torchrun reads for its summary; it names the rank that failed first."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": text}), encoding="utf-8")


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """What to try, in one sentence."""
    reason = " ".join(str(error).split()).split(" GPU ")[0]
    return (
        f"the GPU has too little memory ({reason}); lower the batch size, or choose a smaller"
        " preset: model.memory=48g or 24g, or model.shard_base=true over several GPUs"
    )
