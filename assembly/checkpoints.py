"""From a checkpoint of any stage back to its configuration and model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assembly.bundle import is_bundle, read_bundle
from baselines.networks import Pix2Pix, Unet
from baselines.networks import build as build_baseline
from baselines.training import BaselineConfig
from configs.schema import (
    FinetuneConfig,
    HeldOutConfig,
    ModelUseConfig,
    PretrainConfig,
    TrainConfig,
)
from data.materials import TABLES
from data.pairs import DataConfig, Pairs, open_pairs
from data.pseudo_labels import LabelConfig
from models.fast.plan import Plan, build, speed_up_stage1
from models.flux import Prompt
from models.sampler import SamplingConfig, untrained_mode
from models.stage1 import Stage1
from models.translator import PathConfig, Translator, TranslatorConfig
from utils import checkpoint, config, dist
from utils.problems import refuse


def file_of(path: str | Path) -> Path:
    """The checkpoint that a path names: the file, or the best model in a run's folder.

    In a folder whose best model is damaged it is the newest intact checkpoint, with a note.
    Raises: ValueError: there is none, or the file is damaged and another one beside it is not.
    """
    path = Path(path)
    if (path / "thermaflux.json").is_file():
        raise ValueError(
            f"{path} was exported by an earlier version; export its run again: export.py"
        )
    if path.is_dir():
        best = path / "best_model.pth"
        if best.is_file() and not (damage := checkpoint.damaged(best)):
            return best
        found = checkpoint.newest(path)
        if found and best.is_file():
            dist.print0(f"passing over {best}, which is damaged ({damage}): using {found[0]}")
        path = found[0] if found else best
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; train.py and pretrain.py write them")
    if (damage := checkpoint.damaged(path)) and (found := checkpoint.newest(path.parent)):
        raise ValueError(
            f"checkpoint {path} is damaged: {damage}; use {found[0]}, the newest intact one"
        )
    return path


def read(
    path: str | Path,
) -> tuple[PretrainConfig | TrainConfig | BaselineConfig, dict[str, Tensor]]:
    """Configuration and trained tensors of a checkpoint, a run's folder or an exported folder.

    Raises: ValueError: there is no such file, it is damaged, or not of this project.
    """
    path = Path(path)
    raw: Any
    if is_bundle(path):
        raw, state = read_bundle(path)
    else:
        path = file_of(path)
        parts = checkpoint.load(path)
        raw, state = parts.get("config"), parts["model"]
    whole = isinstance(raw, dict) and all(isinstance(raw.get(k), dict) for k in ("model", "data"))
    if not whole:
        raise ValueError(f"{path} holds no configuration: it is no checkpoint of this project")
    kind: type[PretrainConfig | TrainConfig | BaselineConfig]
    if "baseline" in raw["model"]:
        kind = BaselineConfig
    elif "inject" not in raw["model"]:
        kind = PretrainConfig
    else:
        kind = FinetuneConfig if "checkpoint" in raw else TrainConfig
    raw["data"].setdefault("aspect", "squash")  # what every run did before this key existed
    return config.from_dict(kind, raw, f"in {path}"), state


def script_of(cfg: PretrainConfig | TrainConfig | BaselineConfig) -> str:
    """The script that wrote a checkpoint with this configuration."""
    if isinstance(cfg, BaselineConfig):
        return f"baselines/{cfg.model.baseline}.py"
    return "train.py" if isinstance(cfg, TrainConfig) else "pretrain.py"


def load_stage1(path: str | Path) -> tuple[Stage1, PretrainConfig]:
    """Stage 1's network with its weights, and how it was trained.

    Raises: ValueError: not a checkpoint of pretrain.py, or of another architecture.
    """
    cfg, state = read(path)
    if not isinstance(cfg, PretrainConfig):
        raise ValueError(
            f"{path} is a checkpoint of {script_of(cfg)}; stage 1 is trained by pretrain.py"
        )
    # a run that started from ImageNet weights must not fetch them again to be read back
    stage1 = Stage1(replace(cfg.model, pretrained="none"), cfg.physics)
    checkpoint.load_into(stage1, state, path)
    return stage1, cfg


def new_translator(cfg: TrainConfig, device: torch.device) -> tuple[Translator, Plan]:
    """The translator that stage 2 starts from: FLUX as configured, guided by a trained stage 1.
    And how it runs.

    Fills cfg.model.decomposition and cfg.model.physics.
    Raises: ValueError: the stage 1 checkpoint does not fit.
    """
    assert cfg.model.decomposition_checkpoint, "loading the configuration checks that"
    torch.manual_seed(cfg.training.seed)  # the same random start on every rank
    stage1, pretrained = load_stage1(cfg.model.decomposition_checkpoint)
    decided = {"physics": pretrained.physics, "decomposition": stage1.decomposition.cfg}
    for name, value in decided.items():
        if getattr(cfg.model, name) not in (value, getattr(TranslatorConfig(), name)):
            raise ValueError(
                f"model.{name} is decided by model.decomposition_checkpoint"
                f" {cfg.model.decomposition_checkpoint}; leave it out"
            )
    if cfg.model.preset in ("demo", "small") and not cfg.model.train_base:
        dist.print0(
            f"note: model.preset={cfg.model.preset} is random and its last layer zero: with"
            " model.train_base=false nothing is learnt"
        )
    cfg.model.decomposition = stage1.decomposition.cfg
    cfg.model.physics = pretrained.physics
    return build(cfg.model, stage1, device=device, path=path_of(cfg))


def path_of(cfg: TrainConfig) -> PathConfig:
    """Where the flow of a run starts."""
    return PathConfig(start=cfg.flow.start, sigma=cfg.flow.sigma)


class Loaded(NamedTuple):
    """A trained model, how it was trained, and how it runs here."""

    translator: Translator
    trained: TrainConfig
    plan: Plan


def load_translator(
    path: str | Path,
    device: torch.device,
    sampling: bool = False,
    sample_fast: str | None = None,
    **changes: Any,
) -> Loaded:
    """A trained translator and its configuration, some values of `model` changed.

    Args:
        sampling: it will not be trained; an fp8 base then takes its adapters in.
        sample_fast: auto or off; None: as it was trained. Off, a base that was rounded is bf16.
    Raises: ValueError: not a checkpoint of stage 2 or 3, or it does not fit.
    """
    cfg, state = read(path)
    if not isinstance(cfg, TrainConfig):
        raise ValueError(f"{path} is a checkpoint of {script_of(cfg)}; this needs one of train.py")
    cfg.model = replace(cfg.model, **changes)
    cfg.model = replace(cfg.model, **_how_fast(cfg.model, sample_fast))
    if lacking := [name for name in ("prompt.tokens", "prompt.pooled") if name not in state]:
        raise ValueError(f"{path} holds no prompt embedding: it lacks {' and '.join(lacking)}")
    torch.manual_seed(cfg.training.seed)  # a random FLUX that is not trained is drawn as it was
    stage1 = Stage1(replace(cfg.model.decomposition, pretrained="none"), cfg.model.physics)
    prompt = Prompt(state["prompt.tokens"], state["prompt.pooled"])
    adapters = state if sampling else None
    translator, plan = build(cfg.model, stage1, prompt, device, adapters, path_of(cfg))
    checkpoint.load_into(translator, state, path)
    return Loaded(translator, cfg, plan)


def _how_fast(model: TranslatorConfig, fast: str | None) -> dict[str, Any]:
    """What to change for a model to sample as `fast` says."""
    if fast is None:
        return {}
    if fast == "auto":
        return {"fast": "auto"}
    rounded = (model.base_dtype or "").startswith("fp8")
    return {"fast": "off", "compile": False, "base_dtype": None if rounded else model.base_dtype}


def load_any(
    path: str | Path, device: torch.device, fast: str | None = None
) -> tuple[
    Stage1 | Unet | Pix2Pix, Translator | None, PretrainConfig | TrainConfig | BaselineConfig
]:
    """Stage 1's or a baseline's network, the translator (None for these) and the run's values.

    Everything is on the device and in eval mode. Raises: ValueError: see `read`.
    """
    cfg, state = read(path)
    if isinstance(cfg, BaselineConfig):
        network = build_baseline(cfg.model)
        checkpoint.load_into(network, state, path)
        return network.to(device).eval(), None, cfg
    if isinstance(cfg, PretrainConfig):
        stage1 = load_stage1(path)[0].to(device).eval()
        dist.print0(speed_up_stage1(stage1, fast or cfg.fast))
        return stage1, None, cfg
    translator, cfg, plan = load_translator(path, device, sampling=True, sample_fast=fast)
    dist.print0(plan)
    return translator.eval().stage1, translator, cfg


def sampling_of(trained: TrainConfig, use: ModelUseConfig) -> SamplingConfig:
    """How the run sampled, changed by what the user asked for.

    Raises: ValueError: the model was not trained for what is asked.
    """
    names = ("mode", "steps", "guidance_scale", "shift", "samples", "mirror", "seed")
    asked = {name: getattr(use, name) for name in names}
    chosen = replace(trained.sampling, **{name: x for name, x in asked.items() if x is not None})
    refuse(untrained_mode(chosen, trained.flow.mean_share))
    return chosen


class Opened(NamedTuple):
    """The model and data that evaluate.py and visualize.py work on."""

    stage1: Stage1 | Unet | Pix2Pix  # a baseline's network where the checkpoint is one's
    translator: Translator | None  # None for a stage 1 checkpoint
    trained: PretrainConfig | TrainConfig | BaselineConfig  # the run's configuration
    data: DataConfig  # the run's data, nothing kept in memory
    pairs: Pairs  # the pairs to look at
    sampling: SamplingConfig | None


def open_all(cfg: HeldOutConfig, device: torch.device) -> Opened:
    """Model and held-out pairs. Raises: ValueError: see `read` and `open_pairs`."""
    stage1, translator, trained = load_any(cfg.checkpoint, device, cfg.fast)
    data = replace(trained.data, cache="none", latents=None, num_workers=cfg.num_workers)
    data = replace(data, aspect=cfg.aspect or data.aspect)
    held = data
    if cfg.test_data:
        held = replace(data, path=cfg.test_data, labels=_labels_of(cfg.test_data, cfg.split, data))
    pairs = open_pairs(held, cfg.split)
    window = getattr(trained, "window", None)
    if window and pairs.window and window != [pairs.window.low, pairs.window.high]:
        pairs.notes.append(
            f"these pairs are read through their own window, {pairs.window.low:g} to"
            f" {pairs.window.high:g} {pairs.window.unit}; the model was trained with {window[0]:g}"
            f" to {window[1]:g}, so its levels stand for other values: compare rank corr. and SSIM"
        )
    sampling = sampling_of(trained, cfg) if isinstance(trained, TrainConfig) else None
    return Opened(stage1, translator, trained, data, pairs, sampling)


def _labels_of(path: str, split: str, data: DataConfig) -> LabelConfig:
    """The training's labels, with the class table of the foreign data where it has another."""
    if data.labels.material_source not in TABLES:
        return data.labels
    bare = replace(data, path=path, labels=replace(data.labels, material_source="none"))
    table = open_pairs(bare, split).source.table
    return replace(data.labels, material_source=table) if table else data.labels
