"""FLUX's blocks written for speed: the same arithmetic, merged matrices, compiled blocks.

`install` replaces the forward of a FluxTransformer2DModel whose base is frozen. What it changes:
    q, k and v are one matrix; all that read x share its rounding; fused_qkv.py does the rest
    the single block's last matrix is two, so that attention and MLP are never copied side by side
    adapters on one input share one down-projection; their B's stay apart
    text and image stay joined from one single block to the next
    the last block is computed for the infrared panel alone where only that is wanted
    frozen matrices are bf16 or e4m3 (models/fast/frozen_matrix.py)
Adapters and guidance keep their modules, names and checkpoints. The blocks are functions of
tensors, so that one compiled graph serves all blocks of a kind; shapes are static, one size a run.

Dimension key:  B batch   N image, M text, S all tokens   D model   h heads   d width of a head
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import attend, rotate
from models.backbones.base import FluxRunner
from models.fast import compilation
from models.fast.fp8_quantise import gelu
from models.fast.frozen_matrix import Matrix, linear, linear_of_few
from models.fast.fused_gemm import gated_mlp, gated_sum
from models.fast.fused_matrices import SINGLE, STREAMS
from models.fast.fused_qkv import EPS, HeadStream, can_fuse, heads
from models.guidance import SemanticGuidance
from models.lora import LoraLinear

BACKEND: str | Callable = compilation.backend


class Adapter(NamedTuple):
    A_rI: Tensor  # fp32
    B_Or: Tensor  # fp32
    scale: float
    dropout: float  # 0 in eval mode


class Stream(NamedTuple):
    """What a single block, or one stream of a double block, computes with."""

    modulation: Matrix
    qkv: Matrix
    out: Matrix
    up: Matrix
    down: Matrix
    norm_q_d: Tensor
    norm_k_d: Tensor
    adapters: dict[str, Adapter | None]


class Wanted(NamedTuple):
    """Where the infrared panel's tokens are among all: what the last block is computed for."""

    first: int  # image token; text is before it
    rows: int  # of the diptych's grid


# ---- the arithmetic: functions of tensors


def double_block(
    x_BND: Tensor,
    text_BMD: Tensor,
    temb_BD: Tensor,
    rotary: tuple[Tensor, Tensor],
    image: Stream,
    text: Stream,
) -> tuple[Tensor, Tensor]:
    """One double block: (image, text) tokens -> (image, text) tokens."""
    M = text_BMD.shape[1]
    x_mod, text_mod = _modulation(temb_BD, image, 6), _modulation(temb_BD, text, 6)
    streams = (modulated(text_BMD, *text_mod[:2]), text), (modulated(x_BND, *x_mod[:2]), image)
    out_BSD = attend(*heads_of(rotary, *streams))
    text_out, x_out = out_BSD.split([M, x_BND.shape[1]], dim=1)
    return _after_attention(x_BND, x_out, x_mod, image), _after_attention(
        text_BMD, text_out, text_mod, text
    )


def single_block(
    x_BSD: Tensor,
    temb_BD: Tensor,
    rotary: tuple[Tensor, Tensor],
    w: Stream,
    wanted: Wanted | None = None,
) -> Tensor:
    """One single block, on text and image tokens joined; (B, S, D), or fewer tokens if `wanted`."""
    shift, scale, gate = _modulation(temb_BD, w, 3)
    x = modulated(x_BSD, shift, scale)
    q, k, v = heads_of(rotary, (x, w))
    if wanted is not None:  # the others are seen as keys and values, and end here
        q, x, x_BSD = (only(y, wanted) for y in (q, x, x_BSD))
    out = attend(q, k, v)
    if w.adapters["up"] is None and w.adapters["out"] is None:
        x_BSD = gated_sum(x_BSD, gate, out, w.out)
        return gated_mlp(x_BSD, gate, x, w.up, w.down)
    (h,) = _adapted([linear(x, w.up)], x, [w.adapters["up"]])
    h = gelu(h)
    y = linear(out, w.out) + linear(h, w.down)
    (y,) = _adapted([y], torch.cat([out, h], dim=-1), [w.adapters["out"]])
    return x_BSD + gate[:, None] * y


def only(x: Tensor, wanted: Wanted) -> Tensor:
    """The infrared panel's tokens of (B, S, ...). Slices: their gradient needs no scattering."""
    grid = x[:, wanted.first :].unflatten(1, (wanted.rows, 2, -1))  # rows x panels x columns
    return grid[:, :, 1].flatten(1, 2)


def _modulation(temb_BD: Tensor, w: Stream, parts: int) -> tuple[Tensor, ...]:
    return linear_of_few(F.silu(temb_BD), w.modulation).chunk(parts, dim=1)


def modulated(x: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return x * (1 + scale_BD[:, None]) + shift_BD[:, None]


def heads_of(rotary: tuple[Tensor, Tensor], *streams: tuple[Tensor, Stream]) -> tuple[Tensor, ...]:
    """q, k, v of all streams joined: (B, S, h, d), q and k normalised and turned."""
    products = [linear(x, w.qkv) for x, w in streams]
    if can_fuse(products[0], len(streams[0][1].norm_q_d)):
        return heads(*rotary, [_head_stream(y, x, w) for y, (x, w) in zip(products, streams)])
    of_streams = []
    for y, (x, w) in zip(products, streams):
        parts = _adapted(y.chunk(3, dim=-1), x, [w.adapters[n] for n in "qkv"])
        q, k, v = (y.unflatten(-1, (-1, w.norm_q_d.shape[0])) for y in parts)
        of_streams.append(
            (*(F.rms_norm(y, n.shape, n, EPS) for y, n in ((q, w.norm_q_d), (k, w.norm_k_d))), v)
        )
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*of_streams))
    return rotate(q, *rotary), rotate(k, *rotary), v


def _head_stream(y: Tensor, x: Tensor, w: Stream) -> HeadStream:
    """What the kernel reads; of a layer without an adapter, zeros."""
    adapters = [w.adapters[n] for n in "qkv"]
    low, up = y.new_empty(0), y.new_empty(0)
    if present := [a for a in adapters if a is not None]:
        if present[0].dropout:
            x = F.dropout(x, present[0].dropout)
        none = torch.zeros_like(present[0].A_rI), torch.zeros_like(present[0].B_Or)
        A = torch.cat([none[0] if a is None else a.A_rI for a in adapters])
        up = torch.stack([none[1] if a is None else a.B_Or * a.scale for a in adapters])
        low, up = F.linear(x, A.to(x.dtype)), up.to(x.dtype)
    return HeadStream(y, low, up, w.norm_q_d, w.norm_k_d)


def _after_attention(x: Tensor, out: Tensor, modulation: tuple[Tensor, ...], w: Stream) -> Tensor:
    """The rest of one stream of a double block: output projection, MLP, both residuals."""
    _, _, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    out = out.contiguous()
    if w.adapters["out"] is None:
        x = gated_sum(x, gate, out, w.out)
    else:
        (y,) = _adapted([linear(out, w.out)], out, [w.adapters["out"]])
        x = x + gate[:, None] * y
    h = modulated(x, shift_mlp, scale_mlp)
    if w.adapters["up"] is None and w.adapters["down"] is None:
        return gated_mlp(x, gate_mlp, h, w.up, w.down)
    (h,) = _adapted([linear(h, w.up)], h, [w.adapters["up"]])
    h = gelu(h)
    (y,) = _adapted([linear(h, w.down)], h, [w.adapters["down"]])
    return x + gate_mlp[:, None] * y


def _adapted(parts, x: Tensor, adapters: list[Adapter | None]) -> list[Tensor]:
    """Each part of W x plus its adapter's scale * B A x; the A's share one product."""
    present = [a for a in adapters if a is not None]
    if not present:
        return list(parts)
    if present[0].dropout:
        x = F.dropout(x, present[0].dropout)
    A = torch.cat([a.A_rI for a in present]).to(x.dtype)
    low = iter(F.linear(x, A).split([a.A_rI.shape[0] for a in present], dim=-1))
    return [
        y if a is None else y + F.linear(next(low), (a.B_Or * a.scale).to(x.dtype))
        for y, a in zip(parts, adapters)
    ]


# ---- the model


def install(
    flux: nn.Module, guidance: SemanticGuidance, compiled: bool, recompute_every: int = 0
) -> None:
    """Replace the forward of a `freeze`d flux (this instance only).

    Args:
        guidance: its cross-attentions are added where it says, as `patch_blocks` does.
        compiled: compile each block (and cross-attention); the first steps then take a minute.
        recompute_every: recompute every n-th block in the backward pass: 1 all, 2 half, 0 none.
    """
    double, single = double_block, single_block
    if compiled:
        double, single = (compilation.compiled(f, BACKEND) for f in (double, single))
    for block in flux.transformer_blocks:
        block.forward = partial(_run_double, block, double)
    for block in flux.single_transformer_blocks:
        block.forward = partial(_run_single, block, single)
    if compiled:
        compile_guidance(guidance)
    flux.forward = partial(_forward, flux, guidance, recompute_every)


class TrainRunner(FluxRunner):
    """Calls a FLUX of `install`, which can leave out what leads only to the visible panel."""

    def velocity(self, inputs: dict[str, Any], infrared_rows: int, prepared: Any) -> Tensor:
        return self.flux(**inputs, infrared_rows=infrared_rows)[0]


def compile_guidance(guidance: SemanticGuidance) -> None:
    for module in guidance.attention.values():
        for attention in module.values():
            attention.compile(dynamic=False, backend=BACKEND)


def _run_double(block, function, x_BND, text_BMD, temb_BD, rotary):
    return function(x_BND, text_BMD, temb_BD, rotary, *streams_of(block))


def _run_single(block, function, x_BSD, temb_BD, rotary, wanted=None):
    return function(x_BSD, temb_BD, rotary, *streams_of(block), wanted)


def streams_of(block: nn.Module) -> list[Stream]:
    """Image and text of a double block; a single block has one.

    Read anew at every call: FSDP and recomputation replace the tensors of a module.
    """
    attn = block.attn
    if hasattr(block, "proj_mlp"):
        return [_stream_of(block, SINGLE, "", attn.norm_q, attn.norm_k)]
    norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
    return [_stream_of(block, of, f"{name}_", *n) for (name, of), n in zip(STREAMS.items(), norms)]


def _stream_of(block, of: dict[str, list[str]], prefix: str, norm_q, norm_k) -> Stream:
    matrices = {m: block.frozen[prefix + m].matrix() for m in of}
    layers = [*zip("qkv", of["qkv"]), *((m, of[m][0]) for m in ("out", "up", "down"))]
    adapters = {m: _adapter(block.get_submodule(n)) for m, n in layers}
    return Stream(**matrices, norm_q_d=norm_q.weight, norm_k_d=norm_k.weight, adapters=adapters)


def _adapter(layer: nn.Module) -> Adapter | None:
    if not isinstance(layer, LoraLinear):
        return None
    dropout = layer.dropout.p if layer.training else 0.0
    return Adapter(layer.lora_A.weight, layer.lora_B.weight, layer.scale, dropout)


def _forward(
    flux,
    fuser,
    recompute_every,
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
):
    """Upstream's names in the signature (the caller passes them), ours from the next line on.

    infrared_rows: rows of the diptych's grid if only the infrared panel is wanted; the visible
        panel's velocity is then zero.
    """
    x_BND = flux.x_embedder(hidden_states)
    text_BMD = flux.context_embedder(encoder_hidden_states)
    temb_BD = embed_time(flux, timestep, guidance, pooled_projections)
    rotary = flux.pos_embed(torch.cat([txt_ids, img_ids]))
    guide = (joint_attention_kwargs or {}).get("guidance")

    def run(index, block, *args):
        if recompute_every and index % recompute_every == 0 and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    for i, block in enumerate(flux.transformer_blocks):
        x_BND, text_BMD = run(i, block, x_BND, text_BMD, temb_BD, rotary)
        x_BND = fuser.add(i, x_BND, guide)
    x_BSD, M = torch.cat([text_BMD, x_BND], dim=1), text_BMD.shape[1]
    *most, last = enumerate(flux.single_transformer_blocks)
    for i, block in most:
        x_BSD = run(i, block, x_BSD, temb_BD, rotary)
    if not infrared_rows:
        return (finish(flux, run(*last, x_BSD, temb_BD, rotary)[:, M:], temb_BD),)
    x_BID = run(*last, x_BSD, temb_BD, rotary, Wanted(M, infrared_rows))
    return (finish(flux, x_BID, temb_BD, infrared_rows),)


def embed_time(flux: nn.Module, t_B: Tensor, guidance_B: Tensor, pooled_BC: Tensor) -> Tensor:
    """(B, D) of time, guidance scale and prompt."""
    times = (1000 * s.to(pooled_BC.dtype) for s in (t_B, guidance_B))
    return flux.time_text_embed(*times, pooled_BC)


def finish(flux: nn.Module, x: Tensor, temb_BD: Tensor, infrared_rows: int = 0) -> Tensor:
    """Velocity (B, N, C) of the last block's image tokens, or of the infrared panel's alone."""
    velocity = flux.proj_out(flux.norm_out(x, temb_BD))
    if not infrared_rows:
        return velocity
    velocity = velocity.unflatten(1, (infrared_rows, 1, -1))
    return torch.cat([torch.zeros_like(velocity), velocity], dim=2).flatten(1, 3)
