"""The start of the flow -> infrared: Euler steps along the velocity.

    noisy(t - dt) = noisy(t) - dt * velocity(noisy(t), t),     t from 1 (the start) to 0 (data)

The visible half of a diptych is known, so its tokens are set to (1 - t) data + t start before
every step: the infrared half always sees a visible half that is right for its time.
Source: Liu et al. 2022 (arXiv:2209.03003, Eq. 2).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.translator import MEAN_GUIDANCE, Translator
from utils.problems import Checked

# (step, time before it, state after it) -> the state to continue with; called after every step
OnStep = Callable[[int, float, Tensor], Tensor]


@dataclass(kw_only=True)
class SamplingConfig(Checked):
    # mean: one forward pass without noise, the least error; sample: sharp, differs with the seed
    mode: Literal["sample", "mean"] = "sample"
    steps: int = 28
    guidance_scale: float = 30.0  # for FLUX's guidance embedding; 1 if trained from scratch
    shift: float = 1.0  # > 1: more steps at high noise; 3 suits 512 x 1024, 1 small images
    samples: int = 1  # number of samples to average per image: closer to the mean, less sharp
    mirror: bool = False  # average with the mirrored photograph's: less error, twice the time
    seed: int = 0

    def problems(self) -> Iterator[str]:
        try:
            step_times(self.steps, self.shift)
        except ValueError as error:
            yield str(error)
        if self.samples < 1 or not math.isfinite(self.guidance_scale):
            yield (
                "sampling needs samples >= 1 and a finite guidance_scale, got"
                f" {self.samples} and {self.guidance_scale}"
            )


def untrained_mode(cfg: SamplingConfig, mean_share: float) -> Iterator[str]:
    """A sentence if the model was not trained for the mode.

    mean_share: the share of the training samples that taught the mean.
    """
    untrained = {"mean": mean_share == 0, "sample": mean_share == 1}
    if untrained[cfg.mode]:
        yield (
            f"the model was not trained for mode {cfg.mode}: flow.mean_share is {mean_share:g}"
            " (0 trains only samples, 1 only the mean)"
        )


def step_times(steps: int, shift: float) -> Tensor:
    """(steps + 1,) fp32 times from 1 to 0, shifted towards noise."""
    if steps < 1 or not 0 < shift < math.inf:
        raise ValueError(f"sampling needs steps >= 1 and shift > 0, got {steps} and {shift}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()


@torch.no_grad()
def sample(
    translator: Translator,
    visible: Tensor,
    noise: Tensor,
    cfg: SamplingConfig,
    on_step: OnStep | None = None,
) -> Tensor:
    """Infrared (B, 1, H, W) in [0, 1] for visible (B, 3, H, W) in [0, 1].

    Args: noise: (B, S, C) standard normal; the result is a function of it.
    """
    backbone, device = translator.backbone, visible.device
    condition = translator.condition(visible)
    end = translator.end(condition, noise)
    painted_S = backbone.painted(*condition.size, device)
    scale = torch.full((len(visible),), cfg.guidance_scale, device=device)
    times = translator.round_time(step_times(cfg.steps, cfg.shift))
    prepared = translator.prepare(times[:-1].to(device), cfg.guidance_scale)
    state = end
    steps = zip(times[:-1].tolist(), times[1:].tolist(), prepared)
    for step, (t, t_next, ready) in enumerate(steps):
        t_B = torch.full((len(visible),), t, device=device)
        velocity = translator.velocity(state, t_B, condition, scale, True, ready).float()
        state = state + (t_next - t) * velocity
        if backbone.panels > 1:
            on_path = torch.lerp(condition.known, end, t_next)
            state = torch.where(painted_S[:, None], state, on_path)
        state = on_step(step, t, state) if on_step else state
    return translator.decode(state, condition.size)


@torch.no_grad()
def predict_mean(translator: Translator, visible: Tensor, on_step: OnStep | None = None) -> Tensor:
    """The mean infrared image (B, 1, H, W) in [0, 1]: one forward pass from t = 1, no noise."""
    condition, one = translator.condition(visible), torch.ones(len(visible), device=visible.device)
    shape = translator.backbone.state_shape(*condition.size)
    end = translator.end(condition, one.new_zeros(len(one), *shape))
    scale = torch.full_like(one, MEAN_GUIDANCE)
    (ready,) = translator.prepare(one[:1], MEAN_GUIDANCE)
    velocity = translator.velocity(end, one, condition, scale, True, ready).float()
    state = end - velocity
    state = on_step(0, 1.0, state) if on_step else state
    return translator.decode(state, condition.size)


def noise_for(draws: list[int], shape: tuple[int, ...], seed: int, device) -> Tensor:
    """Standard normal noise (B, *shape) fp32; sample i depends only on (seed, draws[i]).

    So the noise is the same in a resumed run, on any number of ranks and at any batch size.
    """
    keys = [((seed + 2**20) * 1_000_003 + draw) % 2**63 for draw in draws]
    generators = [torch.Generator(device).manual_seed(key) for key in keys]
    return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])


def translate(
    translator: Translator,
    visible: Tensor,
    draws: list[int] | list[torch.Generator],
    cfg: SamplingConfig,
    on_step: OnStep | None = None,
    noise_of: Callable[[list[int]], Tensor] | None = None,
) -> Tensor:
    """Infrared (B, 1, H, W) in [0, 1]: the mean, or the average of cfg.samples samples (cfg.mode).

    Args:
        draws: one number per photograph; the result is a function of (cfg.seed, draw). Or one
            generator per photograph (several may share one), which draws the noise instead.
        noise_of: keys, one per photograph -> noise (B, S, C); None: `noise_for`.
    """
    shape = translator.backbone.state_shape(*visible.shape[-2:])
    noise_of = noise_of or (lambda keys: noise_for(keys, shape, cfg.seed, visible.device))
    noises = _noises(draws, shape, cfg, noise_of) if cfg.mode == "sample" else []
    noises = [noise.to(visible.device) for noise in noises]

    def once(visible: Tensor) -> Tensor:
        if cfg.mode == "mean":
            return predict_mean(translator, visible, on_step)
        total = sum(sample(translator, visible, noise, cfg, on_step) for noise in noises)
        return total / cfg.samples

    if cfg.mirror:
        return (once(visible) + once(visible.flip(-1)).flip(-1)) / 2
    return once(visible)


def _noises(
    draws: list[int] | list[torch.Generator], shape: tuple[int, int], cfg: SamplingConfig, noise_of
) -> list[Tensor]:
    """Standard normal noise (B, *shape) fp32, cfg.samples times."""
    generators = [draw for draw in draws if isinstance(draw, torch.Generator)]
    noises = []
    for k in range(cfg.samples):
        if generators:
            each = [torch.randn(shape, generator=g, device=g.device) for g in generators]
            noises.append(torch.stack(each))
        else:
            keys = [int(draw) * cfg.samples + k for draw in draws]
            noises.append(noise_of(keys))
    return noises
