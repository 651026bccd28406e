"""Baseline: a plain U-Net that regresses the infrared image with L1.

    python baselines/unet.py --data_path datasets/mine --output_dir runs/unet --max_seconds 300
    python evaluate.py --checkpoint runs/unet/best_model.pth

Same data, augmentation, loop, EMA and checkpoints as pretrain.py. To resume, run it again.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines.training import BaselineConfig, train
from utils.run import entry


def step(cfg: BaselineConfig, model: nn.Module, visible: Tensor, infrared: Tensor):
    loss = (model(visible) - infrared).abs().mean()
    return loss, {}


def main() -> None:
    train("unet", step)


if __name__ == "__main__":
    entry(main)
