"""What each script can be told: one dataclass a stage, composed of the parts' own."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from data.materials import NUM_MATERIALS
from data.pairs import DataConfig
from data.pseudo_labels import CONTEXT_CHANNELS
from losses.flow import BIN_NAMES
from losses.pretrain import FUSED_TERMS, IF_WEIGHTED, TERMS, PretrainLossConfig
from models.decomposition import DecompositionConfig
from models.sampler import SamplingConfig, check_mode
from models.translator import PathConfig, TranslatorConfig
from utils import metrics
from utils.loop import TrainingConfig
from utils.optimizer import OptimizerConfig
from utils.run import RunConfig

MOST_MEAN = 20  # of flow.mean: beyond it the sigmoid is 0 or 1 in fp32

# What an evaluation gives, so that a misspelt training.best_metric is said before the first step.
# tests/test_stages.py compares it with what the evaluations of tiny runs give.
_LABELLED = ["material_ce", *metrics.ConfusionMatrix.RESULTS]
OF_MAPS = [f"val_{name}" for name in ["loss", *TERMS, *_LABELLED, *metrics.OF_INTENSITY]]
OF_FUSED = [f"val_{name}" for name in [*FUSED_TERMS, *metrics.OF_FUSED]]
OF_SAMPLES = ["val_psnr", "val_ssim"]


def _fields(kind: type, *names: str) -> tuple[str, ...]:
    """`names`, which must be fields of the dataclass `kind`."""
    unknown = set(names) - {f.name for f in fields(kind)}
    assert not unknown, f"{kind.__name__} has no {unknown}"
    return names


# What a run may change on resuming and stay the same run.
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

USE_FLAGS = {
    name: name
    for name in (
        "checkpoint",
        "output_dir",
        "device",
        "fast",
        "batch_size",
        "mode",
        "steps",
        "guidance_scale",
        "shift",
        "samples",
        "mirror",
        "seed",
        "test_data",
        "split",
        "limit",
        "num_workers",
        "aspect",
        "image_path",
        "keep_aspect",
        "tile",
        "recursive",
        "format",
        "counts",
        "lpips",
        "boxes",
        "report",
        "results",
        "panels",
        "base_model",
        "push_to_hub",
        "public",
        "dry_run",
    )
}


def _check_best(training: TrainingConfig, given: list[str]) -> None:
    if training.best_metric.removeprefix("-") not in given:
        raise ValueError(
            f"training.best_metric is {training.best_metric}; this run's evaluations"
            f" give {', '.join(given)}"
        )


@dataclass(kw_only=True)
class PretrainConfig:
    """Stage 1, pretrain.py."""

    MAY_CHANGE: ClassVar = {"data": HOW_DATA_ARE_READ}

    model: DecompositionConfig = field(default_factory=DecompositionConfig)
    physics: bool = True  # off: no fusion, no physics and reconstruction terms; all else bit-equal
    fast: Literal["auto", "off"] = "auto"  # off: plain convolutions, nothing of models/fast
    compile: bool | None = None  # the training step; null: with one GPU, whose BatchNorm is alone
    data: DataConfig = field(default_factory=DataConfig)
    loss: PretrainLossConfig = field(default_factory=PretrainLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/pretrain"))

    def __post_init__(self):
        if self.data.latents is not None:
            raise ValueError(
                "data.latents is for train.py and finetune.py: stage 1 encodes nothing"
                f"; leave it null here (it is {self.data.latents})"
            )
        labelled = NUM_MATERIALS, len(CONTEXT_CHANNELS)
        if (found := (self.model.num_materials, self.model.num_context_channels)) != labelled:
            raise ValueError(
                "model.num_materials and model.num_context_channels must be those of"
                f" the labels, {labelled}, got {found}"
            )
        weighted = [f"val_{name}" for name in IF_WEIGHTED if getattr(self.loss, name)]
        _check_best(self.training, OF_MAPS + (OF_FUSED + weighted if self.physics else []))


@dataclass(kw_only=True)
class FlowConfig(PathConfig):
    """The flow as it is trained: where it starts, its times, and its losses."""

    mean: float = 0.0  # of the normal variable under the sigmoid; > 0: more noise
    std: float = 1.0
    shift: float = 1.0  # resolution shift; 1: none
    visible_weight: float = 0.0  # of the visible panel's velocity error; 0: infrared panel only
    mean_share: float = 0.0  # of the samples, trained to predict the mean: no noise, one forward
    image_weight: float = 0.0  # of the image loss (losses/image.py) on those samples
    adversarial_weight: float = 0.0  # of the game with model.discriminator, on all other samples

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.mean_share <= 1 or min(self.image_weight, self.adversarial_weight) < 0:
            raise ValueError(
                "flow needs 0 <= mean_share <= 1, image_weight and adversarial_weight >= 0, got"
                f" {self.mean_share}, {self.image_weight} and {self.adversarial_weight}"
            )
        if self.std <= 0 or self.shift <= 0 or self.visible_weight < 0:
            raise ValueError(
                "flow needs std > 0, shift > 0 and visible_weight >= 0, got"
                f" {self.std}, {self.shift} and {self.visible_weight}"
            )
        if abs(self.mean) > MOST_MEAN:
            raise ValueError(f"flow.mean is {self.mean}: nearly every time would be 0 or 1")


def of_velocity(cfg: FlowConfig) -> list[str]:
    """What a validation of stages 2 and 3 gives without drawing images, in its order."""
    names = BIN_NAMES if cfg.mean_share else BIN_NAMES[:-1]
    return ["val_loss", *(f"val_{name}" for name in names)]


@dataclass(kw_only=True)
class TranslatorTrainingConfig(TrainingConfig):
    batch_size: int = 4
    epochs: int = 100
    gradient_accumulation_steps: int = 2
    ema_decay: float = 0.999
    lambda_generation: float = 1.0  # of the velocity error
    lambda_decomposition_consistency: float = 0.0  # of stage 1's loss on the maps; stage 3: 0.1

    def __post_init__(self):
        super().__post_init__()
        weights = self.lambda_generation, self.lambda_decomposition_consistency
        if min(weights) < 0 or not max(weights) > 0:
            raise ValueError(
                "lambda_generation and lambda_decomposition_consistency must not be"
                " negative, and one above 0, got {} and {}".format(*weights)
            )


@dataclass(kw_only=True)
class TrainConfig:
    """Stage 2, train.py."""

    MAY_CHANGE: ClassVar = {"data": HOW_DATA_ARE_READ, "model": (*HOW_IT_RUNS, *STAGE1_FILE)}

    model: TranslatorConfig = field(default_factory=TranslatorConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(size=512))
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: PretrainLossConfig = field(default_factory=PretrainLossConfig)  # of the consistency term
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TranslatorTrainingConfig = field(default_factory=TranslatorTrainingConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/train"))
    # filled from the data set: values of infrared 0 and 1, their unit, the camera's constants
    window: list[float] | None = None
    unit: str = "counts"
    planck: list[float] | None = None

    def __post_init__(self):
        check_mode(self.sampling, self.flow.mean_share)
        of_samples = OF_SAMPLES if self.run.images else []
        _check_best(self.training, of_velocity(self.flow) + of_samples)


@dataclass(kw_only=True)
class FinetuneConfig(TrainConfig):
    """Stage 3, finetune.py."""

    checkpoint: str = "runs/train/best_model.pth"  # the stage 2 weights to start from


@dataclass(kw_only=True)
class ModelUseConfig:
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
    samples: int | None = None  # average so many samples an image
    mirror: bool | None = None  # average with what the mirror image gives
    seed: int | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")


@dataclass(kw_only=True)
class HeldOutConfig(ModelUseConfig):
    """A trained model of any stage on held-out pairs; what visualize.py is told."""

    test_data: str | None = None  # null: the data the model was trained on
    split: Literal["train", "val", "test", "all"] = "test"
    limit: int = 0  # only so many pairs, evenly spaced; 0: all
    num_workers: int = 2
    # of other aspects than the training size; null: as the run's data.aspect
    aspect: Literal["crop", "buckets", "squash"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all pairs) or more, got {self.limit}")


@dataclass(kw_only=True)
class EvaluateConfig(HeldOutConfig):
    """evaluate.py."""

    lpips: bool = False  # LPIPS too; AlexNet's weights are fetched once, 233 MB
    boxes: str | None = None  # folder of YOLO boxes; null: `boxes` in the data set's folder, if any
    report: bool = False  # report.html too: tables, plots, and the best, median and worst images


@dataclass(kw_only=True)
class GenerateConfig(ModelUseConfig):
    """generate.py: infrared images for photographs."""

    image_path: str = ""  # a photograph, or a folder of them
    output_dir: str = "generated"
    keep_aspect: bool = False  # also where the model was trained with data.aspect=squash
    # photographs larger than a tile at their own resolution: its side in pixels, a multiple of 16,
    # or auto: the training size; the memory of a batch of tiles
    tile: int | Literal["auto", "off"] = "off"
    recursive: bool = False  # the folders below too; results keep their structure
    # 8-bit grey; 16-bit PNG and .json of unit, scale and offset; kelvin as .npy; or a float TIFF
    format: Literal["png8", "png16", "npy", "tiff"] = "png8"
    counts: bool = False  # --format png16 that must be the training data's own whole counts

    def __post_init__(self):
        super().__post_init__()
        if self.counts and self.format not in ("png8", "png16"):
            raise ValueError(
                f"--counts writes 16-bit PNG, --format {self.format} another: give one of them"
            )
        self.format = "png16" if self.counts else self.format
        if isinstance(self.tile, int) and (self.tile < 32 or self.tile % 16):
            raise ValueError(
                f"--tile needs a multiple of 16 from 32 on, auto or off, got {self.tile}"
            )


@dataclass(kw_only=True)
class ExportConfig:
    """export.py: a trained model as a folder, and on a hub."""

    checkpoint: str = "runs/train/best_model.pth"  # a file, a run's folder or an exported one
    output_dir: str = "exported"
    results: str | None = None  # results.json of evaluate.py, or its folder: for the model card
    panels: str | None = None  # folder of visualize.py: its first pictures, for the model card
    base_model: str | None = None  # hub id of FLUX.1, where the training read it from a folder
    push_to_hub: str | None = None  # user/name of the repository to upload to
    public: bool = False  # of a repository that is made; one that is there stays as it is
    dry_run: bool = False  # list what would be pushed, and push nothing
