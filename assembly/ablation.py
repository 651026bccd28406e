"""The configuration of ablate.py: stages, and variants of them that differ in a few values."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.schema import (
    FLAGS,
    USE_FLAGS,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    TrainConfig,
)
from utils import config
from utils.problems import Checked, sentences_of
from utils.trackers import write_hparams

# script -> its configuration, its short flags, the file it reads where none is named
SCRIPTS = {
    "pretrain.py": (PretrainConfig, FLAGS, "configs/pretrain.yaml"),
    "train.py": (TrainConfig, FLAGS, "configs/train.yaml"),
    "finetune.py": (FinetuneConfig, FLAGS, "configs/finetune.yaml"),
    "evaluate.py": (EvaluateConfig, USE_FLAGS, None),
}
NAME = re.compile(r"[\w.-]+")  # names of stages and variants become folders
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")  # {} and {a: 1} are values, no placeholders


@dataclass(kw_only=True)
class StageConfig:
    """One command of every variant; `{seed}` and `{other_stage}` (its folder) are filled in."""

    script: str  # pretrain.py, train.py, finetune.py or evaluate.py
    config: str | None = None  # null: the script's own default
    overrides: list[str] = field(default_factory=list)  # as on the command line


@dataclass(kw_only=True)
class AblateConfig(Checked):
    """A grid: every variant with every seed, its stages one after the other.

    Training scripts get training.seed; later overrides win: stage, common, variant.
    """

    stages: dict[str, StageConfig]  # run in this order
    # overrides of each variant: a list for the first stage, or stage: list
    variants: dict[str, list[str] | dict[str, list[str]]]
    overrides: list[str] = field(default_factory=list)  # for every training stage, e.g. data.path
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    columns: list[str] = field(default_factory=list)  # columns of the table; none: the usual ones
    output_dir: str = "runs/ablate"
    jobs: int = 1  # number of runs at once
    dry_run: bool = False  # print the commands, run nothing

    def problems(self) -> Iterator[str]:
        if not self.stages or not self.variants:
            yield "stages and variants need at least one entry each"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield f"seeds must be different numbers, at least one, got {self.seeds}"
        if self.jobs < 1:
            yield f"jobs must be at least 1, got {self.jobs}"
        for name in (*self.stages, *self.variants):
            if not NAME.fullmatch(name):
                yield f"{name!r} becomes a folder: letters, digits, . _ - only"
        for name, stage in self.stages.items():
            if stage.script not in SCRIPTS:
                yield (
                    f"stages.{name}.script is {stage.script!r}, must be one of {', '.join(SCRIPTS)}"
                )
        for name, changes in self.variants.items():
            stages = changes if isinstance(changes, dict) else {}
            if unknown := [stage for stage in stages if stage not in self.stages]:
                yield (
                    f"variants.{name} changes the stage {unknown[0]!r}; the stages are"
                    f" {', '.join(self.stages)}"
                )


def command_of(
    cfg: AblateConfig, stage: str, variant: str, seed: int, folders: dict[str, str]
) -> list[str]:
    """The script of a stage and its arguments, without --output_dir.

    Args: folders: earlier stage -> its folder in this run.
    Raises: ValueError: a placeholder that does not exist, or values that the script would refuse.
    """
    chosen, changes = cfg.stages[stage], changes_of(cfg, variant)
    kind, flags, default = SCRIPTS[chosen.script]
    trains = flags is FLAGS
    common = [*cfg.overrides, f"training.seed={seed}"] if trains else []
    known = {"seed": str(seed), **folders}

    def filled(text: str) -> str:
        for name in PLACEHOLDER.findall(text):
            if name not in known:
                raise ValueError(
                    f"variant {variant}, stage {stage}: {{{name}}} in {text!r} is no"
                    f" placeholder; known are {', '.join(f'{{{k}}}' for k in known)}"
                )
        return PLACEHOLDER.sub(lambda match: known[match[1]], text)

    file = ["--config", chosen.config] if chosen.config else []
    arguments = [*file, *chosen.overrides, *common, *changes.get(stage, [])]
    arguments = [filled(text) for text in arguments]
    try:
        loaded: Any = config.load(kind, arguments, flags, default, starts=False)
    except ValueError as error:
        reasons = "; ".join(sentences_of(error))
        raise ValueError(f"variant {variant}, stage {stage}: {reasons}") from error
    if trains and loaded.training.seed != seed:
        raise ValueError(f"variant {variant}, stage {stage} sets training.seed; use `seeds`")
    if trains and any(x.startswith(("run.output_dir=", "--output_dir")) for x in arguments):
        raise ValueError(
            f"variant {variant}, stage {stage} sets the folder; use --output_dir of ablate.py"
        )
    return [chosen.script, *arguments]


def changes_of(cfg: AblateConfig, variant: str) -> dict[str, list[str]]:
    """stage -> the overrides of a variant."""
    changes = cfg.variants[variant]
    return {next(iter(cfg.stages)): changes} if isinstance(changes, list) else changes


def write_board(
    cfg: AblateConfig, values: dict[tuple[str, int], dict[str, float]], columns: list[str]
) -> None:
    """TensorBoard's table of hyperparameters for the runs (variant, seed) that finished."""
    runs = {}
    for (variant, seed), found in values.items():
        settings: dict[str, str | float] = {"variant": variant, "seed": seed}
        for stage, overrides in changes_of(cfg, variant).items():
            pairs = [text.partition("=") for text in overrides if "=" in text]
            settings |= {f"{stage}/{key.lstrip('-')}": value for key, _, value in pairs}
        results = {name: found[name] for name in columns if name in found}
        runs[f"{variant}_seed_{seed}"] = settings, results
    folder = Path(cfg.output_dir) / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # the table of an earlier call had fewer runs
    write_hparams(folder, runs)


def with_files(arguments: list[str]) -> list[str]:
    """A command with the contents of the file after --config: another file is another run."""
    files = [x for flag, x in pairwise(arguments) if flag == "--config" and Path(x).is_file()]
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] for file in files]
    return [*arguments, *(f"{file} with sha256 {h}" for file, h in zip(files, hashes))]


def read_json(path: Path) -> dict:
    """{} where there is no file. Raises: ValueError: damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to run this again") from None


def cell(mean: float | None, std: float | None, values: list) -> str:
    """`0.812 ± 0.004`, fewer decimals for large numbers; - where nothing was measured."""
    if mean is None:
        return "-"
    digits = 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
