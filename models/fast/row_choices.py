"""One of inductor's heuristics changed: whole rows stay in registers. Imported only to compile."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from models.fast.frozen_matrix import COMPILED_ROW


class RowChoices(InductorChoices):
    """Keep a whole row in registers when it is reduced, up to COMPILED_ROW values.

    By itself inductor stops at 1024 and reads (and recomputes) longer rows two or three times:
    every norm and every rounding of this model.
    """

    @staticmethod
    def should_use_persistent_reduction(features, cooperative_reduction: bool) -> bool:
        rows = features.get_reduction_hint() == ReductionHint.INNER
        if rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, COMPILED_ROW):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def uuid(self) -> str:
        """Names these choices in the key of what is kept; another rule needs another name."""
        return f"thermaflux rows up to {COMPILED_ROW}, torch {torch.__version__}"


@contextmanager
def row_choices() -> Iterator[None]:
    """RowChoices for what this thread compiles in the block."""
    with config.patch(inductor_choices_class=None):
        V.choices  # noqa: B018 - makes the thread's own choices, which it has again after the block
    with V.set_choices_handler(RowChoices()):
        yield
