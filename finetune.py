"""Stage 3: train the guided FLUX and the decomposition that guides it together.

    python finetune.py --config configs/demo/finetune.yaml --checkpoint runs/train/best_model.pth
    torchrun --nproc_per_node=2 finetune.py --checkpoint runs/train/best_model.pth --lr 1e-5

Stage 2 with the decomposition trained too; the consistency term (stage 1's loss) keeps its maps
meaningful. The architecture is that of the checkpoint. To resume, run the same command again.
"""

from configs import restore
from configs.schema import FLAGS, FinetuneConfig
from train import train
from utils import config, dist
from utils.run import entry


def main() -> None:
    cfg = config.load(FinetuneConfig, flags=FLAGS, default="configs/finetune.yaml")
    device = dist.init(cfg.run.device, cfg.run.deterministic)
    # how it is trained is this run's choice; what it is comes from the checkpoint
    names = ("freeze_decomposition", "train_batchnorm", "memory", "base_dtype", "compile",
             "gradient_checkpointing", "shard_base")  # fmt: skip
    chosen = {name: getattr(cfg.model, name) for name in names}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    model, trained = restore.load_translator(cfg.checkpoint, device, **chosen)
    cfg.model = trained.model
    train(cfg, model, device)


if __name__ == "__main__":
    entry(main)
