"""A residual sum that is left to whoever reads it next, where it is one pass with the norm.

Dimension key:  B batch   S tokens   D model
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PendingResidual(NamedTuple):
    """x + gate * (sum of terms, and a bias), not yet added up."""

    x_BSD: Tensor
    gate_BD: Tensor  # or (1, D) for all samples
    terms: tuple[Tensor, ...]  # (B, S, D) each
    bias_D: Tensor | None = None


def added_up(*parts: PendingResidual) -> Tensor:
    """The sums, one behind the other."""
    sums = [_added_up(*part) for part in parts]
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


def _added_up(x: Tensor, gate: Tensor, terms: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    total = sum(terms[1:], terms[0])
    return x + gate[:, None] * (total if bias is None else total + bias)
