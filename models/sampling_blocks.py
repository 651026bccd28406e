"""FLUX's blocks for sampling alone: frozen e4m3 matrices, no gradients, nothing that trains.

What is faster than in models/fast.py, whose functions do the rest:
    adapters are part of the matrices (`merge.freeze` with `adapters`)
    the modulations of all times are computed before the first step, at once
    a residual sum is left to the block that reads it, where it is one pass with the norm
Where the GPU and an extra package can, models/rounded_blocks.py replaces the blocks themselves.

Dimension key:  B batch   N image, M text, S all tokens   D model   T times   P parts of D
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import fast, rounded_blocks
from models.due import Due, settled
from models.fast import Stream, Wanted
from models.fp8 import linear, linear_of_few, mlp
from models.guidance import SemanticGuidance
from models.rounded_kernels import add_up

# of every block: (T, P D) each, of a step (1, P D); last, the time's embedding: (T, D)
Modulations = list[tuple[Tensor, ...]]


# ---- the arithmetic: functions of tensors


def double_block(
    x: Due,
    text: Due,
    modulations: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    w_image: Stream,
    w_text: Stream,
) -> tuple[Due, Due]:
    """One double block: (image, text) -> (image, text)."""
    x_BND, text_BMD = settled(x), settled(text)
    x_mod, text_mod = (m.chunk(6, dim=1) for m in modulations)
    out_BSD = _attend(
        rotary,
        (fast.modulated(text_BMD, *text_mod[:2]), w_text),
        (fast.modulated(x_BND, *x_mod[:2]), w_image),
    )
    text_out, x_out = out_BSD.split([text_BMD.shape[1], x_BND.shape[1]], dim=1)
    return _after_attention(x_BND, x_out, x_mod, w_image), _after_attention(
        text_BMD, text_out, text_mod, w_text
    )


def single_block(
    x: Due,
    modulation: Tensor,
    rotary: tuple[Tensor, Tensor],
    w: Stream,
    wanted: Wanted | None = None,
) -> Due:
    """One single block, on text and image tokens joined; fewer tokens if `wanted`."""
    x_BSD = settled(x)
    shift, scale, gate = modulation.chunk(3, dim=1)
    h_BSD = fast.modulated(x_BSD, shift, scale)
    out = _attend(rotary, (h_BSD, w), wanted=wanted)
    if wanted is not None:
        x_BSD, h_BSD = (fast.only(y, wanted) for y in (x_BSD, h_BSD))
    return Due(x_BSD, gate, (linear(out, w.out), mlp(h_BSD, w.up, w.down)))


def _attend(
    rotary: tuple[Tensor, Tensor], *streams: tuple[Tensor, Stream], wanted: Wanted | None = None
) -> Tensor:
    """Attention among the tokens of all streams joined: (B, S, D)."""
    q, k, v = fast.heads_of(rotary, *streams)
    return fast.attend(q if wanted is None else fast.only(q, wanted), k, v)


def _after_attention(x: Tensor, out: Tensor, modulation: tuple[Tensor, ...], w: Stream) -> Due:
    """The rest of one stream of a double block."""
    _, _, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    x = x + gate[:, None] * linear(out.contiguous(), w.out)
    return Due(x, gate_mlp, (mlp(fast.modulated(x, shift_mlp, scale_mlp), w.up, w.down),))


# ---- the model


class Blocks(NamedTuple):
    """How a model's blocks are computed."""

    double: Callable
    single: Callable
    sums: Callable
    terms: int = 1  # of the sums that the single blocks read


def install(
    flux: nn.Module, guidance: SemanticGuidance, compiled: bool, rounded: bool = False
) -> None:
    """Replace the forward of a flux that `merge.freeze` has rounded, its adapters folded in.

    Args:
        compiled: compile each kind of block; the first sample then takes half a minute.
        rounded: use models/rounded_blocks.py, which needs no compiling; `freeze` must have rounded
            with one unit a layer.
    """
    if compiled:
        fast.compile_guidance(guidance)
    streams_of = rounded_blocks.take if rounded else fast.streams_of
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        block.streams = streams_of(block)
    if rounded:
        blocks = Blocks(rounded_blocks.double_block, rounded_blocks.single_block, add_up)
    else:
        functions = [double_block, single_block, settled]
        if compiled:
            functions = [fast.compile_block(f, fast.BACKEND) for f in functions]
        blocks = Blocks(*functions, terms=2)
    forward = partial(_forward, flux, guidance, blocks)
    flux.forward = rounded_blocks.watched(forward) if rounded else forward


@torch.no_grad()
def modulations_at(
    flux: nn.Module, times: Tensor, guidance_scale: float, pooled_C: Tensor
) -> list[Modulations]:
    """What every block needs to know of the time, at each of `times` (T,)."""
    T = len(times)
    scale = torch.full((T,), guidance_scale, device=times.device)
    all_times = _modulations(flux, fast.embed_time(flux, times, scale, pooled_C.expand(T, -1)))
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
    blocks,
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
):
    """As models/fast.py's; `modulations` of this step, if at hand."""
    x_BND, text_BMD = flux.x_embedder(hidden_states), flux.context_embedder(encoder_hidden_states)
    if not modulations:
        temb_BD = fast.embed_time(flux, timestep, guidance, pooled_projections)
        modulations = _modulations(flux, temb_BD)
    (temb_BD,), modulations = modulations[-1], iter(modulations)
    rotary = flux.pos_embed(torch.cat([txt_ids, img_ids]))
    guide = (joint_attention_kwargs or {}).get("guidance")
    none_1D = temb_BD.new_zeros(1, temb_BD.shape[1])
    x, text = Due(x_BND, none_1D, (x_BND,)), Due(text_BMD, none_1D, (text_BMD,))
    for i, block in enumerate(flux.transformer_blocks):
        x, text = blocks.double(x, text, next(modulations), rotary, *block.streams)
        if guide is not None and str(i) in fuser.attention:
            x_BND = fuser.add(i, blocks.sums(x), guide)
            x = Due(x_BND, none_1D, (x_BND,))
    x_BSD, M = blocks.sums(text, x), text_BMD.shape[1]
    x = Due(x_BSD, none_1D, (x_BSD,) * blocks.terms)  # as after a block: one graph serves all
    *most, last = flux.single_transformer_blocks
    for block in most:
        x = blocks.single(x, *next(modulations), rotary, *block.streams)
    wanted = Wanted(M, infrared_rows) if infrared_rows else None
    x_BSD = blocks.sums(blocks.single(x, *next(modulations), rotary, *last.streams, wanted))
    x_BND = x_BSD if infrared_rows else x_BSD[:, M:]
    return (fast.finish(flux, x_BND, temb_BD, infrared_rows),)
