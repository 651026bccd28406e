"""Stage 3: train the guided FLUX and the decomposition that guides it together.

    python finetune.py --config configs/demo/finetune.yaml --checkpoint runs/train/best_model.pth
    torchrun --nproc_per_node=2 finetune.py --checkpoint runs/train/best_model.pth --lr 1e-5

As stage 2, but the decomposition is trained too; the consistency term (stage 1's loss) keeps its
maps meaningful. The checkpoint decides the architecture. To resume, run the same command again.
"""

from dataclasses import is_dataclass

from assembly import checkpoints
from configs.schema import FLAGS, HOW_IT_RUNS, FinetuneConfig, TrainConfig
from train import train
from utils import config, dist
from utils.run import entry


def refuse_what_is_fixed(
    cfg: FinetuneConfig, given: dict, trained: TrainConfig, free: tuple[str, ...]
) -> None:
    """Raises: ValueError: a `given` value contradicts one that the checkpoint decides."""

    def compare(given: dict, asked, found, path: str) -> None:
        for name, value in given.items():
            key, pair = f"{path}.{name}", (getattr(asked, name), getattr(found, name))
            if isinstance(value, dict) and is_dataclass(pair[0]):
                compare(value, *pair, key)
            elif key.removeprefix("model.") not in free and pair[0] != pair[1]:
                raise ValueError(
                    f"{key} is {pair[1]} in {cfg.checkpoint}, which decides it here;"
                    f" leave it out (it is {pair[0]})"
                )

    compare(given.get("model") or {}, cfg.model, trained.model, "model")
    of_path = {k: v for k, v in (given.get("flow") or {}).items() if k in ("start", "sigma")}
    compare(of_path, cfg.flow, trained.flow, "flow")
    drawn = trained.model.preset and not trained.model.train_base
    if drawn and cfg.training.seed != trained.training.seed:
        raise ValueError(
            f"{cfg.checkpoint} has a random frozen FLUX, drawn from its seed; set"
            f" training.seed={trained.training.seed} (it is {cfg.training.seed})"
        )


def main() -> None:
    source = dict(flags=FLAGS, default="configs/finetune.yaml")
    cfg = config.load(FinetuneConfig, **source)
    given = config.given(FinetuneConfig, **source)
    device = dist.init(cfg.run.device, cfg.run.deterministic, cfg.run.timeout)
    # this run chooses how the model is trained; the checkpoint decides what the model is
    names = ("freeze_decomposition", "train_batchnorm", *HOW_IT_RUNS)
    chosen = {name: getattr(cfg.model, name) for name in names}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    model, trained, plan = checkpoints.load_translator(cfg.checkpoint, device, **chosen)
    refuse_what_is_fixed(cfg, given, trained, names)
    for name in ("start", "sigma"):
        setattr(cfg.flow, name, getattr(trained.flow, name))
    cfg.model = trained.model
    train(cfg, model, plan, device)


if __name__ == "__main__":
    entry(main)
