"""FLUX's blocks written for speed: the same arithmetic, frozen matrices merged, blocks compiled.

`install` replaces the forward of a FluxTransformer2DModel whose base is frozen. What it changes:
    q, k and v are one matrix; all that read x share its rounding; models/heads.py does the rest
    the single block's last matrix is two, so that attention and MLP are never copied side by side
    adapters on one input share one down-projection; their B's stay apart
    text and image stay joined from one single block to the next
    the last block is computed for the infrared panel alone where only that is wanted
    frozen matrices are bf16 or e4m3 (models/fp8.py)
Adapters and guidance keep their modules, names and checkpoints. The blocks are functions of
tensors, so that one compiled graph serves all blocks of a kind; shapes are static, one size a run.

Dimension key:  B batch   N image, M text, S all tokens   D model   h heads   d width of a head
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import attend, rotate
from models.fp8 import COMPILED_ROW, Frozen, Matrix, linear, linear_of_few
from models.guidance import SemanticGuidance
from models.heads import EPS, HeadStream, can_fuse, heads
from models.kernels import gelu
from models.lora import LoraLinear
from models.products import choose, gated_mlp, gated_sum
from models.shard import place

BACKEND = "inductor"
# a cat is written part by part: computing all parts for every element costs more than it saves
OPTIONS = {"max_pointwise_cat_inputs": 1}
RECOMPILES = 64  # training, sampling, first block, recomputation: each has its own graph


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


# the layers of each kind of block, by the name of the matrix that they become
STREAMS = {
    "image": {
        "modulation": ["norm1.linear"],
        "qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "out": ["attn.to_out.0"], "up": ["ff.net.0.proj"], "down": ["ff.net.2"],
    },
    "text": {
        "modulation": ["norm1_context.linear"],
        "qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "out": ["attn.to_add_out"], "up": ["ff_context.net.0.proj"], "down": ["ff_context.net.2"],
    },
}  # fmt: skip
SINGLE = {
    "modulation": ["norm.linear"],
    "qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "out": ["proj_out"], "up": ["proj_mlp"], "down": ["proj_out"],  # proj_out's columns, split
}  # fmt: skip


# ---- the arithmetic: functions of tensors


def double_block(x_BND: Tensor, text_BMD: Tensor, temb_BD: Tensor, rotary: tuple[Tensor, Tensor],
                 image: Stream, text: Stream) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One double block: (image, text) tokens -> (image, text) tokens."""
    M = text_BMD.shape[1]
    x_mod, text_mod = _modulation(temb_BD, image, 6), _modulation(temb_BD, text, 6)
    streams = (_modulated(text_BMD, *text_mod[:2]), text), (_modulated(x_BND, *x_mod[:2]), image)
    out_BSD = attend(*_heads(rotary, *streams))
    text_out, x_out = out_BSD.split([M, x_BND.shape[1]], dim=1)
    return _after_attention(x_BND, x_out, x_mod, image), _after_attention(
        text_BMD, text_out, text_mod, text
    )


def single_block(x_BSD: Tensor, temb_BD: Tensor, rotary: tuple[Tensor, Tensor], w: Stream,
                 wanted: Wanted | None = None) -> Tensor:  # fmt: skip
    """One single block, on text and image tokens joined; (B, S, D), or fewer tokens if `wanted`."""
    shift, scale, gate = _modulation(temb_BD, w, 3)
    x = _modulated(x_BSD, shift, scale)
    q, k, v = _heads(rotary, (x, w))
    if wanted is not None:  # the others are seen as keys and values, and end here
        q, x, x_BSD = (_only(y, wanted) for y in (q, x, x_BSD))
    out = attend(q, k, v)
    if w.adapters["up"] is None and w.adapters["out"] is None:
        x_BSD = gated_sum(x_BSD, gate, out, w.out)
        return gated_mlp(x_BSD, gate, x, w.up, w.down)
    (h,) = _adapted([linear(x, w.up)], x, [w.adapters["up"]])
    h = gelu(h)
    y = linear(out, w.out) + linear(h, w.down)
    (y,) = _adapted([y], torch.cat([out, h], dim=-1), [w.adapters["out"]])
    return x_BSD + gate[:, None] * y


def _only(x: Tensor, wanted: Wanted) -> Tensor:
    """The infrared panel's tokens of (B, S, ...). Slices: their gradient needs no scattering."""
    grid = x[:, wanted.first :].unflatten(1, (wanted.rows, 2, -1))  # rows x panels x columns
    return grid[:, :, 1].flatten(1, 2)


def _modulation(temb_BD: Tensor, w: Stream, parts: int) -> tuple[Tensor, ...]:
    return linear_of_few(F.silu(temb_BD), w.modulation).chunk(parts, dim=1)


def _modulated(x: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return x * (1 + scale_BD[:, None]) + shift_BD[:, None]


def _heads(rotary: tuple[Tensor, Tensor], *streams: tuple[Tensor, Stream]) -> list[Tensor]:
    """q, k, v of all streams joined: (B, S, h, d), q and k normalised and turned."""
    products = [linear(x, w.qkv) for x, w in streams]
    if can_fuse(products[0], len(streams[0][1].norm_q_d)):
        return heads(*rotary, [_head_stream(y, x, w) for y, (x, w) in zip(products, streams)])
    of_streams = []
    for y, (x, w) in zip(products, streams):
        parts = _adapted(y.chunk(3, dim=-1), x, [w.adapters[n] for n in "qkv"])
        q, k, v = (y.unflatten(-1, (-1, w.norm_q_d.shape[0])) for y in parts)
        of_streams.append((*(F.rms_norm(y, n.shape, n, EPS)
                             for y, n in ((q, w.norm_q_d), (k, w.norm_k_d))), v))  # fmt: skip
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
    h = _modulated(x, shift_mlp, scale_mlp)
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


def freeze(flux: nn.Module, device: torch.device | str,
           dtype: Literal["bf16", "fp32", "fp8", "fp8-small"],
           mesh: DeviceMesh | None = None) -> None:  # fmt: skip
    """Move `flux` to `device` block by block, each block's matrices merged (and rounded).

    So no more than one block exists twice, and the peak is that of the result. Do it after loading
    weights and adding adapters. "fp8" keeps a transposed copy of each matrix; "fp8-small" keeps
    none and rounds the modulations' matrices too: half the memory, slower. Sharded over a `mesh`,
    "fp8" keeps none either: it would double what is gathered.

    Raises: ValueError: an adapter sits on a layer that this file does not adapt.
    """
    transposed = dtype == "fp8" and mesh is None

    def merge(block: nn.Module) -> None:
        block.frozen = nn.ModuleDict()
        for kind, layers in _layers(block).items():
            adapted = [n for n in layers if isinstance(block.get_submodule(n), LoraLinear)]
            if kind.endswith("modulation") and adapted:
                raise ValueError(
                    f"lora_config.target_modules has {adapted[0]}, which model.compile and fp8 do"
                    " not support"
                )
            fp8 = dtype.startswith("fp8") and (dtype == "fp8-small" or "modulation" not in kind)
            matrix = _merge(block, layers, kind)
            block.frozen[kind] = Frozen(*matrix, fp8, transposed)
        _drop_originals(block)

    place(flux, device, mesh, merge)


def _merge(block: nn.Module, layers: list[str], kind: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers, one below the other; of proj_out, the columns for `kind`."""
    bases = [_base(block.get_submodule(n)) for n in layers]
    weight = torch.cat([b.weight.detach() for b in bases])
    bias = torch.cat([b.bias.detach() for b in bases])
    if layers != ["proj_out"]:
        return weight, bias
    D = len(weight)
    columns, bias = (slice(0, D), None) if kind == "out" else (slice(D, None), bias)
    return weight[:, columns].contiguous(), bias


def _drop_originals(block: nn.Module) -> None:
    for layers in _layers(block).values():
        for name in layers:
            base = _base(block.get_submodule(name))
            base.weight = base.bias = None


def _base(layer: nn.Module) -> nn.Linear:
    return layer.base if isinstance(layer, LoraLinear) else layer


def _layers(block: nn.Module) -> dict[str, list[str]]:
    """Name of the merged matrix -> names of its layers."""
    if hasattr(block, "proj_mlp"):
        return SINGLE
    return {f"{s}_{m}": names for s, of in STREAMS.items() for m, names in of.items()}


def install(flux: nn.Module, guidance: SemanticGuidance, compiled: bool,
            recompute_every: int = 0) -> None:  # fmt: skip
    """Replace the forward of a `freeze`d flux (this instance only).

    Args:
        guidance: its cross-attentions are added where it says, as `patch_blocks` does.
        compiled: compile each block (and cross-attention); the first steps then take a minute.
        recompute_every: recompute every n-th block in the backward pass: 1 all, 2 half, 0 none.
    """
    double, single = double_block, single_block
    if compiled:
        double, single = _compiled(double, BACKEND), _compiled(single, BACKEND)
        up = flux.transformer_blocks[0].frozen["image_up"].matrix()
        if up.weight_OI.dtype == torch.bfloat16:  # the only ones that models/products.py fuses
            choose(up.weight_OI.device)
    for block in flux.transformer_blocks:
        block.forward = partial(_run_double, block, double)
    for block in flux.single_transformer_blocks:
        block.forward = partial(_run_single, block, single)
    if compiled:
        for module in guidance.attention.values():
            for attention in module.values():
                attention.compile(dynamic=False, backend=BACKEND)
    flux.forward = partial(_forward, flux, guidance, recompute_every)


@cache
def _compiled(function: Callable, backend: str) -> Callable:
    torch._dynamo.config.recompile_limit = RECOMPILES
    if backend != "inductor":
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    _read_rows_once()
    return torch.compile(function, dynamic=False, fullgraph=True, options=OPTIONS)


def _read_rows_once() -> None:
    """Let inductor keep a whole row in registers when it reduces one, up to 4096 values.

    By itself it stops at 1024 and reads (and recomputes) longer rows two or three times: every norm
    and every rounding of this model.
    """
    before = InductorChoices.should_use_persistent_reduction

    def decide(features, cooperative_reduction: bool) -> bool:
        rows = features.get_reduction_hint() == ReductionHint.INNER
        if rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, COMPILED_ROW):
            return True
        return before(features, cooperative_reduction)

    InductorChoices.should_use_persistent_reduction = staticmethod(decide)


def _run_double(block, function, x_BND, text_BMD, temb_BD, rotary):
    attn = block.attn
    norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
    streams = [_stream(block, of, f"{name}_", *n) for (name, of), n in zip(STREAMS.items(), norms)]
    return function(x_BND, text_BMD, temb_BD, rotary, *streams)


def _run_single(block, function, x_BSD, temb_BD, rotary, wanted=None):
    stream = _stream(block, SINGLE, "", block.attn.norm_q, block.attn.norm_k)
    return function(x_BSD, temb_BD, rotary, stream, wanted)


def _stream(block, of: dict[str, list[str]], prefix: str, norm_q, norm_k) -> Stream:
    """Read anew at every call: FSDP and recomputation replace the tensors of a module."""
    matrices = {m: block.frozen[prefix + m].matrix() for m in of}
    layers = [*zip("qkv", of["qkv"]), *((m, of[m][0]) for m in ("out", "up", "down"))]
    adapters = {m: _adapter(block.get_submodule(n)) for m, n in layers}
    return Stream(**matrices, norm_q_d=norm_q.weight, norm_k_d=norm_k.weight, adapters=adapters)


def _adapter(layer: nn.Module) -> Adapter | None:
    if not isinstance(layer, LoraLinear):
        return None
    dropout = layer.dropout.p if layer.training else 0.0
    return Adapter(layer.lora_A.weight, layer.lora_B.weight, layer.scale, dropout)


def _forward(flux, fuser, recompute_every, hidden_states, encoder_hidden_states,
             pooled_projections, timestep, img_ids, txt_ids, guidance, joint_attention_kwargs=None,
             return_dict=False, infrared_rows=0):  # fmt: skip
    """Upstream's names in the signature (the caller passes them), ours from the next line on.

    infrared_rows: rows of the diptych's grid if only the infrared panel is wanted; the visible
        panel's velocity is then zero.
    """
    x_BND = flux.x_embedder(hidden_states)
    text_BMD = flux.context_embedder(encoder_hidden_states)
    times = (1000 * s.to(x_BND.dtype) for s in (timestep, guidance))
    temb_BD = flux.time_text_embed(*times, pooled_projections)
    rotary = flux.pos_embed(torch.cat([txt_ids, img_ids]))
    guide = (joint_attention_kwargs or {}).get("guidance")

    def run(index, block, *args):
        if recompute_every and index % recompute_every == 0 and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    for i, block in enumerate(flux.transformer_blocks):
        x_BND, text_BMD = run(i, block, x_BND, text_BMD, temb_BD, rotary)
        if guide is not None and str(i) in fuser.attention:
            x_BND = fuser.add(i, x_BND, guide)
    x_BSD, M = torch.cat([text_BMD, x_BND], dim=1), text_BMD.shape[1]
    *most, last = enumerate(flux.single_transformer_blocks)
    for i, block in most:
        x_BSD = run(i, block, x_BSD, temb_BD, rotary)
    if not infrared_rows:
        x_BND = run(*last, x_BSD, temb_BD, rotary)[:, M:]
        return (flux.proj_out(flux.norm_out(x_BND, temb_BD)),)
    x_BID = run(*last, x_BSD, temb_BD, rotary, Wanted(M, infrared_rows))
    velocity = flux.proj_out(flux.norm_out(x_BID, temb_BD)).unflatten(1, (infrared_rows, 1, -1))
    return (torch.cat([torch.zeros_like(velocity), velocity], dim=2).flatten(1, 3),)
