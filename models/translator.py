"""The guided model: visible photograph + noise -> velocity of the [visible | infrared] diptych.

    data      = pack(encode([visible | infrared]))                       (B, N, 64)
    masked    = pack(encode([visible | mid grey])), mask                 (B, N, 64), (B, N, 256)
    velocity  = FLUX([noisy, masked, mask], t, prompt, guidance(decomposition(visible)))

Dimension key:  B batch   N = 2 * H/16 * W/16 image tokens   M text tokens   C = 64 channels
                H, W pixels of one panel
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models import codec as codecs
from models import flux as fluxes
from models.decomposition import DecompositionConfig, Maps
from models.guidance import Guidance, SemanticGuidance
from models.lora import LoraConfig, add_lora
from models.stage1 import Stage1, Stage1Output

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(kw_only=True)
class TranslatorConfig:
    flux_fill_id: str | None = None  # hub id or local folder of FLUX.1-Fill; excludes `preset`
    preset: Literal["demo", "small", "full-random"] | None = None  # a random FLUX, no download
    train_base: bool = False  # train all of FLUX, not only adapters; what a random one needs
    fast: Literal["auto", "off"] = "auto"  # off: the plain model, nothing of models/fast
    # of one GPU; auto: from the card; the three keys that it decides are printed (models/fast)
    memory: Literal["auto", "24g", "48g", "80g", "140g"] | None = "auto"
    # of the frozen weights; None: as `memory` says, else bf16
    base_dtype: Literal["bf16", "fp32", "fp8", "fp8-small"] | None = None
    compile: bool | None = None  # compile the blocks; None: as `memory` says, else no
    shard_base: bool = False  # each process holds 1/n of the frozen weights; one process: no effect
    prompt: str = "a thermal infrared photograph of the same scene"
    text_tokens: int = 512  # M, the same in training and sampling
    training_guidance: float = 1.0  # FLUX's guidance embedding while training
    # recompute every n-th block in the backward pass: 1 = all, for the least memory, 2 = half,
    # 0 = none; None: as `memory` says, else none
    gradient_checkpointing: int | None = None
    decomposition_checkpoint: str | None = None  # best_model.pth of stage 1
    # of stage 1's network; taken from decomposition_checkpoint
    decomposition: DecompositionConfig = field(default_factory=DecompositionConfig)
    physics: bool = True  # stage 1 has a fusion; taken from decomposition_checkpoint
    freeze_decomposition: bool = True
    train_batchnorm: bool = False  # update BatchNorm's running statistics when not frozen
    use_separate_guidance: bool = True  # one cross-attention a map, else one for all
    inject: dict[int, list[str]] = field(  # double block -> maps it sees; {} = no guidance
        default_factory=lambda: {6: ["intensity"], 12: ["intensity", "material", "context"]}
    )
    lora_config: LoraConfig = field(default_factory=LoraConfig)


class Prediction(NamedTuple):
    velocity: Tensor  # (B, N, C)
    data: Tensor  # (B, N, C) latents of the true diptych
    stage1: Stage1Output  # the maps that guided it, fp32


class PromptEmbedding(nn.Module):
    """The one constant prompt; travels with every checkpoint, so that sampling needs no encoder."""

    saved_when_frozen = True

    def __init__(self, prompt: fluxes.Prompt):
        super().__init__()
        self.register_buffer("tokens", prompt.tokens_MC)
        self.register_buffer("pooled", prompt.pooled_C)


class FluxRunner:
    """How FLUX is called. This one calls the patched model; models/fast has others."""

    def __init__(self, flux: nn.Module):
        self.flux = flux

    def velocity(self, inputs: dict[str, Any], infrared_rows: int, prepared: Any) -> Tensor:
        """The velocity (B, N, C).

        Args:
            inputs: the arguments of FluxTransformer2DModel.forward.
            infrared_rows: rows of the diptych's grid where only the infrared panel is wanted, else
                0; a runner may then return zeros for the visible panel. This one computes both.
            prepared: this time's entry of `prepare`.
        """
        return self.flux(**inputs, return_dict=False)[0]

    def prepare(self, times: Tensor, guidance_scale: float, pooled_C: Tensor) -> list[Any]:
        """What the velocity at each of `times` (T,) can be given; here nothing."""
        return [None] * len(times)


class Translator(nn.Module):
    """FLUX with adapters and guidance, the codec, and the stage 1 network that guides it.

    Args:
        stage1: its maps guide FLUX; frozen (and in eval mode) as `cfg` says.
        flux, codec, prompt: from `make_translator`.
    """

    def __init__(
        self,
        cfg: TranslatorConfig,
        flux: nn.Module,
        codec: nn.Module,
        prompt: fluxes.Prompt,
        stage1: Stage1,
    ):
        super().__init__()
        self.cfg = cfg
        self.flux = flux.requires_grad_(cfg.train_base)
        add_lora(self.flux, cfg.lora_config)
        self.guidance = SemanticGuidance(flux.inner_dim, cfg.inject, cfg.use_separate_guidance)
        fluxes.patch_blocks(self.flux, self.guidance)
        self.codec = codec.requires_grad_(False)
        self.prompt = PromptEmbedding(prompt)
        self.stage1 = stage1.requires_grad_(not cfg.freeze_decomposition)
        self.stage1.saved_when_frozen = True
        self.runner: FluxRunner = FluxRunner(self.flux)
        if cfg.gradient_checkpointing:
            fluxes.recompute_blocks(self.flux, cfg.gradient_checkpointing)
        self.train()

    def train(self, mode: bool = True) -> "Translator":
        """Frozen nets stay in eval mode, also when the parent is set to train."""
        super().train(mode)
        self.codec.eval()
        if self.cfg.freeze_decomposition or not self.cfg.train_batchnorm:
            self.stage1.eval()
        return self

    def forward(
        self,
        visible: Tensor,
        infrared: Tensor,
        noise: Tensor,
        t: Tensor,
        encoded: tuple[Tensor, Tensor] | None = None,
        infrared_only: bool = False,
    ) -> Prediction:
        """One training step's prediction.

        Args:
            visible, infrared: (B, 3, H, W) in [0, 1].
            noise: (B, N, 64) standard normal.
            t: (B,) in (0, 1); it must already be rounded by `round_time`.
            encoded: `encode` of visible with infrared, and of visible alone, if at hand.
            infrared_only: see `velocity`.
        """
        data, masked = encoded or (self.encode(visible, infrared), self.encode(visible))
        seen = self.decompose(visible)
        noisy = torch.lerp(data, noise, t.view(-1, 1, 1))
        guide = self.guide(seen.maps)
        velocity = self.velocity(
            noisy, masked, t, guide, visible.shape[-2:], self.cfg.training_guidance, infrared_only
        )
        return Prediction(velocity, data, seen)

    def decompose(self, visible: Tensor) -> Stage1Output:
        """Stage 1's maps and fused image in fp32, outside autocast; no graph when frozen."""
        train = torch.is_grad_enabled() and not self.cfg.freeze_decomposition
        with torch.autocast(visible.device.type, enabled=False), torch.set_grad_enabled(train):
            return self.stage1(visible.float())

    def guide(self, maps: Maps) -> Guidance | None:
        """Guidance tokens of the maps, or None where guidance is off."""
        if not self.cfg.inject:
            return None
        with torch.autocast(maps.intensity.device.type, enabled=False):
            return self.guidance(maps.intensity, maps.material, maps.context)

    @torch.no_grad()
    def encode(self, visible: Tensor, infrared: Tensor | None = None) -> Tensor:
        """Packed latents (B, N, 64) fp32 of the diptych; the infrared is mid grey if not given."""
        grey = torch.full_like(visible, 0.5) if infrared is None else infrared
        return codecs.pack(self.codec.encode(codecs.compose_diptych(visible, grey))).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Packed latents (B, N, 64) -> infrared (B, 1, H, W) in [0, 1]."""
        H, W = size
        cells = codecs.unpack(latents, H // codecs.CELL, 2 * W // codecs.CELL)
        return codecs.infrared_panel(self.codec.decode(cells))

    def velocity(
        self,
        noisy: Tensor,
        masked: Tensor,
        t: Tensor,
        guide: Guidance | None,
        size: tuple[int, int],
        guidance_scale: float,
        infrared_only: bool = False,
        prepared: Any = None,
    ) -> Tensor:
        """FLUX's velocity (B, N, 64) of a packed noisy diptych at time t.

        bf16 weights run outside autocast, in bf16 throughout: autocast lifts every norm to fp32.
        Args:
            infrared_only: the visible panel's velocity is not needed. A fast runner then leaves out
                what leads only there, and it is zero.
            prepared: this time's entry of `prepare`, with the same guidance_scale.
        """
        H, W = size
        B, device, dtype = noisy.shape[0], noisy.device, self.base_dtype
        mask = codecs.pack_mask(H, W, device).expand(B, -1, -1)
        tokens = self.prompt.tokens.expand(B, -1, -1).to(dtype)
        infrared_rows = H // codecs.TOKEN if infrared_only else 0
        ambient = torch.is_autocast_enabled(device.type) and dtype == torch.float32
        with torch.autocast(device.type, torch.bfloat16, enabled=ambient):
            inputs = dict(
                hidden_states=torch.cat([noisy, masked, mask], dim=-1).to(dtype),
                encoder_hidden_states=tokens,
                pooled_projections=self.prompt.pooled.expand(B, -1).to(dtype),
                timestep=t,
                guidance=torch.full((B,), guidance_scale, device=device),
                img_ids=codecs.token_positions(H, W, device),
                txt_ids=torch.zeros(tokens.shape[1], 3, device=device),
                joint_attention_kwargs={"guidance": guide},
            )
            return self.runner.velocity(inputs, infrared_rows, prepared)

    def run_with(self, runner: FluxRunner) -> None:
        """Let another runner call FLUX from now on."""
        self.runner = runner

    def prepare(self, times: Tensor, guidance_scale: float) -> list[Any]:
        """What `velocity` can be given at each of `times` (T,), computed all at once."""
        pooled = self.prompt.pooled.to(self.base_dtype)
        return self.runner.prepare(times, guidance_scale, pooled)

    @property
    def base_dtype(self) -> torch.dtype:
        embedder = self.flux.context_embedder
        return getattr(embedder, "base", embedder).weight.dtype  # it may have an adapter

    def round_time(self, t: Tensor) -> Tensor:
        """t as FLUX will see it: diffusers rounds it to the activations' dtype, bf16 or fp32.

        Noisy latents must be mixed with the same t (bf16 has 8 bits: t = 0.999 becomes 1.0).
        """
        return t.to(self.base_dtype).float()

    def step_flops(self, H: int, W: int) -> float:
        """Model FLOPs of one sample's training step; recomputation earns no credit.

        A token crosses 12 D^2 weights in every block, forward and for its gradient (and once more
        for the weights' gradient where the base is trained); attention counts 4 S D a token and
        block, three times over.
        """
        D = self.flux.inner_dim
        blocks = len(self.flux.transformer_blocks) + len(self.flux.single_transformer_blocks)
        S = 2 * (H // codecs.TOKEN) * (W // codecs.TOKEN) + self.prompt.tokens.shape[0]
        linear, attention = 24 * D * D * S * blocks, 4 * S * S * D * blocks
        return (3 if self.cfg.train_base else 2) * linear + 3 * attention


def make_translator(
    cfg: TranslatorConfig,
    stage1: Stage1,
    prompt: fluxes.Prompt | None = None,
    device: torch.device | str = "cpu",
) -> Translator:
    """The plain model that `cfg` names; its frozen FLUX is where it was made, not yet placed.

    models/fast/plan.py: build places it on `device` and makes it fast.

    Args:
        prompt: skips the text encoders (it is in every checkpoint).
        device: where a random FLUX and the prompt are made; 12 B random weights stay on the meta
            device, to be drawn block by block.

    Raises: ValueError: neither or both of preset and flux_fill_id, or what they raise.
    """
    check(cfg)
    dtype = torch.float32 if cfg.train_base else DTYPES.get(cfg.base_dtype, torch.bfloat16)
    if cfg.preset:
        start = "meta" if cfg.preset == "full-random" else device
        flux, codec = fluxes.random_flux(cfg.preset, dtype, start), codecs.DctCodec()
        prompt = prompt or fluxes.random_prompt(flux, cfg.text_tokens)
    else:
        prompt = prompt or fluxes.encode_prompt(
            cfg.flux_fill_id, cfg.prompt, cfg.text_tokens, device
        )
        flux, vae = fluxes.load_flux(cfg.flux_fill_id, dtype)
        codec = codecs.FluxCodec(vae)
    return Translator(cfg, flux, codec, prompt, stage1)


def check(cfg: TranslatorConfig) -> None:
    """Raises: ValueError: values that contradict each other, whatever machine they meet."""
    if (cfg.preset is None) == (cfg.flux_fill_id is None):
        raise ValueError(
            "set exactly one of model.preset (a random FLUX) and model.flux_fill_id (real weights);"
            f" got preset={cfg.preset}, flux_fill_id={cfg.flux_fill_id}"
        )
    if cfg.text_tokens < 1:
        raise ValueError(f"model.text_tokens must be at least 1, got {cfg.text_tokens}")
    if cfg.train_base and cfg.shard_base:
        raise ValueError(
            "model.shard_base shards frozen weights, but model.train_base trains them all on every"
            " GPU; set one of the two to false"
        )
    if cfg.gradient_checkpointing is not None and cfg.gradient_checkpointing < 0:
        raise ValueError(f"model.gradient_checkpointing is {cfg.gradient_checkpointing}; 0 is none")
