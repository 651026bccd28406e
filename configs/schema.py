"""The configuration of each script: one dataclass per script, composed of the parts' own."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from data.materials import NUM_MATERIALS
from data.pairs import DataConfig
from data.pseudo_labels import CONTEXT_CHANNELS
from losses.flow import BIN_NAMES
from losses.pretrain import FUSED_TERMS, IF_WEIGHTED, TERMS, PretrainLossConfig
from models.codec import check_size
from models.decomposition import DecompositionConfig
from models.flux import PRESETS
from models.sampler import SamplingConfig, untrained_mode
from models.translator import PathConfig, TranslatorConfig, contradictions
from utils import metrics
from utils.loop import TrainingConfig
from utils.optimizer import OptimizerConfig, schedule_problems
from utils.problems import Checked, Problems, missing
from utils.run import RunConfig

MOST_MEAN = 20  # limit of flow.mean: beyond it the sigmoid is 0 or 1 in fp32

# What an evaluation returns, so that a misspelt training.best_metric is caught before the first
# step. tests/test_stages.py compares it with what the evaluations of tiny runs return.
_LABELLED = ["material_ce", *metrics.ConfusionMatrix.RESULTS]
OF_MAPS = [f"val_{name}" for name in ["loss", *TERMS, *_LABELLED, *metrics.OF_INTENSITY]]
OF_FUSED = [f"val_{name}" for name in [*FUSED_TERMS, *metrics.OF_FUSED]]
OF_SAMPLES = ["val_psnr", "val_ssim"]


def _fields(kind: type, *names: str) -> tuple[str, ...]:
    """`names`, which must be fields of the dataclass `kind`."""
    unknown = set(names) - {f.name for f in fields(kind)}
    assert not unknown, f"{kind.__name__} has no {unknown}"
    return names


# What may change when a run is resumed.
HOW_DATA_ARE_READ = _fields(DataConfig, "cache", "cache_gib", "latents", "num_workers")
HOW_IT_RUNS = _fields(
    TranslatorConfig,
    "fast",
    "memory",
    "base_dtype",
    "compile",
    "gradient_checkpointing",
    "shard_base",
)
STAGE1_FILE = _fields(TranslatorConfig, "decomposition_checkpoint")  # its weights are in ours too

# The short flags people type; a script offers those whose key its configuration has.
FLAGS = {
    "data_path": "data.path",
    "output_dir": "run.output_dir",
    "device": "run.device",
    "batch_size": "training.batch_size",
    "epochs": "training.epochs",
    "max_seconds": "training.max_seconds",
    "lr": "optimizer.params.lr",
    "num_workers": "data.num_workers",
    "backbone": "model.backbone",
    "decomposition_checkpoint": "model.decomposition_checkpoint",
    "freeze_decomposition": "model.freeze_decomposition",
    "checkpoint": "checkpoint",
}

# Flags of the scripts that use a trained model; each is the name of its key.
_USED = (
    "checkpoint output_dir device fast batch_size mode steps guidance_scale shift "
    "samples mirror seed test_data split limit num_workers aspect image_path "
    "keep_aspect tile recursive format counts lpips boxes report results panels "
    "base_model push_to_hub public dry_run protocol"
)
USE_FLAGS = {name: name for name in _USED.split()}


def _unknown_best(training: TrainingConfig, given: list[str]) -> Iterator[str]:
    if training.best_metric.removeprefix("-") not in given:
        yield (
            f"training.best_metric is {training.best_metric}; this run's evaluations"
            f" give {', '.join(given)}"
        )


@dataclass(kw_only=True)
class PretrainConfig(Checked):
    """Stage 1, pretrain.py."""

    MAY_CHANGE: ClassVar = {"data": HOW_DATA_ARE_READ}

    model: DecompositionConfig = field(default_factory=DecompositionConfig)
    physics: bool = True  # off: no fusion and no loss terms that need it; the rest is bit-equal
    fast: Literal["auto", "off"] = "auto"  # off: plain convolutions, nothing from models/fast
    # compile the training step; null: only with one GPU, where BatchNorm needs no other process
    compile: bool | None = None
    data: DataConfig = field(default_factory=DataConfig)
    loss: PretrainLossConfig = field(default_factory=PretrainLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/pretrain"))

    def problems(self) -> Iterator[str]:
        yield from schedule_problems(self)
        if self.data.latents is not None:
            yield (
                "data.latents is for train.py and finetune.py: stage 1 encodes nothing"
                f"; leave it null here (it is {self.data.latents})"
            )
        labelled = NUM_MATERIALS, len(CONTEXT_CHANNELS)
        if (found := (self.model.num_materials, self.model.num_context_channels)) != labelled:
            yield (
                "model.num_materials and model.num_context_channels must be those of"
                f" the labels, {labelled}, got {found}"
            )
        weighted = [f"val_{name}" for name in IF_WEIGHTED if getattr(self.loss, name)]
        given = OF_MAPS + (OF_FUSED + weighted if self.physics else [])
        yield from _unknown_best(self.training, given)

    def obstacles(self) -> Iterator[str]:
        if self.model.pretrained not in ("none", "imagenet"):
            yield from missing("model.pretrained", self.model.pretrained)


@dataclass(kw_only=True)
class FlowConfig(PathConfig):
    """The flow as it is trained: where it starts, its times, and its losses."""

    mean: float = 0.0  # times are sigmoid(normal(mean, std)); mean > 0: more noise
    std: float = 1.0
    shift: float = 1.0  # shifts the times towards noise, for large images; 1: no shift
    visible_weight: float = 0.0  # weight of the visible panel's velocity error; 0: infrared only
    mean_share: float = 0.0  # share of the samples that learn the mean: no noise, one forward pass
    image_weight: float = 0.0  # weight of the image loss (losses/image.py) on those samples
    adversarial_weight: float = 0.0  # weight of model.discriminator's loss on all other samples

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.mean_share <= 1 or min(self.image_weight, self.adversarial_weight) < 0:
            yield (
                "flow needs 0 <= mean_share <= 1, image_weight and adversarial_weight >= 0, got"
                f" {self.mean_share}, {self.image_weight} and {self.adversarial_weight}"
            )
        if self.std <= 0 or self.shift <= 0 or self.visible_weight < 0:
            yield (
                "flow needs std > 0, shift > 0 and visible_weight >= 0, got"
                f" {self.std}, {self.shift} and {self.visible_weight}"
            )
        if abs(self.mean) > MOST_MEAN:
            yield f"flow.mean is {self.mean}: nearly every time would be 0 or 1"


def of_velocity(cfg: FlowConfig) -> list[str]:
    """What a validation of stages 2 and 3 returns without drawing images, in order."""
    names = BIN_NAMES if cfg.mean_share else BIN_NAMES[:-1]
    return ["val_loss", *(f"val_{name}" for name in names)]


@dataclass(kw_only=True)
class TranslatorTrainingConfig(TrainingConfig):
    batch_size: int = 4
    epochs: int = 100
    gradient_accumulation_steps: int = 2
    ema_decay: float = 0.999
    lambda_generation: float = 1.0  # weight of the velocity error
    # weight of stage 1's loss on the maps; stage 3: 0.1
    lambda_decomposition_consistency: float = 0.0

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        weights = self.lambda_generation, self.lambda_decomposition_consistency
        if min(weights) < 0 or not max(weights) > 0:
            yield (
                "lambda_generation and lambda_decomposition_consistency must not be"
                " negative, and one must be above 0, got {} and {}".format(*weights)
            )


@dataclass(kw_only=True)
class TrainConfig(Checked):
    """Stage 2, train.py."""

    MAY_CHANGE: ClassVar = {"data": HOW_DATA_ARE_READ, "model": (*HOW_IT_RUNS, *STAGE1_FILE)}

    model: TranslatorConfig = field(default_factory=TranslatorConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(size=512))
    flow: FlowConfig = field(default_factory=FlowConfig)
    # the terms of training.lambda_decomposition_consistency
    loss: PretrainLossConfig = field(default_factory=PretrainLossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TranslatorTrainingConfig = field(default_factory=TranslatorTrainingConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/train"))
    # filled in from the data set: the values of infrared 0 and 1, their unit, Planck constants
    window: list[float] | None = None
    unit: str = "counts"
    planck: list[float] | None = None

    def problems(self) -> Iterator[str]:
        yield from schedule_problems(self)
        yield from untrained_mode(self.sampling, self.flow.mean_share)
        of_samples = OF_SAMPLES if self.run.images else []
        yield from _unknown_best(self.training, of_velocity(self.flow) + of_samples)

    def obstacles(self) -> Iterator[str]:
        yield from _uneven_size(self.data)
        yield from contradictions(self.model)
        yield from _blocks_outside(self.model)
        yield from objective_problems(self)
        yield from latents_without_codec(self)
        guide, path = "model.decomposition_checkpoint", self.model.decomposition_checkpoint
        if path is None:
            yield f"{guide} is not set: give best_model.pth of pretrain.py (untrained it is noise)"
        yield from missing(guide, path, "; pretrain.py writes one")
        weights = self.model.flux_fill_id or ""
        if weights.startswith(("/", ".")):  # else it may be a name on the hub
            yield from missing("model.flux_fill_id", weights)


def _uneven_size(data: DataConfig) -> Iterator[str]:
    try:
        check_size(*data.height_width())
    except ValueError as error:
        yield str(error)


def _blocks_outside(model: TranslatorConfig) -> Iterator[str]:
    if model.preset:
        blocks = PRESETS[model.preset].num_layers
        if outside := [block for block in model.inject if not 0 <= block < blocks]:
            yield (
                f"model.inject names block {', '.join(map(str, outside))};"
                f" model.preset={model.preset} has {blocks}, from 0 to {blocks - 1}"
            )


def objective_problems(cfg: TrainConfig) -> Iterator[str]:
    """A sentence for each loss term that makes no sense with this model or flow."""
    if cfg.training.lambda_decomposition_consistency and cfg.model.freeze_decomposition:
        yield (
            "training.lambda_decomposition_consistency > 0 has no effect on a frozen"
            " decomposition; use finetune.py or --no_freeze_decomposition"
        )
    if cfg.model.discriminator != (cfg.flow.adversarial_weight > 0):
        yield (
            "model.discriminator and flow.adversarial_weight > 0 go together, got"
            f" {cfg.model.discriminator} and {cfg.flow.adversarial_weight}"
        )
    if cfg.flow.adversarial_weight and cfg.flow.mean_share == 1:
        yield "flow.mean_share is 1: no sample is left for flow.adversarial_weight to sharpen"
    if cfg.loss.balance:
        yield (
            "loss.balance needs the frequency of each material, which only pretrain.py"
            " counts; leave it 0 here"
        )


def latents_without_codec(cfg: TrainConfig) -> Iterator[str]:
    """A sentence if the layout has no latents to store."""
    if cfg.data.latents is not None and cfg.model.layout == "pixels":
        yield (
            "data.latents stores a codec's output, and model.layout=pixels has no codec: set"
            f" data.latents=null (it is {cfg.data.latents})"
        )


@dataclass(kw_only=True)
class FinetuneConfig(TrainConfig):
    """Stage 3, finetune.py."""

    checkpoint: str = "runs/train/best_model.pth"  # the stage 2 weights to start from

    def obstacles(self) -> Iterator[str]:
        """Nothing about the model yet: the checkpoint decides what it is."""
        yield from _uneven_size(self.data)
        yield from missing("checkpoint", self.checkpoint, "; train.py writes one")


@dataclass(kw_only=True)
class ModelUseConfig(Checked):
    """A trained model and how it samples; null: as in the run's own configuration."""

    checkpoint: str = "runs/train/best_model.pth"  # a file, a run's folder or an exported one
    output_dir: str = "results"
    device: str = "auto"
    fast: Literal["auto", "off"] | None = None  # off: the plain model; see models/fast/plan.py
    batch_size: int = 8
    mode: Literal["sample", "mean"] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    samples: int | None = None  # number of samples to average per image
    mirror: bool | None = None  # average with the prediction for the mirrored photograph
    seed: int | None = None

    def problems(self) -> Iterator[str]:
        if self.batch_size < 1:
            yield f"batch_size must be 1 or more, got {self.batch_size}"
        asked = {name: getattr(self, name) for name in ("steps", "shift", "samples")}
        asked["guidance_scale"] = self.guidance_scale
        try:
            SamplingConfig(**{name: x for name, x in asked.items() if x is not None})
        except Problems as error:
            yield from error.sentences

    def obstacles(self) -> Iterator[str]:
        yield from missing("checkpoint", self.checkpoint, "; train.py and pretrain.py write one")
        if Path(self.output_dir).is_file():
            yield f"output_dir {self.output_dir} is a file; name a folder"


@dataclass(kw_only=True)
class HeldOutConfig(ModelUseConfig):
    """A trained model of any stage on held-out pairs; the keys of visualize.py."""

    test_data: str | None = None  # null: the data the model was trained on
    split: Literal["train", "val", "test", "all"] = "test"
    limit: int = 0  # use only this many pairs, evenly spaced; 0: all
    num_workers: int = 2
    # how pairs with another aspect than the training size are read; null: the run's data.aspect
    aspect: Literal["crop", "buckets", "squash"] | None = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.limit < 0:
            yield f"limit must be 0 (all pairs) or more, got {self.limit}"

    def obstacles(self) -> Iterator[str]:
        yield from super().obstacles()
        for sentence in DataConfig(path=self.test_data or "synthetic").obstacles():
            yield sentence.replace("data.path", "test_data")


@dataclass(kw_only=True)
class EvaluateConfig(HeldOutConfig):
    """evaluate.py."""

    lpips: bool = False  # also LPIPS; AlexNet's weights are downloaded once, 233 MB
    boxes: str | None = None  # folder of YOLO boxes; null: `boxes` in the data set's folder, if any
    report: bool = False  # also report.html: tables, plots, the best, median and worst images
    # print the row of another project's paper instead of our table: docs/evaluation.md
    protocol: Literal["thermalgen", "pid", "fvita", "mavic"] | None = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        given = {"--lpips": self.lpips, "--boxes": self.boxes, "--report": self.report}
        if self.protocol and (wrong := [name for name, value in given.items() if value]):
            yield (f"--protocol {self.protocol} has its own measures; leave out {', '.join(wrong)}")

    def obstacles(self) -> Iterator[str]:
        yield from super().obstacles()
        yield from missing("boxes", self.boxes)


@dataclass(kw_only=True)
class GenerateConfig(ModelUseConfig):
    """generate.py: infrared images for photographs."""

    image_path: str = ""  # a photograph or a folder of photographs
    output_dir: str = "generated"
    keep_aspect: bool = False  # even if the model was trained with data.aspect=squash
    # translate larger photographs in tiles, at their own resolution: side of a tile in pixels, a
    # multiple of 16; auto: the training size
    tile: int | Literal["auto", "off"] = "off"
    recursive: bool = False  # also subfolders; results keep their structure
    # 8-bit grey; 16-bit PNG with unit, scale and offset in a .json; kelvin as .npy; or a float TIFF
    format: Literal["png8", "png16", "npy", "tiff"] = "png8"
    counts: bool = False  # --format png16 with exactly the training data's whole counts

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.counts and self.format not in ("png8", "png16"):
            yield f"--counts writes 16-bit PNG, --format {self.format} does not: give one of them"
        if isinstance(self.tile, int) and (self.tile < 32 or self.tile % 16):
            yield f"--tile must be a multiple of 16, at least 32, or auto or off, got {self.tile}"

    def obstacles(self) -> Iterator[str]:
        yield from super().obstacles()
        if not self.image_path:
            yield "--image_path is needed: a photograph, or a folder of them"
        elif not Path(self.image_path).exists():
            yield f"--image_path {self.image_path!r}: no such file or folder"

    def __post_init__(self):
        super().__post_init__()
        self.format = "png16" if self.counts else self.format
