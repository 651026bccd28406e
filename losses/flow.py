"""Rectified-flow objective: a straight path from data (t = 0) to its end (t = 1).

    noisy = (1 - t) * data + t * end,    velocity = d noisy / dt = end - data

The end is noise, or stage 1's infrared image plus a little noise.
Source: Liu et al. 2022 (arXiv:2209.03003, Eq. 1); logit-normal times and resolution shift: Esser et
al. 2024 (arXiv:2403.03206, Sec. 3.1 and Eq. 23).
Dimension key:  B batch   N tokens   C channels of a token
"""

import torch
from torch import Tensor

SMALLEST_SQUARED_TIME = 0.02
TIME_BINS = 10  # the loss is logged in this many equal bins of t
# names under which the results of `loss_by_time_bin` are logged
BIN_NAMES = (*(f"loss_t{i}" for i in range(TIME_BINS)), "loss_mean")


def sample_times(
    draws: list[int], group: int, seed: int, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Logit-normal times, one per sample, stratified over every `group` consecutive draws.

    Args:
        draws: global draw numbers; each time is a function of (seed, draw) alone, so that a resumed
            run and any number of ranks see the same times.
        group: the global batch of one optimizer step; each of its strata is hit exactly once.
        mean, std: of the normal variable under the sigmoid; mean > 0 favours noisier inputs.
        shift: resolution shift s, t -> s t / (1 + (s - 1) t); 1 leaves t as it is.

    Returns: (B,) fp32 on the CPU, in (0, 1).
    """
    if group < 1 or std <= 0 or shift <= 0:
        raise ValueError(f"need group >= 1, std > 0, shift > 0; got {group}, {std}, {shift}")
    keys = [(seed * 1_000_003 + draw) % 2**63 for draw in draws]
    jitter = [torch.rand((), generator=torch.Generator().manual_seed(k)).item() for k in keys]
    quantile = torch.tensor([(d % group + u) / group for d, u in zip(draws, jitter)])
    # fp32 has no quantile at 0 or 1; the clamp moves t by less than 1e-6 of its probability
    t = torch.sigmoid(mean + std * torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6).double()))
    return shifted(t, shift).float()


def shifted(t: Tensor, shift: float) -> Tensor:
    """Esser et al. 2024, Eq. 23: more time at high noise for larger images; identity at shift 1."""
    return shift * t / (1 + (shift - 1) * t)


def velocity_error(predicted: Tensor, data: Tensor, end: Tensor) -> Tensor:
    """Squared error of the predicted velocity, averaged over channels: (B, N) fp32.

    Args: predicted, data, end: (B, N, C).
    Raises: ValueError: the three shapes differ. (They would broadcast, and train on nonsense.)
    """
    if not predicted.shape == data.shape == end.shape:
        raise ValueError(f"shapes differ: {predicted.shape=}, {data.shape=}, {end.shape=}")
    return (predicted.float() - (end.float() - data.float())).square().mean(-1)


def clean_image_weight(t_B: Tensor) -> Tensor:
    """Factor that turns a velocity error into the clean image's, over max(t^2, 0.02): (B,), <= 1.

    The clean image's error is t^2 times the velocity's. A network that predicts the clean image is
    weighted as if it predicted the velocity, but not more than 50 fold at the smallest times.
    """
    squared = t_B.square()
    return squared / squared.clamp(min=SMALLEST_SQUARED_TIME)


def predicts_mean(draws: list[int], share: float) -> list[bool]:
    """Which samples are trained to predict the mean: `share` of all, evenly spread over draws."""
    return [int((d + 1) * share) > int(d * share) for d in draws]


def flow_loss(error_BN: Tensor, infrared_N: Tensor, visible_weight: float = 0.0) -> Tensor:
    """Per-sample loss (B,): mean over the infrared panel, plus the weighted visible panel's mean.

    Args:
        error_BN: from `velocity_error`.
        infrared_N: bool, True where the token belongs to the infrared panel.
    """
    if error_BN.shape[-1:] != infrared_N.shape:
        raise ValueError(f"shapes differ: {error_BN.shape=}, {infrared_N.shape=}")

    def mean_over(panel_N: Tensor) -> Tensor:  # indexing by a mask would wait for the device
        return torch.where(panel_N, error_BN, 0.0).sum(-1) / panel_N.sum()

    loss = mean_over(infrared_N)
    if visible_weight:
        loss = loss + visible_weight * mean_over(~infrared_N)
    return loss


def loss_by_time_bin(loss_B: Tensor, t_B: Tensor, mean_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of the loss in the bins of BIN_NAMES: two (11,) tensors; no synchronisation.

    Ten are equal bins of t; the last is of the samples that predict the mean (mean_B, bool), which
    are in no other. Raises: ValueError: the shapes differ.
    """
    if not loss_B.shape == t_B.shape == mean_B.shape:
        raise ValueError(f"shapes differ: {loss_B.shape=}, {t_B.shape=}, {mean_B.shape=}")
    index = (t_B * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    index = torch.where(mean_B, TIME_BINS, index)
    zeros = torch.zeros(len(BIN_NAMES), device=loss_B.device)
    return (
        zeros.index_add(0, index, loss_B.detach().float()),
        zeros.index_add(0, index, torch.ones_like(loss_B, dtype=torch.float32)),
    )
