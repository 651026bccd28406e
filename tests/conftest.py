"""Shared test set-up: the repository root on the path, one thread, the real pairs if present."""

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real RGB-infrared pairs, one subfolder a data set (THERMAFLUX_DATA names it)."""
    folder = Path(os.environ.get("THERMAFLUX_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "splits.json").is_file():
        pytest.skip(f"no real pairs at {folder}; set THERMAFLUX_DATA to run this test")
    return folder


LONGEST = (
    *(
        "test_stages.py",
        "test_shard.py",
        "test_kills.py",
        "test_benchmarks.py",
        "test_evaluation.py",
    ),
    *("test_compare.py", "test_ranks.py", "test_compilation.py", "test_cases.py", "test_loop.py"),
)


def pytest_collection_modifyitems(items):
    """The longest files first: no process is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_configure():
    """A shell ignores Ctrl-C for what it starts in the background; tests of signals need it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def call_main(module: str, *argv) -> None:
    """Run a script's main in this process, from the repository root, as if typed."""
    before, folder = sys.argv, Path.cwd()
    sys.argv = [f"{module}.py", *map(str, argv)]
    os.chdir(ROOT)
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = before
        os.chdir(folder)
