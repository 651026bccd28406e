"""How certain is a mean over images, or a difference of two? The percentile bootstrap.

Efron 1979: images are drawn again with replacement, RESAMPLES times with a fixed seed; 95 % of the
means found lie in the interval. One draw of images serves all methods and metrics.

Dimension key:  R resamples   N images
"""

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
LEAST = 8  # images; of fewer, the intervals are too narrow to judge by
AHEAD, BEHIND, UNKNOWN = "ahead", "behind", "cannot be told"


def weights(images: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(R, N): how often each image was drawn; rows sum to N."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def mean(sums: np.ndarray, counts: np.ndarray) -> float:
    """The mean over all things in N images: total sum over total count. NaN if there are none."""
    total = counts.sum()
    return float(sums.sum() / total) if total else float("nan")


def means(sums: np.ndarray, counts: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """`mean` of every resample: (R,), without those that drew nothing that counts."""
    totals = weights_RN @ counts
    return (weights_RN @ sums)[totals > 0] / totals[totals > 0]


def interval(values: np.ndarray) -> list[float]:
    """[low, high] around the middle 95 %. NaN without values, or with one that is not finite."""
    if not len(values) or not np.isfinite(values).all():
        return [float("nan")] * 2
    tail = 100 * (1 - LEVEL) / 2
    return [float(x) for x in np.percentile(values, [tail, 100 - tail])]


def verdict(differences: list[float], higher_is_better: bool, images: int = LEAST) -> str:
    """What the interval of (ours - theirs) says about ours; below LEAST images, nothing."""
    if images < LEAST:
        return UNKNOWN
    low, high = differences if higher_is_better else [-x for x in reversed(differences)]
    if low > 0:
        return AHEAD
    return BEHIND if high < 0 else UNKNOWN
