"""Every command that README.md and docs/*.md show: found, read as its program would, and run.

    python -m tests.documented_commands   runs each at toy size, or says why not (make docs-check)

tests/test_docs.py does the cheap part: every script, option, key, target and file exists.
"""

import argparse
import importlib
import io
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import yaml
from PIL import Image
from torch.distributed.run import get_args_parser

from data.synthetic import render_scene
from tests.conftest import ROOT
from utils import config

PROGRAMS = "docker hf kubectl make mkdocs pip pytest python python3 sbatch tensorboard torchrun"
STARTS = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?({'|'.join(PROGRAMS.split())}) ")
SPAN = re.compile(r"`([^`\n]+)`")
SIZES = ["data.size=32", "data.num_workers=0", "training.steps=2", "training.batch_size=2"]
OFTEN = ["training.log_every=1", "training.eval_every=0", "training.save_every=0", "run.images=1"]
TOY = {  # what a script's command gets in addition, so that it takes seconds on a CPU
    "pretrain.py": ["--config", "configs/demo/pretrain.yaml", "model.width=8", *SIZES, *OFTEN],
    "train.py": ["--config", "configs/demo/train.yaml", *SIZES, *OFTEN],
    "finetune.py": ["--config", "configs/demo/finetune.yaml", *SIZES, *OFTEN],
}
NEEDS = {  # a script and what only some machines have
    "ablate.py": "trains every variant; tests/test_ablate.py runs it small",
    "app.py": "serves until it is stopped; make test-app opens it",
    "benchmarks/loader.py": "make bench runs it",
    "compare.py": "trains every method; tests/test_compare.py runs it small",
    "downstream.py": "needs annotated boxes; tests/test_downstream.py runs it small",
    "export.py": "tests/test_export.py runs it",
    "leaderboard.py": "writes into this checkout; tests/test_peers.py runs it",
}
PROGRAM_NEEDS = {
    "docker": "needs a container engine",
    "hf": "needs an account on the hub",
    "kubectl": "needs a cluster",
    "make": "runs what other commands here run; CI runs make lint, test and test-app",
    "mkdocs": "builds the site into this checkout",
    "pip": "installs into the environment it runs in",
    "python3": "makes an environment",
    "pytest": "make test runs it",
    "sbatch": "needs a cluster",
    "tensorboard": "serves until it is stopped",
}


class Command(NamedTuple):
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def found() -> list[Command]:
    """All commands, in the order of the pages; one with `...` in it is a pattern, not a command."""
    return [command for page in pages() for command in of_page(page)]


def of_page(page: Path) -> Iterator[Command]:
    name, inside, kept = str(page.relative_to(ROOT)), False, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        if inside:
            kept = (kept + line.strip()).removesuffix("\\")
            if not line.endswith("\\"):
                if STARTS.match(kept + " "):
                    yield Command(name, number, kept)
                kept = ""
            continue
        for span in SPAN.findall(line):
            if STARTS.match(span) and "..." not in span:
                yield Command(name, number, span)


def words_of(command: Command) -> tuple[dict[str, str], list[str]]:
    """Variables that are set for it, and its words; the program without a folder."""
    words = shlex.split(command.text, comments=True)
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    for separator in ("&&", ";", "|"):
        if separator in words:
            words = words[: words.index(separator)]
    return variables, [words[0].removeprefix(".venv/bin/"), *words[1:]]


class _Read(Exception):
    """The script has read its arguments."""


def check(command: Command) -> None:
    """Raises: an error if the program, its options or what they name do not exist."""
    _, (program, *words) = words_of(command)
    if program in ("python", "python3", "torchrun"):
        script = script_of(program, words)
        if script:
            _check_script(*script)
    elif program == "make":
        targets = re.findall(r"^([a-z./-]+):", (ROOT / "Makefile").read_text(), re.M)
        unknown = [w for w in words if "=" not in w and w not in targets]
        assert not unknown, f"no target {unknown} in the Makefile"
    elif program == "pip":
        setup = (ROOT / "setup.py").read_text()
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert all(f'"{name}": [' in setup for name in extra.split(",")), extra
    elif program == "sbatch":
        assert (ROOT / words[0]).is_file(), words[0]
        _check_script(words[1], words[2:])
    elif program == "kubectl":
        list(yaml.safe_load_all((ROOT / words[words.index("-f") + 1]).read_text()))
    elif program == "pytest":
        for word in words:
            assert word.startswith("-") or (ROOT / word.partition("::")[0]).exists(), word


def script_of(program: str, words: list[str]) -> tuple[str, list[str]] | None:
    """The script that python or torchrun is asked for and its arguments; None: a module."""
    if program == "torchrun":
        if all(word.startswith("-") for word in words):
            words = [*words, "train.py"]  # a sentence about an option of torchrun
        asked = get_args_parser().parse_args(words)
        return asked.training_script, asked.training_script_args
    return None if words[0].startswith("-") else (words[0], words[1:])


def _check_script(script: str, words: list[str]) -> None:
    """Let the script read its arguments, and go no further."""
    assert (ROOT / script).is_file(), f"no {script}"
    with _stop_after_reading():
        try:
            _call(script, words)
        except _Read:
            return
        except SystemExit as end:
            if end.code:  # else of --help and --completion
                raise
            return
    raise AssertionError(f"{script} has read no arguments")


@contextmanager
def _stop_after_reading() -> Iterator[None]:
    def then_stop(read):
        def reading(*args, **kwargs):
            read(*args, **kwargs)
            raise _Read

        return reading

    parse = argparse.ArgumentParser.parse_args
    with (
        mock.patch.object(config, "load", then_stop(partial(config.load, starts=False))),
        mock.patch.object(argparse.ArgumentParser, "parse_args", then_stop(parse)),
    ):
        yield


# what `make docs-check` does besides


def reason_not_to_run(command: Command) -> str | None:
    """Why a command is only checked; None: it is run at toy size."""
    _, (program, *words) = words_of(command)
    if program in PROGRAM_NEEDS:
        return PROGRAM_NEEDS[program]
    script = script_of(program, words)
    if script is None or all(word.startswith("-") for word in words):
        return "no script of this repository"
    if "--help" in words or "--completion" in words:
        return "prints and ends"
    if "shared/" in command.text or "HOST" in command.text:
        return "needs several machines; tests/faults/test_nodes.py runs two"
    if command.page == "docs/leaderboard.md":
        return "takes minutes: the page was made by it"
    if "memory=24g" in command.text:
        return "needs the 12 B model on GPUs"
    return NEEDS.get(script[0])


def run(command: Command, folder: Path) -> str | None:
    """The command at toy size, by this process on the CPU, in `folder`; what went wrong, if so."""
    _, (program, *words) = words_of(command)
    script, words = script_of(program, words)
    if script == "prepare.py":
        more = ["--overwrite"] if "--out" in words else []
    else:
        more = ["--device=cpu"]
    if script in TOY:
        file = f"configs/{script.removesuffix('.py')}.yaml"
        if "--config" in words:
            place = words.index("--config")
            file = words[place + 1]
            del words[place : place + 2]
        more += [*TOY[script], *_paths_in(ROOT / file, words)]
    printed, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            _call(script, [*words, *more])
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}\n{printed.getvalue()[-600:]}"
    finally:
        os.chdir(before)
    return None


def _call(script: str, words: list[str]) -> None:
    """The script's main, as if `python SCRIPT WORDS` had been typed."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with mock.patch.object(sys, "argv", [script, *words]):
        module.main()


def _paths_in(file: Path, words: list[str]) -> list[str]:
    """What the file that the page means says of folders, where the command itself does not."""
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    values = {
        "--output_dir": raw["run"]["output_dir"],
        "--decomposition_checkpoint": raw["model"].get("decomposition_checkpoint"),
        "--checkpoint": raw.get("checkpoint"),
    }
    given = {flag: value for flag, value in values.items() if value and flag not in words}
    return [word for pair in given.items() for word in pair]


def make_toy(folder: Path) -> None:
    """A folder in which the pages' paths mean something: configs, photographs, pairs and boxes."""
    (folder / "configs").symlink_to(ROOT / "configs")
    places = ("photos/rgb", "photos/ir", "photos/new", "boxes", "FOLDER/visible", "FOLDER/infrared")
    for place in places:
        (folder / place).mkdir(parents=True)
    for index in range(12):
        scene = render_scene(0, index, 48)
        new = ["photos", "photos/new"] if index < 2 else []
        for name in ("photos/rgb", "FOLDER/visible", *new):
            Image.fromarray(_as_bytes(scene.visible)).save(folder / name / f"{index}.png")
        for name in ("photos/ir", "FOLDER/infrared"):
            Image.fromarray(_as_bytes(scene.infrared)).save(folder / name / f"{index}.png")
        (folder / "boxes" / f"{index}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    prepare = Command("", 0, "python prepare.py --folder FOLDER --out datasets/other")
    wrong = run(prepare, folder)
    assert not wrong, wrong


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return (values * 255).round().astype(np.uint8)


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_toy(folder)
        for command in found():
            check(command)
            reason, begin = reason_not_to_run(command), time.monotonic()
            wrong = None if reason else run(command, folder)
            result = f"ran, {time.monotonic() - begin:.0f} s"
            if reason:
                result = f"checked, not run: {reason}"
            elif wrong:
                failed += 1
                result = f"FAILED: {wrong}"
            print(f"{command}\n    {result}", flush=True)
    print(f"{failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
