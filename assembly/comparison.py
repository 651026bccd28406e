"""Methods that are compared at equal training times: their commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.problems import Checked

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(kw_only=True)
class CompareConfig(Checked):
    """compare.py. A step is `SHARE SCRIPT ARGUMENTS`; {before} is the folder of the step before."""

    methods: dict[str, list[str]] = field(default_factory=dict)
    common: list[str] = field(default_factory=list)  # arguments of every training command
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    seconds: float = 300.0  # training time per method on one device, compilation included
    data_path: str = "synthetic"
    output_dir: str = "runs/compare"
    device: str = "auto"
    boxes: str | None = None  # see evaluate.py
    evaluate: list[str] = field(default_factory=list)  # more arguments of evaluate.py
    only: str | None = None  # train only this method
    seed: int | None = None  # train only with this seed
    train: bool = True  # false: only write the table

    def problems(self) -> Iterator[str]:
        for name in self.methods:
            if not NAME.fullmatch(name):
                yield f"{name!r} becomes a folder: letters, digits, . _ - only"
        if not self.methods:
            yield "methods names none"
        if self.only is not None and self.only not in self.methods:
            yield f"only is {self.only}, methods are {', '.join(self.methods)}"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield f"seeds must be different numbers, at least one, got {self.seeds}"
        if self.seconds <= 0:
            yield f"seconds must be above 0, got {self.seconds:g}"
        for name, steps in self.methods.items():
            try:
                shares = [float(step.split()[0]) for step in steps]
            except (ValueError, IndexError):
                yield f"{name}: a step is `SHARE SCRIPT ARGUMENTS`, got {steps}"
                continue
            if abs(sum(shares) - 1) > 1e-6 or min(shares, default=0) <= 0:
                yield f"{name}: the shares of its steps must add up to 1, got {shares}"


def commands_of(cfg: CompareConfig, name: str, seed: int) -> list[list[str]]:
    """What trains and evaluates a method, in order."""
    folder, commands, before = Path(cfg.output_dir) / name / f"seed_{seed}", [], ""
    for i, step in enumerate(cfg.methods[name], 1):
        share, script, *arguments = shlex.split(step)
        last = folder / f"{i}_{Path(script).stem}"
        arguments = [x.replace("{before}", before) for x in [*arguments, *cfg.common]]
        budget = [f"training.max_seconds={float(share) * cfg.seconds:g}", "training.steps=0"]
        where = ["--data_path", cfg.data_path, "--output_dir", str(last), "--device", cfg.device]
        commands.append([script, *arguments, *budget, f"training.seed={seed}", *where])
        before = str(last)
    boxes = ["--boxes", cfg.boxes] if cfg.boxes else []
    out = ["--output_dir", str(folder / "results"), "--device", cfg.device]
    commands.append(["evaluate.py", "--checkpoint", before, *out, *boxes, *cfg.evaluate])
    return commands
