"""The guided model: visible photograph + noise -> velocity of the infrared image.

    data, end = the pair's state, and where the flow starts: noise, or fused + sigma * noise
    noisy     = (1 - t) data + t end
    velocity  = FLUX(tokens(noisy, visible), t, prompt, guidance(decomposition(visible)))

What a state is and how it becomes tokens: models/backbones.

Dimension key:  B batch   S, C places and channels of a state   M text tokens
                H, W pixels of one panel
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models import codec as codecs
from models import flux as fluxes
from models.backbones import LAYOUTS, Backbone
from models.backbones.base import Condition, FluxRunner, PathConfig
from models.decomposition import DecompositionConfig, Maps
from models.discriminator import Discriminator, Verdict
from models.guidance import Guidance, SemanticGuidance, unknown_maps
from models.lora import LoraConfig, add_lora
from models.stage1 import Stage1, Stage1Output
from utils.problems import Checked, refuse

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MEAN_GUIDANCE = 0.0  # the guidance scale that asks for the mean; samples have 1 or more
EARLIEST = 1e-3  # smallest time that the code divides by


@dataclass(kw_only=True)
class TranslatorConfig(Checked):
    EXCLUSIVE: ClassVar = ("flux_fill_id", "preset")  # the one on the command line wins

    flux_fill_id: str | None = None  # hub id or local folder of FLUX.1-Fill; excludes `preset`
    preset: Literal["demo", "small", "full-random"] | None = None  # a random FLUX, no download
    # diptych: infrared beside the photograph; channels: both in the same tokens; reference: for
    # FLUX.1-dev and Kontext; flux2: the same for FLUX.2 klein; pixels: convolutions instead of a
    # codec, for a preset with train_base
    layout: Literal["diptych", "channels", "reference", "flux2", "pixels"] = "diptych"
    discriminator: bool = False  # add a patch discriminator, for flow.adversarial_weight
    train_base: bool = False  # train all of FLUX, not only adapters; a random FLUX needs it
    fast: Literal["auto", "off"] = "auto"  # off: the plain model, nothing from models/fast
    # memory of one GPU; auto: detect it. Sets base_dtype, compile and gradient_checkpointing where
    # they are null, and prints them
    memory: Literal["auto", "24g", "48g", "80g", "140g"] | None = "auto"
    # dtype of the frozen weights; null: as `memory` says, else bf16
    base_dtype: Literal["bf16", "fp32", "fp8", "fp8-small"] | None = None
    compile: bool | None = None  # compile the blocks; null: as `memory` says, else no
    shard_base: bool = False  # each of n processes holds 1/n of the frozen weights
    prompt: str = "a thermal infrared photograph of the same scene"
    text_tokens: int = 512  # M, the same in training and sampling
    training_guidance: float = 1.0  # scale for FLUX's guidance embedding while training
    # recompute every n-th block in the backward pass: 1 = all, for the least memory, 2 = half,
    # 0 = none; null: as `memory` says, else none
    gradient_checkpointing: int | None = None
    decomposition_checkpoint: str | None = None  # best_model.pth of stage 1
    # stage 1's network; taken from decomposition_checkpoint
    decomposition: DecompositionConfig = field(default_factory=DecompositionConfig)
    physics: bool = True  # whether stage 1 has a fusion; taken from decomposition_checkpoint
    freeze_decomposition: bool = True
    train_batchnorm: bool = False  # update BatchNorm's running statistics when not frozen
    use_separate_guidance: bool = True  # one cross-attention per map, else one for all
    inject: dict[int, list[str]] = field(  # double block -> maps it sees; {} = no guidance
        default_factory=lambda: {6: ["intensity"], 12: ["intensity", "material", "context"]}
    )
    lora_config: LoraConfig = field(default_factory=LoraConfig)

    def problems(self) -> Iterator[str]:
        if self.text_tokens < 1:
            yield f"model.text_tokens must be at least 1, got {self.text_tokens}"
        if self.train_base and self.shard_base:
            yield (
                "model.shard_base shards frozen weights, but model.train_base trains all of them on"
                " every GPU; set one of the two to false"
            )
        if self.gradient_checkpointing is not None and self.gradient_checkpointing < 0:
            yield f"model.gradient_checkpointing is {self.gradient_checkpointing}; 0 is none"
        yield from unknown_maps(self.inject)


class Prediction(NamedTuple):
    velocity: Tensor  # (B, S, C)
    data: Tensor  # (B, S, C) state of the true pair
    end: Tensor  # (B, S, C) where the path ends at t = 1; the true velocity is end - data
    stage1: Stage1Output  # the maps that guided it, fp32
    image: Tensor | None = None  # (B, 1, H, W) the predicted clean image, if asked for
    verdict: Verdict | None = None  # the discriminator's verdict on it, if there is one


class PromptEmbedding(nn.Module):
    """The one constant prompt; stored in every checkpoint, so that sampling needs no encoder."""

    saved_when_frozen = True

    def __init__(self, prompt: fluxes.Prompt):
        super().__init__()
        self.register_buffer("tokens", prompt.tokens_MC)
        self.register_buffer("pooled", prompt.pooled_C)


class Translator(nn.Module):
    """FLUX with adapters and guidance, its backbone, and the stage 1 network that guides it.

    Args:
        stage1: its maps guide FLUX; frozen (and in eval mode) as `cfg` says.
        flux, backbone, prompt: from `make_translator`.
        path: where the flow starts.
    """

    def __init__(
        self,
        cfg: TranslatorConfig,
        flux: nn.Module,
        backbone: Backbone,
        prompt: fluxes.Prompt,
        stage1: Stage1,
        path: PathConfig | None = None,
    ):
        super().__init__()
        self.cfg, self.path = cfg, path or PathConfig()
        self.flux = flux.requires_grad_(cfg.train_base)
        add_lora(self.flux, cfg.lora_config)
        self.guidance = SemanticGuidance(flux.inner_dim, cfg.inject, cfg.use_separate_guidance)
        backbone.patch(self.flux, self.guidance)
        self.backbone = backbone
        self.prompt = PromptEmbedding(prompt)
        self.stage1 = stage1.requires_grad_(not cfg.freeze_decomposition)
        self.stage1.saved_when_frozen = True
        self.discriminator = Discriminator() if cfg.discriminator else None
        self.runner: FluxRunner = FluxRunner(self.flux)
        if cfg.gradient_checkpointing:
            fluxes.recompute_blocks(self.flux, cfg.gradient_checkpointing)
        self.train()

    @property
    def codec(self) -> nn.Module:
        return self.backbone.codec

    def train(self, mode: bool = True) -> "Translator":
        """Frozen networks stay in eval mode, even when the parent is set to train."""
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
        mean: Tensor | None = None,
        with_image: bool = False,
    ) -> Prediction:
        """One training step's prediction.

        Args:
            visible, infrared: (B, 3, H, W) in [0, 1].
            noise: (B, S, C) standard normal.
            t: (B,) in (0, 1), already rounded by `round_time`.
            encoded: the results of `encode` and `known`, if already computed.
            infrared_only: see `velocity`.
            mean: (B,) bool, True where the mean is predicted: from t = 1, without noise.
            with_image: decode the clean image that the velocity points to, with its gradient.
        """
        data, known = encoded or (self.encode(visible, infrared), self.known(visible))
        condition = self.condition(visible, known)
        scale = torch.full_like(t, self.cfg.training_guidance)
        if mean is not None:
            noise = torch.where(mean.view(-1, 1, 1), 0.0, noise)
            t, scale = torch.where(mean, 1.0, t), torch.where(mean, MEAN_GUIDANCE, scale)
        end = self.end(condition, noise)
        noisy = torch.lerp(data, end, t.view(-1, 1, 1))
        velocity = self.velocity(noisy, t, condition, scale, infrared_only)
        image = verdict = None
        if with_image:
            clean = noisy - t.view(-1, 1, 1) * velocity.float()
            image = self.backbone.decode(clean, condition.size)
        if with_image and self.discriminator:
            verdict = self.discriminator.judge(visible, infrared[:, :1], image)
        return Prediction(velocity, data, end, condition.stage1, image, verdict)

    def decompose(self, visible: Tensor) -> Stage1Output:
        """Stage 1's maps and fused image, fp32; no graph when frozen.

        Outside autocast, except where FLUX is trained too: then everything trains in one precision.
        """
        train = torch.is_grad_enabled() and not self.cfg.freeze_decomposition
        device = visible.device.type
        ambient = torch.is_autocast_enabled(device) and self.cfg.train_base
        with torch.autocast(device, enabled=ambient), torch.set_grad_enabled(train):
            return self.stage1(visible.float())

    def condition(self, visible: Tensor, known: Tensor | None = None) -> Condition:
        """Everything the network receives from photographs (B, 3, H, W) in [0, 1].

        Args: known: the result of `known`, if already computed.
        """
        size, stage1, start = tuple(visible.shape[-2:]), self.decompose(visible), None
        if self.path.start == "fused":
            heat = stage1.maps.intensity if stage1.fused is None else stage1.fused
            start = self.backbone.encode(visible, heat.expand(-1, 3, -1, -1))
        known = self.known(visible) if known is None else known
        return Condition(known, stage1, self.guide(stage1.maps), start, size)

    def guide(self, maps: Maps) -> Guidance | None:
        """Guidance tokens of the maps, or None where guidance is off."""
        if not self.cfg.inject:
            return None
        device = maps.intensity.device
        places = self.backbone.places(*maps.intensity.shape[-2:], device)
        with torch.autocast(device.type, enabled=False):
            return self.guidance(maps.intensity, maps.material, maps.context, places)

    def end(self, condition: Condition, noise: Tensor) -> Tensor:
        """The path's end at t = 1, (B, S, C), for standard normal noise of that shape."""
        noise = self.backbone.shape_noise(noise.float(), condition.size)
        return noise if condition.start is None else condition.start + self.path.sigma * noise

    @torch.no_grad()
    def encode(self, visible: Tensor, infrared: Tensor) -> Tensor:
        """The state (B, S, C) fp32 of pairs (B, 3, H, W) in [0, 1]."""
        return self.backbone.encode(visible, infrared)

    @torch.no_grad()
    def known(self, visible: Tensor) -> Tensor:
        """What every step sees of photographs (B, 3, H, W) in [0, 1]."""
        return self.backbone.known(visible)

    @torch.no_grad()
    def decode(self, state: Tensor, size: tuple[int, int]) -> Tensor:
        """A state (B, S, C) -> infrared (B, 1, H, W) in [0, 1]."""
        return self.backbone.decode(state, size).clamp(0, 1)

    def velocity(
        self,
        noisy: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: Tensor,
        infrared_only: bool = False,
        prepared: Any = None,
    ) -> Tensor:
        """The velocity (B, S, C) of a noisy state at time t.

        bf16 weights run outside autocast, in bf16 throughout: autocast lifts every norm to fp32.
        Args:
            t, guidance_scale: (B,) fp32.
            infrared_only: the visible panel's velocity is not needed: a fast runner may skip its
                computation and return zero there.
            prepared: the entry of `prepare` for t, made with the same guidance_scale.
        """
        B, device, dtype = noisy.shape[0], noisy.device, self.base_dtype
        rows = condition.size[0] // codecs.TOKEN
        infrared_rows = rows if infrared_only and self.backbone.panels > 1 else 0
        prompt = self.prompt.tokens.expand(B, -1, -1), self.prompt.pooled.expand(B, -1)
        ambient = torch.is_autocast_enabled(device.type) and dtype == torch.float32
        with torch.autocast(device.type, torch.bfloat16, enabled=ambient):
            tokens, kept = self.backbone.tokens(noisy, condition)
            text, pooled = (x.to(dtype) for x in prompt)
            inputs = self.backbone.arguments(
                tokens.to(dtype), t, guidance_scale, (text, pooled), condition
            )
            output = self.runner.velocity(inputs, infrared_rows, prepared)
            output = self.backbone.output(output, kept, condition)
        if condition.start is None:
            return output
        # The network predicts the clean image. Near the data, a trained FLUX's velocity is minus
        # that image; one whose last layer is zero starts from the fused image instead.
        clean = (condition.start if self.cfg.train_base else 0.0) - output.float()
        return (noisy - clean) / t.clamp(min=EARLIEST).view(-1, 1, 1)

    def run_with(self, runner: FluxRunner) -> None:
        """Let another runner call FLUX from now on."""
        self.runner = runner

    def prepare(self, times: Tensor, guidance_scale: float) -> list[Any]:
        """The `prepared` argument of `velocity` for each of `times` (T,), computed at once."""
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
        """Model FLOPs of one sample's training step; recomputation does not count.

        A token crosses 12 D^2 weights in every block (13 in FLUX.2), forward and for its gradient
        (and once more for the weights' gradient where the base is trained); attention counts 4 S D
        per token and block, three times. Stage 1, codec and convolutions around FLUX are not
        counted.
        """
        D = self.flux.inner_dim
        blocks = len(self.flux.transformer_blocks) + len(self.flux.single_transformer_blocks)
        S = len(self.backbone.ids(H, W)) + self.prompt.tokens.shape[0]
        linear, attention = (
            2 * self.backbone.block_weights * D * D * S * blocks,
            4 * S * S * D * blocks,
        )
        return (3 if self.cfg.train_base else 2) * linear + 3 * attention


def make_translator(
    cfg: TranslatorConfig,
    stage1: Stage1,
    prompt: fluxes.Prompt | None = None,
    device: torch.device | str = "cpu",
    path: PathConfig | None = None,
) -> Translator:
    """The plain model that `cfg` describes; its frozen FLUX stays where it was made.

    models/fast/plan.py: build then moves it to `device` and makes it fast.

    Args:
        prompt: if given, no text encoder is loaded (every checkpoint has one).
        device: where a random FLUX and the prompt are made; 12 B random weights stay on the meta
            device and are drawn block by block later.
        path: where the flow starts; None: from noise.

    Raises: ValueError: neither or both of preset and flux_fill_id are set, or loading one failed.
    """
    refuse(contradictions(cfg))
    kind = LAYOUTS[cfg.layout]
    dtype = torch.float32 if cfg.train_base else DTYPES.get(cfg.base_dtype, torch.bfloat16)
    if cfg.preset:
        start = "meta" if cfg.preset == "full-random" else device
        flux, codec = kind.random(cfg.preset, dtype, start), codecs.DctCodec()
        prompt = prompt or fluxes.random_prompt(flux, cfg.text_tokens)
    else:
        prompt = prompt or kind.encode_prompt(cfg.flux_fill_id, cfg.prompt, cfg.text_tokens, device)
        flux, codec = kind.load(cfg.flux_fill_id, dtype)
    return Translator(cfg, flux, kind(codec, cfg.preset), prompt, stage1, path)


def contradictions(cfg: TranslatorConfig) -> Iterator[str]:
    """A sentence for each reason why no new model can be made from these values."""
    if (cfg.preset is None) == (cfg.flux_fill_id is None):
        yield (
            "set exactly one of model.preset (a random FLUX) and model.flux_fill_id (real weights);"
            f" got preset={cfg.preset}, flux_fill_id={cfg.flux_fill_id}"
        )
    if LAYOUTS[cfg.layout].needs_trained_base and not (cfg.preset and cfg.train_base):
        yield (
            f"model.layout={cfg.layout} is for a model trained from scratch: it needs"
            f" model.preset and model.train_base=true, got {cfg.preset} and {cfg.train_base}"
        )
