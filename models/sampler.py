"""Noise -> infrared: Euler steps along the velocity, the visible panel held on its known path.

    noisy(t - dt) = noisy(t) - dt * velocity(noisy(t), t),     t from 1 (noise) to 0 (data)

The visible half of the diptych is known, so its tokens are set to (1 - t) data + t noise before
every step: the infrared half always sees a visible half that is right for its time.
Source: Liu et al. 2022 (arXiv:2209.03003, Eq. 2).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.codec import in_infrared_panel, tokens_shape
from models.translator import Translator


@dataclass(kw_only=True)
class SamplingConfig:
    steps: int = 28
    guidance_scale: float = 30.0  # FLUX's guidance embedding; 1 for a model trained from scratch
    shift: float = 1.0  # more steps at high noise; 3 suits 512 x 1024, 1 small images
    samples: int = 1  # average so many samples an image: closer to the mean, less sharp
    seed: int = 0

    def __post_init__(self):
        step_times(self.steps, self.shift)
        if self.samples < 1 or not math.isfinite(self.guidance_scale):
            raise ValueError(
                "sampling needs samples >= 1 and a finite guidance_scale, got"
                f" {self.samples} and {self.guidance_scale}"
            )


def step_times(steps: int, shift: float) -> Tensor:
    """(steps + 1,) fp32 times from 1 to 0, shifted towards noise."""
    if steps < 1 or not 0 < shift < math.inf:
        raise ValueError(f"sampling needs steps >= 1 and shift > 0, got {steps} and {shift}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()


@torch.no_grad()
def sample(translator: Translator, visible: Tensor, noise: Tensor, cfg: SamplingConfig) -> Tensor:
    """Infrared (B, 1, H, W) in [0, 1] for visible (B, 3, H, W) in [0, 1].

    Args: noise: (B, N, 64) standard normal, the start; the result is a function of it.
    """
    H, W = visible.shape[-2:]
    infrared_N = in_infrared_panel(H, W, visible.device)
    known = translator.encode(visible)
    guide = translator.guide(translator.decompose(visible).maps)
    times = translator.round_time(step_times(cfg.steps, cfg.shift))
    prepared = translator.prepare(times[:-1].to(visible.device), cfg.guidance_scale)
    latents = noise.float()
    for t, t_next, ready in zip(times[:-1].tolist(), times[1:].tolist(), prepared):
        t_B = torch.full((len(visible),), t, device=visible.device)
        velocity = translator.velocity(
            latents,
            known,
            t_B,
            guide,
            (H, W),
            cfg.guidance_scale,
            infrared_only=True,
            prepared=ready,
        ).float()
        on_path = torch.lerp(known, noise.float(), t_next)
        stepped = latents + (t_next - t) * velocity
        latents = torch.where(infrared_N[:, None], stepped, on_path)
    return translator.decode(latents, (H, W))


def noise_for(draws: list[int], shape: tuple[int, ...], seed: int, device) -> Tensor:
    """Standard normal noise (B, *shape) fp32; sample i is a function of (seed, draws[i]) alone.

    So a resumed run, any number of ranks and any batch size see the same noise.
    """
    keys = [((seed + 2**20) * 1_000_003 + draw) % 2**63 for draw in draws]
    generators = [torch.Generator(device).manual_seed(key) for key in keys]
    return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])


def translate(
    translator: Translator, visible: Tensor, draws: list[int], cfg: SamplingConfig
) -> Tensor:
    """Infrared (B, 1, H, W) in [0, 1]: the mean of cfg.samples samples of each photograph.

    Args: draws: one number a photograph; the result is a function of (cfg.seed, draw).
    """
    shape, total = tokens_shape(*visible.shape[-2:]), 0
    for k in range(cfg.samples):
        keys = [draw * cfg.samples + k for draw in draws]
        noise = noise_for(keys, shape, cfg.seed, visible.device)
        total = total + sample(translator, visible, noise, cfg)
    return total / cfg.samples
