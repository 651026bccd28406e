"""Exponential moving average of the trained weights.

    average <- decay_n * average + (1 - decay_n) * weights
    decay_n = min(decay, (1 + n) / (10 + n))

n counts the updates: the first ones forget the random start quickly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Ema:
    """Average of the parameters of `model` that require grad; with decay 0 there is none.

    Buffers (BatchNorm statistics) are not averaged: they are running averages already.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.names, self.weights = list(trained), list(trained.values())
        self.average = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """After every optimizer step."""
        if not self.average:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside the block and its trained ones after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # in place: a captured or compiled graph may hold the addresses of the weights
        for weight, average in zip(self.weights, self.average):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(zip(self.names, self.average))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved average. A run saved without EMA starts from its current weights.

        Call it after the weights are loaded.
        """
        saved = state["average"]
        self.updates = state["updates"] if saved else 0
        for name, weight, average in zip(self.names, self.weights, self.average):
            average.copy_(saved.get(name, weight))
