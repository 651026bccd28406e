"""Stage 1 as one module: the decomposition and, unless physics is off, the fusion of its maps.

One module because DistributedDataParallel must see both in one forward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decomposition import DecompositionConfig, Maps, MultiTaskDecompositionNet
from models.fusion import PhysicsInspiredFusion


class Stage1Output(NamedTuple):
    maps: Maps
    fused: Tensor | None  # (B, 3, H, W) fp32, about [0, 1]; None when physics is off


class Stage1(nn.Module):
    """Photographs (B, 3, H, W) in [0, 1] -> Stage1Output.

    Raises: ValueError: the configuration does not fit together (see MultiTaskDecompositionNet).
    """

    def __init__(self, cfg: DecompositionConfig, physics: bool = True):
        super().__init__()
        self.decomposition = MultiTaskDecompositionNet(cfg)
        self.fusion = None
        if physics:
            # forked, so that whatever is drawn after this is the same with physics on and off
            with torch.random.fork_rng(devices=[]):
                self.fusion = PhysicsInspiredFusion(cfg.num_materials, cfg.num_context_channels)

    def forward(self, visible: Tensor) -> Stage1Output:
        maps = self.decomposition(visible)
        if self.fusion is None:
            return Stage1Output(maps, None)
        fused = self.fusion(maps.intensity, maps.material.softmax(dim=1), maps.context)
        return Stage1Output(maps, fused)
