"""Places the frozen transformer on a device or, if that is too small, in equal parts on all ranks.

Sharded, every rank keeps 1/world of each block. FSDP2 gathers a block's weights before its forward
and its backward pass and frees them afterwards, so that one or two blocks are whole at a time. What
is trained stays whole on every rank, and its gradients are DDP's.

Every pass through a sharded transformer is a collective: all ranks must make equally many.
Source: Zhao et al. 2023 (arXiv:2304.11277), as in torch.distributed.fsdp.fully_shard.
"""

import warnings
from collections.abc import Callable

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


def all_ranks(device: torch.device | str) -> DeviceMesh | None:
    """The mesh to shard over; None where there is one process, which has nothing to share."""
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return None
    return init_device_mesh(torch.device(device).type, (torch_dist.get_world_size(),))


def place(
    flux: nn.Module,
    device: torch.device | str,
    mesh: DeviceMesh | None = None,
    finish: Callable[[nn.Module], None] | None = None,
) -> None:
    """Move `flux` to `device` block by block, so that no more than one block is there twice.

    Args:
        mesh: shard each block's frozen weights over it as soon as the block is there.
        finish: changes each block once it is there, before it is sharded.
    """
    for block in blocks(flux):
        _move(block, device)
        if finish:
            finish(block)
        if mesh:
            trained = {p for p in block.parameters() if p.requires_grad}
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for module in flux.children():
        if not isinstance(module, nn.ModuleList):
            _move(module, device)
    if mesh:
        # it warns of outputs that are views; nobody here writes into the output of a block
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        # no weights of its own: with a common root the blocks share one buffer for gathering,
        # without one each would keep its own until its next pass
        fully_shard(flux, mesh=mesh, ignored_params=set(flux.parameters()))


def blocks(flux: nn.Module) -> list[nn.Module]:
    """Double blocks, then single blocks."""
    return [*flux.transformer_blocks, *flux.single_transformer_blocks]


def _move(module: nn.Module, device: torch.device | str) -> None:
    """To `device`; what has no values yet (the meta device) is drawn there."""
    if not any(p.is_meta for p in module.parameters()):
        module.to(device)
        return
    module.to_empty(device=device)
    for part in reversed(list(module.modules())):  # an adapter after the layers in it
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
