"""FLUX for sampling alone: no gradients, nothing that trains, everything multiplied in e4m3.

The blocks are those of models/fast/fp8_blocks.py. Around them:
    adapters are part of the matrices (`fused_matrices.freeze` with `adapters`)
    the modulations of all times are computed before the first step, at once
    a residual sum is left to the block that reads it, where it is one pass with the norm

Dimension key:  B batch   N image, M text, S all tokens   D model   T times   P parts of D
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.base import FluxRunner
from models.fast import fp8_blocks, train_blocks
from models.fast.fp8_residual_norm import add_up
from models.fast.frozen_matrix import linear_of_few
from models.fast.pending_residual import PendingResidual
from models.fast.train_blocks import Wanted
from models.guidance import SemanticGuidance

# of every block: (T, P D) each, of a step (1, P D); last, the time's embedding: (T, D)
Modulations = list[tuple[Tensor, ...]]


def install(flux: nn.Module, guidance: SemanticGuidance, compiled: bool) -> None:
    """Replace the forward of a flux that `fused_matrices.freeze` has rounded with `adapters`.

    compiled: compile guidance; the blocks need no compiling.
    """
    if compiled:
        train_blocks.compile_guidance(guidance)
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        block.streams = fp8_blocks.take(block)
    flux.forward = partial(_forward, flux, guidance)


class SampleRunner(FluxRunner):
    """Calls a FLUX of `install`; the first call says what does not fit e4m3."""

    def __init__(self, flux: nn.Module):
        super().__init__(flux)
        self.measured = False

    def velocity(self, inputs: dict[str, Any], infrared_rows: int, prepared: Any) -> Tensor:
        fits: list | None = None if self.measured else []
        self.measured = True
        more = dict(infrared_rows=infrared_rows, modulations=prepared, fits=fits)
        velocity = self.flux(**inputs, **more)[0]
        if fits:
            fp8_blocks.warn_of_poor_fits(fits)
        return velocity

    def prepare(self, times: Tensor, guidance_scale: float, pooled_C: Tensor) -> list[Modulations]:
        return modulations_at(self.flux, times, guidance_scale, pooled_C)


@torch.no_grad()
def modulations_at(
    flux: nn.Module, times: Tensor, guidance_scale: float, pooled_C: Tensor
) -> list[Modulations]:
    """What every block needs to know of the time, at each of `times` (T,)."""
    T = len(times)
    scale = torch.full((T,), guidance_scale, device=times.device)
    all_times = _modulations(
        flux, train_blocks.embed_time(flux, times, scale, pooled_C.expand(T, -1))
    )
    return [[tuple(m[i : i + 1] for m in of) for of in all_times] for i in range(T)]


def _modulations(flux: nn.Module, temb_TD: Tensor) -> Modulations:
    silu_TD = nn.functional.silu(temb_TD)
    blocks = *flux.transformer_blocks, *flux.single_transformer_blocks
    of = [tuple(linear_of_few(silu_TD, w.modulation) for w in b.streams) for b in blocks]
    return [*of, (temb_TD,)]


@torch.no_grad()
def _forward(
    flux,
    fuser,
    hidden_states,
    encoder_hidden_states,
    pooled_projections,
    timestep,
    img_ids,
    txt_ids,
    guidance,
    joint_attention_kwargs=None,
    return_dict=False,
    infrared_rows=0,
    modulations=None,
    fits=None,
):
    """As models/fast/train_blocks.py's; `modulations` of this step, if at hand.

    fits: gains how well each tensor fits e4m3 (`fp8_blocks.Fit`).
    """
    x_BND, text_BMD = flux.x_embedder(hidden_states), flux.context_embedder(encoder_hidden_states)
    if not modulations:
        temb_BD = train_blocks.embed_time(flux, timestep, guidance, pooled_projections)
        modulations = _modulations(flux, temb_BD)
    (temb_BD,), modulations = modulations[-1], iter(modulations)
    rotary = flux.pos_embed(torch.cat([txt_ids, img_ids]))
    guide = (joint_attention_kwargs or {}).get("guidance")
    none_1D = temb_BD.new_zeros(1, temb_BD.shape[1])
    x, text = (
        PendingResidual(x_BND, none_1D, (x_BND,)),
        PendingResidual(text_BMD, none_1D, (text_BMD,)),
    )
    for i, block in enumerate(flux.transformer_blocks):
        x, text = fp8_blocks.double_block(x, text, next(modulations), rotary, *block.streams, fits)
        if guide is not None and fuser.sees(i):  # else the sum is left to the next block
            x_BND = fuser.add(i, add_up(x), guide)
            x = PendingResidual(x_BND, none_1D, (x_BND,))
    x_BSD, M = add_up(text, x), text_BMD.shape[1]
    x = PendingResidual(x_BSD, none_1D, (x_BSD,))
    *most, last = flux.single_transformer_blocks
    for block in most:
        x = fp8_blocks.single_block(x, *next(modulations), rotary, *block.streams, fits=fits)
    wanted = Wanted(M, infrared_rows) if infrared_rows else None
    x = fp8_blocks.single_block(x, *next(modulations), rotary, *last.streams, wanted, fits)
    x_BSD = add_up(x)
    x_BND = x_BSD if infrared_rows else x_BSD[:, M:]
    return (train_blocks.finish(flux, x_BND, temb_BD, infrared_rows),)
