"""The order of one epoch: a function of (seed, epoch), over the whole set or within windows."""

import numpy as np


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The n items in random order."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def windowed(seed: int, epoch: int, groups: np.ndarray, window: int) -> np.ndarray:
    """Row groups in random order, one after the other; in each `window` rows, rows at random.

    So the rows of a window come from few groups, and reading one epoch in this order needs every
    group once where a reader can keep a window. A window as large as the set shuffles all rows.

    groups: (n,) a number for the row group of every item; those of one group stand together.
    """
    n, rng = len(groups), np.random.default_rng([seed, epoch])
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    lengths = np.diff(starts, append=n)
    order = rng.permutation(len(starts))
    before = np.cumsum(lengths[order]) - lengths[order]  # items that come before each group
    items = np.repeat(starts[order] - before, lengths[order]) + np.arange(n)
    return items[np.argsort(np.arange(n) // window + rng.random(n), kind="stable")]
