"""Why training ends before its last step: a signal, or the end of its seconds."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from utils import dist

MOST_SECONDS = 2_000_000  # 23 days; milliseconds travel between ranks as int32


class Clock:
    """Wall-clock seconds of training, one number for all ranks: that of the slowest.

    Counted from the first step on, with its compilation, and through the evaluations between steps;
    what a run had before it was resumed counts too. With limit None nothing is counted.
    """

    def __init__(self, limit: float | None, before: float = 0.0):
        self.limit, self.before = limit, before
        self.agreed = before  # as of the last step whose answers were read
        self.started: float | None = None

    @property
    def over(self) -> bool:
        return self.limit is not None and self.agreed >= self.limit

    def start(self) -> None:
        self.started = time.perf_counter()

    def launch(self, device: torch.device) -> Callable[[], None]:
        """Ask all ranks for their time; calling what is returned sets `agreed`. Collective."""
        if self.limit is None:
            return lambda: None
        assert self.started is not None, "the clock was not started"
        seconds = self.before + time.perf_counter() - self.started
        milliseconds = torch.full((1,), int(1000 * seconds), dtype=torch.int32, device=device)
        read = dist.most_of_ranks_later(milliseconds)

        def set_agreed() -> None:
            self.agreed = read()[0] / 1000

        return set_agreed


class StopSignal:
    """Within the block, the first SIGTERM or SIGINT is only noted; a later one acts as usual.

    torchrun passes on what its ranks got already: after a Ctrl-C each has three in half a second.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    GRACE = 5.0  # seconds within which a repeated signal is ignored

    def __init__(self):
        self.received: str | None = None
        self.agreed = False  # whether any rank received one, as all ranks know it
        self._previous: dict = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # else Python refuses
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > self.GRACE:
            self._restore()
            signal.raise_signal(number)

    def __exit__(self, *error: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
