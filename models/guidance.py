"""Guidance: the decomposition's maps as tokens that chosen FLUX blocks attend to.

    x <- x + sum over maps of W_o attention(q = LN(x) W_q, k = tokens W_k, v = tokens W_v)

W_o starts at zero, so that the guided model starts bit-equal to the original. Rotary positions are
those of the *panel*: a token of the infrared half and one of the visible half that show the same
place have the same position, and so has the guidance token of that place.

Dimension key:  B batch   N image tokens of the diptych   K guidance tokens (one panel)   D model
                G = 64 width of a guidance token   h heads   d width of a head   H, W pixels
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import CastLinear, attend, rotate
from models.codec import TOKEN
from models.decomposition import DecompositionConfig as Maps
from utils.problems import refuse

MAP_CHANNELS = dict(intensity=1, material=Maps.num_materials, context=Maps.num_context_channels)
WIDTH, HEADS, HEAD_WIDTH = 64, 8, 64
ROTARY_BASE = 64.0  # wavelengths of 6 to 400 tokens: panels have 4 to 64 tokens a side
LOCALITY = 2.0  # start of the q and k biases; 2 lets a place attend to itself and near neighbours


class Guidance(NamedTuple):
    """What travels in joint_attention_kwargs["guidance"] (and survives recomputation there)."""

    tokens: dict[str, Tensor]  # map name -> (B, K, G)
    query_rotary: tuple[Tensor, Tensor]  # cos, sin: (N, d)
    key_rotary: tuple[Tensor, Tensor]  # cos, sin: (K, d)


class SemanticCrossAttention(nn.Module):
    """Image tokens (B, N, D) attend to guidance tokens (B, K, G); returns the change (B, N, D)."""

    def __init__(self, query_dim: int, token_dim: int = WIDTH, heads: int = HEADS):
        super().__init__()
        inner = heads * HEAD_WIDTH
        self.heads = heads
        self.to_q = CastLinear(query_dim, inner)
        self.to_k = CastLinear(token_dim, inner)
        self.to_v = CastLinear(token_dim, inner)
        self.to_out = CastLinear(inner, query_dim)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)
        # Equal constant parts of q and k, turned by rotary positions, have the inner product
        # sum_f cos(f * distance): largest at the token's own place, before anything is learned.
        constant = torch.tensor([LOCALITY, 0.0]).repeat(inner // 2)
        for projection in (self.to_q, self.to_k):
            projection.bias.data.copy_(constant)

    def forward(self, x_BND: Tensor, tokens_BKG: Tensor, guidance: Guidance) -> Tensor:
        x = F.layer_norm(x_BND, x_BND.shape[-1:])
        tokens = tokens_BKG.to(x_BND.dtype)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, HEAD_WIDTH))
            for f, y in ((self.to_q, x), (self.to_k, tokens), (self.to_v, tokens))
        )
        out = attend(rotate(q, *guidance.query_rotary), rotate(k, *guidance.key_rotary), v)
        return self.to_out(out).to(x_BND.dtype)


def unknown_maps(inject: dict[int, list[str]]) -> Iterator[str]:
    """A sentence for each block that names an unknown map, or none."""
    for block, maps in inject.items():
        unknown = sorted(set(maps) - MAP_CHANNELS.keys())
        if unknown or not maps:
            yield (
                f"model.inject: block {block} names {', '.join(unknown) or 'no maps'};"
                f" known are {', '.join(MAP_CHANNELS)}"
            )


class SemanticGuidance(nn.Module):
    """Maps -> guidance tokens, and the cross-attentions of the guided blocks.

    Args:
        model_dim: D of the transformer.
        inject: block index -> names of the maps it sees; {} switches guidance off.
        separate: one token set and one cross-attention per map; else all maps are mixed by 1x1
            convolutions 41-64-64 into one token set, with one cross-attention per block.

    Raises: ValueError: an unknown map, or a block without maps.
    """

    def __init__(self, model_dim: int, inject: dict[int, list[str]], separate: bool = True):
        super().__init__()
        refuse(unknown_maps(inject))
        used = [m for m in MAP_CHANNELS if any(m in maps for maps in inject.values())]
        self.separate = separate
        self.project = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        if separate:
            self.project.update({m: CastLinear(MAP_CHANNELS[m], WIDTH) for m in used})
        elif inject:
            channels = sum(MAP_CHANNELS.values())
            self.project["unified"] = nn.Sequential(
                nn.Conv2d(channels, WIDTH, 1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 1)
            )
        for block, maps in inject.items():
            names = maps if separate else ["unified"]
            self.attention[str(block)] = nn.ModuleDict(
                {name: SemanticCrossAttention(model_dim) for name in names}
            )

    def forward(
        self, intensity: Tensor, material: Tensor, context: Tensor, places: Tensor
    ) -> Guidance:
        """Maps of one panel -> tokens.

        Args:
            intensity: (B, 1, H, W) in [0, 1].
            material: (B, 32, H, W) logits; their softmax becomes the tokens.
            context: (B, 8, H, W).
            places: (N, 2) row and column of each image token in its own panel.
        """
        H, W = intensity.shape[-2:]
        rows, columns = H // TOKEN, W // TOKEN
        maps = {"intensity": intensity, "material": material.softmax(1), "context": context}
        small = {m: F.avg_pool2d(x.float(), TOKEN) for m, x in maps.items()}
        if self.separate:
            tokens = {m: f(small[m].flatten(2).mT) for m, f in self.project.items()}
        else:
            mixed = torch.cat([small[m] for m in MAP_CHANNELS], dim=1)
            tokens = {m: f(mixed).flatten(2).mT for m, f in self.project.items()}
        index = torch.arange(rows * columns, device=intensity.device)
        return Guidance(
            tokens, panel_rotary(*places.unbind(1)), panel_rotary(index // columns, index % columns)
        )

    def sees(self, block: int) -> bool:
        """Whether double block `block` is guided."""
        return str(block) in self.attention

    def add(self, block: int, x_BND: Tensor, guidance: Guidance | None) -> Tensor:
        """The image stream after double block `block`, with what its cross-attentions add.

        The only place where guidance enters a block: the plain patch and all fast blocks call it.
        Without guidance, or in an unguided block, the stream is returned unchanged.
        """
        if guidance is None or not self.sees(block):
            return x_BND
        for name, attention in self.attention[str(block)].items():
            x_BND = x_BND + attention(x_BND, guidance.tokens[name], guidance)
        return x_BND


def panel_rotary(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, d): half of a head's pairs turn by row, half by column."""
    pairs = HEAD_WIDTH // 4
    index = torch.arange(pairs, device=row.device, dtype=torch.float32)
    frequency = ROTARY_BASE ** (-index / pairs)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=-1)
    angle = angle.repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()
