"""FLUX.1-Fill's transformer: random presets, the real weights, guidance patched into its blocks.

diffusers has no hook between blocks, so `patch_blocks` replaces `forward` on block *instances*; the
classes, and any other FLUX in the process, stay as they were. The new forward calls the old one,
then adds the cross-attention to the image stream. It never repeats upstream code.

The guidance travels in `joint_attention_kwargs`: an attribute would be wrong when gradient
checkpointing runs a block again (and diffusers <= 0.34 drops the kwargs there).

Dimension key:  B batch   N image tokens   M text tokens   D model
"""

import inspect
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FluxFillPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import FluxAttention
from models.guidance import SemanticGuidance

BLOCK_PARAMETERS = [
    "hidden_states",
    "encoder_hidden_states",
    "temb",
    "image_rotary_emb",
    "joint_attention_kwargs",
]
CLIP_TOKENS = 77
MODULATIONS = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")


@dataclass(kw_only=True, frozen=True)
class FluxSize:
    """The arguments of FluxTransformer2DModel that define a size; widths in channels."""

    num_layers: int  # double blocks
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int  # width of a text token
    pooled_projection_dim: int
    axes_dims_rope: tuple[int, int, int]  # their sum is attention_head_dim


# fmt: off
PRESETS = {
    "demo": FluxSize(         # 5 M parameters
        num_layers=2, num_single_layers=4, num_attention_heads=6, attention_head_dim=32,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(4, 14, 14)),
    "small": FluxSize(        # 54 M
        num_layers=3, num_single_layers=6, num_attention_heads=8, attention_head_dim=64,
        joint_attention_dim=256, pooled_projection_dim=256, axes_dims_rope=(8, 28, 28)),
    "full-random": FluxSize(  # 11.9 B, the architecture of FLUX.1
        num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=128,
        joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56)),
}
# fmt: on


class Prompt(NamedTuple):
    """One constant prompt, encoded once."""

    tokens_MC: Tensor  # (M, joint_attention_dim)
    pooled_C: Tensor  # (pooled_projection_dim,); (0,) for FLUX.2, which has none


def random_flux(
    preset: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    in_channels: int = 384,
    out_channels: int = 64,
    zero_output: bool = True,
) -> FluxTransformer2DModel:
    """A FLUX of the real class with random weights.

    The modulations and the output start at zero, as in DiT (arXiv:2212.09748, Sec. 3.2,
    adaLN-Zero), so that a small one can be trained from scratch; shapes and cost are the real ones.

    Args:
        in_channels, out_channels: of an image token.
        zero_output: False where layers after the transformer start at zero.
    """
    if preset not in PRESETS:
        raise ValueError(f"model.preset is {preset!r}; known are {', '.join(PRESETS)}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            flux = FluxTransformer2DModel(
                in_channels=in_channels,
                out_channels=out_channels,
                guidance_embeds=True,
                **asdict(PRESETS[preset]),
            )
    finally:
        torch.set_default_dtype(before)
    if preset != "full-random":
        for name, module in flux.named_modules():
            if name.endswith(MODULATIONS):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_output:
            nn.init.zeros_(flux.proj_out.weight)
            nn.init.zeros_(flux.proj_out.bias)
    return flux


def random_prompt(flux: FluxTransformer2DModel, tokens: int) -> Prompt:
    """The prompt of a random preset: fixed normal vectors (a random FLUX knows no words)."""
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, flux.config.joint_attention_dim)
    return Prompt(
        torch.randn(shape, generator=generator),
        torch.randn(flux.config.get("pooled_projection_dim", 0), generator=generator),
    )


def load_flux(
    flux_fill_id: str, dtype: torch.dtype, in_channels: int = 384
) -> tuple[FluxTransformer2DModel, AutoencoderKL]:
    """Transformer and autoencoder of a FLUX.1 pipeline: a hub id or a local folder.

    Reads safetensors only.
    Raises: ValueError: it cannot be fetched or read, or has other input channels: a Fill model has
        384 (64 noisy + 64 masked + 256 mask), FLUX.1-dev and Kontext 64.
    """
    try:
        flux = FluxTransformer2DModel.from_pretrained(
            flux_fill_id, subfolder="transformer", torch_dtype=dtype, use_safetensors=True
        )
        vae = AutoencoderKL.from_pretrained(
            flux_fill_id, subfolder="vae", torch_dtype=dtype, use_safetensors=True
        )
    except Exception as error:
        raise ValueError(_cannot_load(flux_fill_id, error)) from error
    if flux.config.in_channels != in_channels:
        raise ValueError(
            f"{flux_fill_id} has {flux.config.in_channels} input channels, model.layout needs"
            f" {in_channels}: diptych and channels are for FLUX.1-Fill (384), reference for"
            " FLUX.1-dev and Kontext (64)"
        )
    return flux, vae


def encode_prompt(flux_fill_id: str, prompt: str, tokens: int, device="cpu") -> Prompt:
    """Encode one prompt with CLIP and T5, and free both encoders.

    Raises: ValueError: the encoders cannot be read, or CLIP would cut the prompt at 77 tokens.
    """
    try:
        pipeline = FluxFillPipeline.from_pretrained(
            flux_fill_id,
            transformer=None,
            vae=None,
            torch_dtype=torch.bfloat16,
            use_safetensors=True,
        )
    except Exception as error:
        raise ValueError(_cannot_load(flux_fill_id, error)) from error
    length = len(pipeline.tokenizer(prompt).input_ids)
    if length > CLIP_TOKENS:
        raise ValueError(f"model.prompt has {length} CLIP tokens, CLIP reads {CLIP_TOKENS}")
    if tokens > 512:
        raise ValueError(f"model.text_tokens is {tokens}; FLUX was trained with at most 512")
    with torch.no_grad():
        embedding, pooled, _ = pipeline.to(device).encode_prompt(
            prompt=prompt, prompt_2=prompt, max_sequence_length=tokens, device=device
        )
    del pipeline
    return Prompt(embedding[0].float().cpu(), pooled[0].float().cpu())


def _cannot_load(flux_fill_id: str, error: Exception) -> str:
    return (
        f"cannot load FLUX from {flux_fill_id!r} ({first_line(error)}); set model.flux_fill_id"
        " to a local folder in diffusers' layout, or accept the licence of FLUX.1-Fill-dev on the"
        " hub and log in, or set model.preset"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def patch_blocks(flux: FluxTransformer2DModel, guidance: SemanticGuidance) -> None:
    """Guide the double blocks named in `guidance`, and give every block our attention.

    Raises:
        ValueError: a block index the model does not have.
        RuntimeError: diffusers calls its blocks in a way this file was not written for.
    """
    blocks = flux.transformer_blocks
    for block in [*blocks, *flux.single_transformer_blocks]:
        found = list(inspect.signature(block.forward).parameters)
        if found != BLOCK_PARAMETERS:
            name = type(block).__name__
            raise RuntimeError(
                f"{name}.forward takes {found}, expected {BLOCK_PARAMETERS}: this diffusers is not"
                " supported (see setup.py)"
            )
        block.attn.processor = FluxAttention()
    for index in map(int, guidance.attention):
        if not 0 <= index < len(blocks):
            raise ValueError(f"model.inject names block {index}; the model has {len(blocks)}")
        blocks[index].forward = partial(
            _guided_forward, partial(guidance.add, index), blocks[index].forward
        )


def recompute_blocks(flux: FluxTransformer2DModel, every: int) -> None:
    """Recompute every n-th block in the backward pass: 1 all (least memory), 2 half."""
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    chosen = {id(block) for block in blocks[::every]}

    def run(block, *args):
        if id(block) in chosen:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    flux.enable_gradient_checkpointing(run)


def _guided_forward(
    add,
    upstream,
    hidden_states,
    encoder_hidden_states,
    temb,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
):
    """Upstream's names in the signature (it calls us by keyword), ours from the next line on."""
    kwargs = dict(joint_attention_kwargs or {})
    guidance = kwargs.pop("guidance", None)
    text_BMD, image_BND = upstream(
        hidden_states, encoder_hidden_states, temb, image_rotary_emb, kwargs
    )
    return text_BMD, add(image_BND, guidance)
