"""Does the spread of an image's samples show where their mean is wrong? Sparsification curves.

The pixels are dropped from the least certain one on, and the mean error of those that are left is
followed: it falls if the uncertain pixels are the wrong ones. The oracle drops the largest errors
first, which no uncertainty can better. AUSE is the area between the two curves.

Source: Ilg et al. 2018 (arXiv:1802.07095), who divide by the error of all pixels, as here.

Dimension key:  B batch   H, W pixels   S shares
"""

import numpy as np
import torch
from torch import Tensor

SHARES = [i / 20 for i in range(20)]  # of the pixels that are dropped


def sparsification(deviation: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Mean error of the pixels left after each of SHARES is dropped, over that of all pixels.

    Pixels of one deviation are dropped together, each with the mean error of them all: what cannot
    be told apart has no order, so a constant deviation gives a flat curve at 1.

    Args: deviation, error: (B, 1, H, W), not negative.
    Returns: the curve by deviation and the oracle's, each (B, S) in fp64 on the CPU, where sums
        have one order and so one value; both 0 where the error is 0 everywhere.
    """
    assert deviation.shape == error.shape, f"{deviation.shape} and {error.shape} differ"
    pairs = zip(deviation.flatten(1).double().cpu(), error.flatten(1).double().cpu())
    rows = [(_curve(x, e), _curve(e, e)) for x, e in pairs]
    found, oracle = (torch.stack(curves) for curves in zip(*rows))
    return found, oracle


def areas(curve: Tensor, oracle: Tensor) -> dict[str, Tensor]:
    """(B,) each. ause: between the curves, 0 is perfect; ause_random: the same for pixels that are
    dropped in a random order, whose curve stays at 1."""
    random = torch.where(oracle[:, :1] > 0, 1.0, 0.0)
    return {"ause": (curve - oracle).mean(1), "ause_random": (random - oracle).mean(1)}


def _curve(order: Tensor, error: Tensor) -> Tensor:
    """(S,): the mean of `error` (N,) without the share of the largest `order`, over the mean."""
    _, group, counts = torch.unique(order, return_inverse=True, return_counts=True)
    means = torch.zeros_like(counts, dtype=torch.float64).scatter_add_(0, group, error) / counts
    kept = means.repeat_interleave(counts).cumsum(0)  # from the surest pixel on
    left = len(error) - torch.arange(len(SHARES)) * len(error) // len(SHARES)
    remaining = kept[left - 1] / left
    return remaining / remaining[0] if remaining[0] > 0 else torch.zeros_like(remaining)


def means(curves: list[dict]) -> dict[str, dict[str, list[float]]]:
    """{method: shares, curve, oracle}, averaged over images.

    Args: curves: dicts of method, curve and oracle, one an image.
    """
    found = {}
    for method in dict.fromkeys(row["method"] for row in curves):
        own = [row for row in curves if row["method"] == method]
        curve, oracle = (
            np.mean([row[key] for row in own], axis=0).tolist() for key in ("curve", "oracle")
        )
        found[method] = {"shares": SHARES, "curve": curve, "oracle": oracle}
    return found


def sentences(methods: dict[str, dict[str, float]]) -> list[str]:
    """In words, for every method that samples."""
    return [
        f"uncertainty of {name}: AUSE {own['ause']:.3f} where a random order has"
        f" {own['ause_random']:.3f} and a perfect one 0; rank correlation of deviation and error"
        f" {own['spread_rank']:.3f}"
        for name, own in methods.items()
        if "ause" in own
    ]
