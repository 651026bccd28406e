"""Where a run's curves and pictures go besides metrics.jsonl: TensorBoard, Weights & Biases."""

import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.files import write_whole

# TensorBoard's tab "Custom Scalars": chart -> regular expressions of what it draws. All stages
# and baselines have something for each, but not for all of a chart's expressions.
CHARTS = {
    "Does it learn": {
        "loss": ["^loss$", "^val_loss$"],
        "image quality (validation)": ["^val_psnr$", "^val_ssim$", "^val_pearson$", "^val_rank$"],
        "parts of the loss": [r"^(?!val_|fusion/|weight/|(?:loss|lr|skipped|grad_norm)$)"
                              r"(?!.*(?:_s|_gib|_tflops|data_wait)$).+$"],
        "parts of the validation loss": [r"^val_(?!loss$|psnr$|ssim$)"],
    },
    "Is it healthy": {
        "norm of the gradient": ["^grad_norm$"],
        "learning rate": ["^lr$"],
        "skipped steps": ["^skipped$"],
    },
    "How fast": {
        "images per second": ["^images_per_s$"],
        "seconds of a step, an evaluation": ["^step_s$", "^eval_s$"],
        "share of waiting for data": ["^data_wait$"],
    },
}  # fmt: skip


class Tracker(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, tag: str, picture: np.ndarray) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder.

    Args: purge_step: what an earlier start wrote from this step on is forgotten; None: nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None, text: str):
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        lines = text.replace("\n", "\n    ")  # indented: Markdown shows it as it is
        self.writer.add_text("config", f"    {lines}")
        self.writer.add_custom_scalars(
            {
                category: {title: ["Multiline", tags] for title, tags in charts.items()}
                for category, charts in CHARTS.items()
            }
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        self.writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; the environment's WANDB_MODE, WANDB_PROJECT, ... are heeded.

    A resumed run goes on under its own id, which is kept in the folder. Steps are a value like any
    other: Weights & Biases' own counter cannot go back to where a checkpoint was.
    """

    def __init__(self, folder: Path, fresh: bool, values: dict[str, Any]):
        import wandb

        self.wandb, known = wandb, folder / "wandb_id.txt"
        if fresh or not known.is_file():
            write_whole(known, secrets.token_hex(8))
        self.run = wandb.init(
            id=known.read_text(encoding="utf-8").strip(),
            project=os.environ.get("WANDB_PROJECT", "thermaflux"),
            name="/".join(folder.absolute().parts[-2:]),
            dir=str(folder),
            config=values,
            resume="allow",
        )
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        self.run.log({"step": step, tag: self.wandb.Image(picture)})

    def close(self) -> None:
        self.run.finish()


def missing(report_to: list[str]) -> list[str]:
    """A sentence if Weights & Biases is asked for and not installed."""
    if "wandb" in report_to and find_spec("wandb") is None:
        return ['report_to names wandb, which is not installed: pip install ".[wandb]"']
    return []


def write_hparams(
    folder: Path, runs: dict[str, tuple[dict[str, str | float], dict[str, float]]]
) -> None:
    """TensorBoard's tab "HParams": name -> (a run's settings, its results)."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, (settings, values) in runs.items():
            results = {f"result/{metric}": value for metric, value in values.items()}
            writer.add_hparams(settings, results, run_name=name)
