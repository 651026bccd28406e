"""Baseline: pix2pix (Isola et al. 2017, arXiv:1611.07004) with its published settings.

    python baselines/pix2pix.py --data_path datasets/mine --output_dir runs/pix2pix
    python evaluate.py --checkpoint runs/pix2pix/best_model.pth

U-Net generator with dropout as noise, 70 x 70 PatchGAN, L1 with weight 100, Adam 2e-4 with betas
.5 and .999, the discriminator's loss halved. configs/baselines/pix2pix.yaml lists what differs.
Same data, augmentation, loop, EMA and checkpoints as pretrain.py. To resume, run it again.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines.training import BaselineConfig, train
from utils.run import entry


def step(cfg: BaselineConfig, model: nn.Module, visible: Tensor, infrared: Tensor):
    losses = model(visible, infrared)
    loss = cfg.lambda_l1 * losses["l1"] + losses["adversarial"] + losses["discriminator"]
    return loss, {name: x.detach() for name, x in losses.items()}


def main() -> None:
    train("pix2pix", step)


if __name__ == "__main__":
    entry(main)
