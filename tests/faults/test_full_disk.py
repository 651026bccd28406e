"""A disk that is really full: a small tmpfs where mounting is allowed, else a limit on file sizes.

pytest tests/faults/test_full_disk.py
"""

import contextlib
import io
import os
import resource
import subprocess

import numpy as np
import pytest
import torch

import prepare
from assembly import bundle
from tests.faults import forks
from utils import checkpoint, files, panels
from utils.run import entry

NOISE = np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype(np.uint8)


def big_export(folder):
    state = {"w": torch.zeros(10**5)}
    bundle.save_bundle(folder / "out", state, {"model": {}}, {})


WRITERS = {
    "checkpoint": lambda folder: checkpoint.save(
        folder / "out", {"model": {"w": torch.zeros(10**5)}}
    ),
    "export": big_export,
    "data set": lambda folder: prepare.main(
        ["--synthetic", "9", "--size", "128", "--num_workers", "1", "--out", str(folder / "out")]
    ),
    "image": lambda folder: panels.save_png(folder / "out", NOISE),
    "table": lambda folder: files.write_whole(folder / "out", "x" * 400_000),
}


@pytest.fixture(params=["tmpfs", "limit"])
def full(request, tmp_path):
    """(a folder on a disk of 200 kB, what a process calls to have one)."""
    size = 200_000
    if request.param == "limit":
        yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(tmp_path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted here ({error})")
    yield tmp_path, lambda: None
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_sentence_and_no_half_file(full, write):
    folder, limit = full
    reader, writer = os.pipe()

    def work():
        limit()
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            entry(lambda: write(folder))
        os.write(writer, said.getvalue().encode()[-4000:])

    child = forks.start(work)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        said = pipe.read().splitlines()[-1]
    assert forks.status(child) == 0
    assert said.startswith("error: ") and str(folder / "out") in said, said
    assert any(word in said for word in ("No space left", "File too large", "os error")), said
    assert os.listdir(folder) == []
