"""FLUX.2 klein: the photograph as reference tokens after those of the infrared image.

What differs from FLUX.1: tokens are 2 x 2 latent pixels of 32 channels, normalised by the
statistics that the autoencoder keeps; ids have four axes (image, row, column, word); one modulation
serves all blocks of a kind; klein has no guidance embedding; and Qwen3 reads the prompt, without a
pooled vector. Double blocks are few (5 of 25), so that `model.inject` counts on into the single
blocks.

Sources: diffusers' Flux2KleinPipeline, for ids, order of tokens, normalisation and prompt; it puts
reference images behind the noisy one at 10, 20, ... on the first axis.

Dimension key:  B batch   H, W pixels   N tokens of 16 x 16 pixels of one image   M text tokens
                S tokens of text and images together   D model
"""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models import flux as fluxes
from models.backbones.base import Condition, grid_ids
from models.backbones.reference import Reference
from models.codec import TOKEN, check_size, digest, pack, unpack
from models.flux import Prompt
from models.guidance import Guidance, SemanticGuidance

REFERENCE_IMAGE = 10  # of a reference image on the ids' first axis
PROMPT_FILE = "prompt_embeds.safetensors"  # in a folder that has no text encoder
BLOCK_PARAMETERS = {
    "Flux2TransformerBlock": [
        "hidden_states",
        "encoder_hidden_states",
        "temb_mod_img",
        "temb_mod_txt",
        "image_rotary_emb",
        "joint_attention_kwargs",
    ],
    "Flux2SingleTransformerBlock": [
        "hidden_states",
        "encoder_hidden_states",
        "temb_mod",
        "image_rotary_emb",
        "joint_attention_kwargs",
        "split_hidden_states",
        "text_seq_len",
    ],
}

# fmt: off
PRESETS = {
    "demo": dict(         # 4.6 M parameters
        num_layers=2, num_single_layers=4, num_attention_heads=6, attention_head_dim=32,
        joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8)),
    "small": dict(        # 46 M
        num_layers=3, num_single_layers=6, num_attention_heads=8, attention_head_dim=64,
        joint_attention_dim=256, axes_dims_rope=(16, 16, 16, 16)),
    "full-random": dict(  # 3.9 B, the architecture of FLUX.2 klein 4B
        num_layers=5, num_single_layers=20, num_attention_heads=24, attention_head_dim=128,
        joint_attention_dim=7680, axes_dims_rope=(32, 32, 32, 32)),
}
# fmt: on


class Flux2(Reference):
    """The state is the infrared image, (B, N, C) packed latents; the transformer sees (B, 2 N, C).

    C is 128 with FLUX.2's autoencoder, and 64 with the block cosine transform of the presets.
    """

    codec: Any  # one that says its number of `channels`
    in_channels = 128
    fast_blocks = False
    block_weights = 13  # queries, keys, values and output 4, the gated MLP 6 + 3

    def state_shape(self, H: int, W: int) -> tuple[int, int]:
        check_size(H, W)
        return (H // TOKEN) * (W // TOKEN), 4 * self.codec.channels

    def ids(self, H: int, W: int, device=None) -> Tensor:
        """(2 N, 4) fp32: image, row, column and word, of which an image has one."""
        images = [grid_ids(H, W, device, image) for image in (0, REFERENCE_IMAGE)]
        return F.pad(torch.cat(images), (0, 1))

    def places(self, H: int, W: int, device=None) -> Tensor:
        return self.ids(H, W, device)[:, 1:3]

    @classmethod
    def random(cls, preset: str, dtype: torch.dtype, device) -> nn.Module:
        return random_flux2(preset, dtype, device)

    @classmethod
    def load(cls, model_id: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        transformer, vae = load_flux2(model_id, dtype)
        return transformer, Flux2Codec(vae)

    @staticmethod
    def encode_prompt(model_id: str, prompt: str, tokens: int, device="cpu") -> Prompt:
        return encode_prompt(model_id, prompt, tokens, device)

    @staticmethod
    def patch(transformer: nn.Module, guidance: SemanticGuidance) -> None:
        patch_blocks(transformer, guidance)

    def arguments(
        self,
        tokens: Tensor,
        t: Tensor,
        guidance_scale: Tensor,
        prompt: tuple[Tensor, Tensor],
        condition: Condition,
    ) -> dict[str, Any]:
        text, _ = prompt
        M = text.shape[1]
        words = torch.arange(M, device=tokens.device, dtype=torch.float32)
        return dict(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=t,
            guidance=guidance_scale,  # a transformer without an embedding for it ignores it
            img_ids=self.ids(*condition.size, tokens.device),
            txt_ids=F.pad(words[:, None], (3, 0)),
            joint_attention_kwargs={"guidance": condition.guide, "text_tokens": M},
        )


class Flux2Codec(nn.Module):
    """The autoencoder of FLUX.2 (diffusers' AutoencoderKLFlux2).

    A latent is normalised by the running statistics of a batch norm over 128 channels: 32 at each
    of the 4 latent pixels of a token.
    """

    def __init__(self, vae: Any):
        super().__init__()
        self.channels = vae.config.latent_channels
        if tuple(vae.config.patch_size) != (2, 2):
            raise ValueError(f"the autoencoder has patches of {vae.config.patch_size}, not (2, 2)")
        self.vae = vae.requires_grad_(False).eval()

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 32, H/8, W/8) fp32: the posterior's mode, normalised."""
        with torch.autocast(image.device.type, enabled=False):
            latents = self.vae.encode(image.to(self.vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics()
        return _of_tokens(latents, lambda tokens: (tokens - mean) / std)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 32, h, w) -> (B, 3, 8h, 8w) fp32; image by image, for the memory it takes."""
        mean, std = self._statistics()
        latents = _of_tokens(latents, lambda tokens: tokens * std + mean).to(self.vae.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            images = [self.vae.decode(x).sample for x in latents.split(1)]
        return torch.cat(images).float()

    def identity(self) -> str:
        """Equal for codecs that give equal latents."""
        return f"{digest(self)} {self.vae.config.batch_norm_eps}"

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a token's channels, (128,) fp32 each."""
        bn: Any = self.vae.bn
        variance = bn.running_var.float() + self.vae.config.batch_norm_eps
        return bn.running_mean.float(), variance.sqrt()


def _of_tokens(latents: Tensor, change) -> Tensor:
    """Latents (B, C, h, w) of which `change` saw the tokens, (B, N, 4 C)."""
    return unpack(change(pack(latents)), *latents.shape[-2:])


def random_flux2(preset: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """A FLUX.2 of the real class with random weights, for the latents of the presets' codec.

    Modulations and output start at zero, as those of `models.flux.random_flux`.
    """
    if preset not in PRESETS:
        raise ValueError(f"model.preset is {preset!r}; known are {', '.join(PRESETS)}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            flux = _diffusers("Flux2Transformer2DModel")(
                in_channels=64, guidance_embeds=False, **PRESETS[preset]
            )
    finally:
        torch.set_default_dtype(before)
    if preset != "full-random":
        modulations = [m.linear for n, m in flux.named_children() if "modulation" in n]
        for layer in (*modulations, flux.norm_out.linear, flux.proj_out):
            nn.init.zeros_(layer.weight)
    return flux


def load_flux2(model_id: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Transformer and autoencoder of a FLUX.2 pipeline: a hub id or a local folder.

    Reads safetensors only.
    Raises: ValueError: it cannot be fetched or read, or is no FLUX.2.
    """
    kinds = {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"}
    found = {}
    for part, name in kinds.items():
        kind = _diffusers(name)
        try:
            config = kind.load_config(model_id, subfolder=part)
            if config.get("_class_name") != name:
                raise ValueError(f"its {part} is a {config.get('_class_name')}, not a {name}")
            found[part] = kind.from_pretrained(
                model_id, subfolder=part, torch_dtype=dtype, use_safetensors=True
            )
        except Exception as error:
            raise ValueError(_cannot_load(model_id, error)) from error
    needed = 4 * found["vae"].config.latent_channels
    if found["transformer"].config.in_channels != needed:
        raise ValueError(
            f"{model_id}: the transformer has {found['transformer'].config.in_channels} input"
            f" channels, its autoencoder's tokens have {needed}"
        )
    return found["transformer"], found["vae"]


def encode_prompt(model_id: str, prompt: str, tokens: int, device="cpu") -> Prompt:
    """Encode one prompt with klein's Qwen3, and free it; there is no pooled vector.

    A local folder may lack the text encoder (8 GB in klein 4B) and have PROMPT_FILE instead, with
    one tensor `prompt_embeds` (M, joint_attention_dim); `prompt` is then not read.

    Raises: ValueError: neither can be read, the prompt is longer than `tokens`, or the file has
        another number of them, another width, or values that are not finite.
    """
    folder = Path(model_id)
    if folder.is_dir() and not (folder / "text_encoder").is_dir():
        return _read_prompt(folder, tokens)
    if tokens > 512:
        raise ValueError(f"model.text_tokens is {tokens}; FLUX.2 klein was made for at most 512")
    try:
        pipeline = _diffusers("Flux2KleinPipeline").from_pretrained(
            model_id,
            transformer=None,
            vae=None,
            torch_dtype=torch.bfloat16,
            use_safetensors=True,
        )
    except Exception as error:
        raise ValueError(_cannot_load(model_id, error)) from error
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    length = len(pipeline.tokenizer(text).input_ids)
    if length > tokens:
        raise ValueError(
            f"model.prompt has {length} tokens in Qwen3's template, model.text_tokens is {tokens}"
        )
    with torch.no_grad():
        embedding, _ = pipeline.to(device).encode_prompt(
            prompt=prompt, max_sequence_length=tokens, device=device
        )
    del pipeline
    return Prompt(embedding[0].float().cpu(), torch.empty(0))


def _read_prompt(folder: Path, tokens: int) -> Prompt:
    path = folder / PROMPT_FILE
    try:
        embeds = load_file(str(path))["prompt_embeds"].float()
    except Exception as error:
        raise ValueError(
            f"{folder} has no text_encoder, and {PROMPT_FILE} with a tensor prompt_embeds"
            f" (tokens, width) cannot be read there either ({type(error).__name__}:"
            f" {fluxes.first_line(error)})"
        ) from error
    kind = _diffusers("Flux2Transformer2DModel")
    try:
        width = kind.load_config(str(folder), subfolder="transformer")["joint_attention_dim"]
    except Exception as error:
        raise ValueError(_cannot_load(str(folder), error)) from error
    if embeds.shape != (tokens, width):
        raise ValueError(
            f"prompt_embeds of {path} is {tuple(embeds.shape)}, needs ({tokens}, {width}): the"
            " first is model.text_tokens, the second the transformer's joint_attention_dim"
        )
    if not embeds.isfinite().all():
        raise ValueError(f"prompt_embeds of {path} has values that are not finite")
    return Prompt(embeds, torch.empty(0))


def _diffusers(name: str):
    """A class that not every supported version of diffusers has."""
    import diffusers

    if not hasattr(diffusers, "Flux2KleinPipeline"):
        raise ValueError(
            f"model.layout=flux2 needs diffusers 0.37 or newer, this is {diffusers.__version__}:"
            ' pip install "diffusers>=0.37"'
        )
    return getattr(diffusers, name)


def _cannot_load(model_id: str, error: Exception) -> str:
    return (
        f"cannot load FLUX.2 klein from {model_id!r} ({fluxes.first_line(error)}); set"
        " model.flux_fill_id to black-forest-labs/FLUX.2-klein-4B or to a local folder in"
        " diffusers' layout, or set model.preset"
    )


def patch_blocks(flux: nn.Module, guidance: SemanticGuidance) -> None:
    """Guide the blocks named in `guidance`, counted over double and then single blocks.

    Every block is patched: what travels for the guided ones is taken out before upstream's code.

    Raises:
        ValueError: a block index the model does not have.
        RuntimeError: diffusers calls its blocks in a way this file was not written for.
    """
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    for index in map(int, guidance.attention):
        if not 0 <= index < len(blocks):
            raise ValueError(
                f"model.inject names block {index}; the model has {len(blocks)}"
                f" ({len(flux.transformer_blocks)} double, then single ones)"
            )
    for index, block in enumerate(blocks):
        name, found = type(block).__name__, list(inspect.signature(block.forward).parameters)
        if found != BLOCK_PARAMETERS.get(name):
            raise RuntimeError(
                f"{name}.forward takes {found}, expected {BLOCK_PARAMETERS.get(name)}: this"
                " diffusers is not supported (see setup.py)"
            )
        double = index < len(flux.transformer_blocks)
        forward = _double_forward if double else _single_forward
        block.forward = partial(forward, guidance, index, block.forward)


def _double_forward(
    guidance,
    index,
    upstream,
    hidden_states,
    encoder_hidden_states,
    temb_mod_img,
    temb_mod_txt,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
):
    """Upstream's names in the signature (it calls us by keyword), ours from the next line on."""
    guide, _, rest = _take(joint_attention_kwargs)
    text_BMD, image_BND = upstream(
        hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, image_rotary_emb, rest
    )
    return text_BMD, guidance.add(index, image_BND, guide)


def _single_forward(
    guidance,
    index,
    upstream,
    hidden_states,
    encoder_hidden_states,
    temb_mod,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
):
    """As above; the stream has the text's tokens first."""
    guide, M, rest = _take(joint_attention_kwargs)
    joined_BSD = upstream(hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb, rest)
    if guide is None or not guidance.sees(index):
        return joined_BSD
    text_BMD, image_BND = joined_BSD[:, :M], joined_BSD[:, M:]
    return torch.cat([text_BMD, guidance.add(index, image_BND, guide)], dim=1)


def _take(joint_attention_kwargs: dict | None) -> tuple[Guidance | None, int, dict]:
    """Guidance and number of text tokens, and what is left for upstream."""
    rest = dict(joint_attention_kwargs or {})
    return rest.pop("guidance", None), rest.pop("text_tokens", 0), rest
