"""The interface of a backbone, with FLUX.1's implementation of what several layouts share.

A flow runs in a *state*: what is noisy at t = 1 and the pair's own at t = 0. A subclass says what
the state is, which tokens the transformer sees of it, and how the tokens become a velocity again.
Loading, patching, prompt and arguments are FLUX.1's here; another transformer overrides them.

Dimension key:  B batch   H, W pixels of one panel   S, C places and channels of the state
                N image tokens   I, O channels of a token, in and out
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models import flux as fluxes
from models.codec import TOKEN, FluxCodec
from models.guidance import Guidance, SemanticGuidance
from models.stage1 import Stage1Output
from utils.problems import Checked


@dataclass(kw_only=True)
class PathConfig(Checked):
    """Where the flow starts, at t = 1; the model samples from where it was trained."""

    # noise: standard normal noise. fused: stage 1's infrared image plus sigma times noise; the
    # network then predicts the clean image, from which the velocity follows
    start: Literal["noise", "fused"] = "noise"
    sigma: float = 0.1  # the noise of start=fused

    def problems(self) -> Iterator[str]:
        if not 0 <= self.sigma < 100:
            yield f"flow.sigma must lie in [0, 100), got {self.sigma}"


class Condition(NamedTuple):
    """Everything the network receives from the photographs, computed once, used in every step."""

    known: Tensor  # the photograph, from the backbone's `known`
    stage1: Stage1Output
    guide: Guidance | None
    start: Tensor | None  # (B, S, C) start of the flow without its noise; None: noise alone
    size: tuple[int, int]  # H, W


class FluxRunner:
    """Calls FLUX. This one calls the patched model; models/fast has others."""

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
        """The `prepared` argument for each of `times` (T,); here None."""
        return [None] * len(times)


class Backbone(nn.Module, ABC):
    """One transformer and one layout of its tokens.

    Args:
        codec: images to latents and back; frozen.
        preset: the name of a random transformer's size.
    """

    in_channels = 384  # I, of the transformer that fits
    panels = 1  # images side by side in the token grid, the infrared the last
    needs_trained_base = False  # layers around the transformer train with it
    fast_blocks = True  # models/fast supports its blocks
    block_weights = 12  # D^2 weights that a token crosses in a block

    def __init__(self, codec: nn.Module, preset: str | None = None):
        super().__init__()
        self.codec = codec.requires_grad_(False)

    # ---- the state of the flow

    @abstractmethod
    def state_shape(self, H: int, W: int) -> tuple[int, int]:
        """(S, C). Raises: ValueError: a side is no multiple of 16."""

    @abstractmethod
    def encode(self, visible: Tensor, infrared: Tensor) -> Tensor:
        """The state (B, S, C) fp32 of pairs (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def known(self, visible: Tensor) -> Tensor:
        """What every step sees of photographs (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def decode(self, state: Tensor, size: tuple[int, int]) -> Tensor:
        """The infrared image (B, 1, H, W) of a state, about [0, 1]."""

    def painted(self, H: int, W: int, device=None) -> Tensor:
        """(S,) bool: True where the state is infrared; elsewhere it is known."""
        return torch.ones(self.state_shape(H, W)[0], dtype=torch.bool, device=device)

    def shape_noise(self, white: Tensor, size: tuple[int, int]) -> Tensor:
        """The noise (B, S, C) that the flow starts with, of standard normal noise."""
        return white

    # ---- a step

    @abstractmethod
    def tokens(self, noisy: Tensor, condition: Condition) -> tuple[Tensor, Any]:
        """The transformer's input, (B, N, I), and what `output` needs besides its output."""

    def output(self, tokens: Tensor, kept: Any, condition: Condition) -> Tensor:
        """The transformer's output (B, N, O) as a state (B, S, C)."""
        return tokens

    def places(self, H: int, W: int, device=None) -> Tensor:
        """(N, 2): row and column of every image token in its own panel, in tokens of 16 pixels."""
        return self.ids(H, W, device)[:, 1:]

    def ids(self, H: int, W: int, device=None) -> Tensor:
        """(N, 3) fp32 position ids of the image tokens: image, row, column."""
        return grid_ids(H, W, device)

    # ---- the transformer

    @classmethod
    def random(cls, preset: str, dtype: torch.dtype, device) -> nn.Module:
        """A transformer of this layout with random weights."""
        return fluxes.random_flux(preset, dtype, device, cls.in_channels)

    @classmethod
    def load(cls, model_id: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Transformer and codec of a hub id or a local folder.

        Raises: ValueError: it cannot be read, or does not fit this layout.
        """
        flux, vae = fluxes.load_flux(model_id, dtype, cls.in_channels)
        return flux, FluxCodec(vae)

    @staticmethod
    def encode_prompt(model_id: str, prompt: str, tokens: int, device="cpu") -> fluxes.Prompt:
        """The prompt as `tokens` tokens, by the text encoders of a hub id or a local folder.

        Raises: ValueError: they cannot be read, or would cut the prompt.
        """
        return fluxes.encode_prompt(model_id, prompt, tokens, device)

    @staticmethod
    def patch(transformer: nn.Module, guidance: SemanticGuidance) -> None:
        """Let the guided blocks of `transformer` see the guidance."""
        fluxes.patch_blocks(transformer, guidance)

    def arguments(
        self,
        tokens: Tensor,
        t: Tensor,
        guidance_scale: Tensor,
        prompt: tuple[Tensor, Tensor],
        condition: Condition,
    ) -> dict[str, Any]:
        """The arguments of the transformer's forward.

        Args:
            tokens: (B, N, I) in the transformer's dtype.
            t, guidance_scale: (B,) fp32.
            prompt: (B, M, .) and (B, .) in the transformer's dtype.
        """
        text, pooled = prompt
        return dict(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance_scale,
            img_ids=self.ids(*condition.size, tokens.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=tokens.device),
            joint_attention_kwargs={"guidance": condition.guide},
        )


def grid_ids(H: int, W: int, device=None, image: int = 0) -> Tensor:
    """(N, 3) fp32 ids (image, row, column) of one panel's token grid."""
    rows = torch.arange(H // TOKEN, device=device)
    columns = torch.arange(W // TOKEN, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return nn.functional.pad(grid, (1, 0), value=image).float()
