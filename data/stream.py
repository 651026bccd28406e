"""The order of pairs: it and augmentation are functions of (seed, position) alone."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.aspect import BucketOrder, Draw, one_shape_a_batch
from data.batch import Batch, BatchInStep, Sample
from data.pairs import Pairs


class _Draws(torch.utils.data.Dataset):
    """Sample by position in the run; the order of an epoch is made once per process."""

    def __init__(self, pairs: Pairs, seed: int, augment: bool):
        self.pairs, self.seed, self.augment = pairs, seed, augment
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, draw: int | Draw) -> Sample:
        draw = self._draw(draw) if isinstance(draw, int) else draw
        # seeds of augmentation and order must differ: [seed, 0] would be both
        rng = np.random.default_rng([self.seed, draw.position, 1]) if self.augment else None
        return {**self.pairs.get(draw.item, rng, draw.shape), "draw": draw.position}

    def _draw(self, position: int) -> Draw:
        epoch, place = divmod(position, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.pairs.order(self.seed, epoch)
        return Draw(position, int(self.order[place]))


class _Batches:
    """This rank's micro-batches from `first` on, without end: positions, or draws of `buckets`."""

    def __init__(
        self, batch_size: int, rank: int, world_size: int, first: int, buckets: BucketOrder | None
    ):
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.first, self.buckets = first, buckets

    def __iter__(self) -> Iterator[Sequence[int | Draw]]:
        batch = self.first
        while True:
            if self.buckets:  # all ranks have one shape at a time, so that none waits for another
                start = self.rank * self.batch_size
                yield self.buckets.draws(batch)[start : start + self.batch_size]
            else:
                start = (batch * self.world_size + self.rank) * self.batch_size
                yield list(range(start, start + self.batch_size))
            batch += 1


def collate(samples: list[Sample]) -> Batch:
    """Tensors stacked, the rest in lists."""
    plain = cast(list[dict[str, Any]], samples)
    lists = {key: [sample[key] for sample in plain] for key in plain[0]}
    stacked = {
        key: torch.stack(values) if isinstance(values[0], torch.Tensor) else values
        for key, values in lists.items()
    }
    return cast(Batch, stacked)


def _loader(dataset, batches, num_workers: int, collate_fn=collate) -> DataLoader:
    # fork: workers share the cache of decoded pairs, and start in milliseconds
    context = multiprocessing.get_context("fork") if num_workers else None
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=context,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # the default one would draw from the run's own randomness
        worker_init_fn=_leave_signals_to_the_run,
    )


def _one_sentence(items: Iterator) -> Iterator:
    """The same items; a worker's ValueError without the traceback that torch puts before it."""
    try:
        yield from items
    except ValueError as error:
        raise ValueError(str(error).rpartition("\nValueError: ")[2].strip()) from error


def _leave_signals_to_the_run(worker: int) -> None:
    """A scheduler signals the whole process group; the run that then saves needs its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """After an error Python would send them SIGTERM, which they ignore, and wait for their end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a failure
    for worker in multiprocessing.active_children():
        worker.kill()


def _check(batch_size: int, rank: int, world_size: int, num_workers: int) -> None:
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size must be 1 or more, num_workers 0 or more, got {batch_size}, {num_workers}"
        )
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"


def stream(
    dataset: Pairs,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
    num_workers: int = 0,
    augment: bool = True,
) -> Iterator[Batch]:
    """Endless batches of this rank, from micro-batch `first` on.

    Position p is item order(seed, p // n)[p % n] of the n items (`Pairs.order`); micro-batch m of
    rank r takes the positions from (m * world_size + r) * batch_size. So n positions hold every
    item once, however many ranks there are; two ranks of batch b see together what one rank of
    batch 2 b sees; and a stream begun at `first` continues the one begun at 0. Where the
    samples' shapes differ, BucketOrder deals the positions of an epoch out anew, and a resumed run
    continues with the same number of samples in a micro-batch of all ranks.

    `draw` is the position. Worker processes do not change what is returned.
    """
    _check(batch_size, rank, world_size, num_workers)
    if seed < 0 or first < 0:
        raise ValueError(f"seed and first must not be negative, got {seed}, {first}")
    buckets = None
    if dataset.shapes:
        buckets = BucketOrder(dataset.shapes, seed, batch_size * world_size, dataset.order)
    batches = _Batches(batch_size, rank, world_size, first, buckets)
    return _one_sentence(iter(_loader(_Draws(dataset, seed, augment), batches, num_workers)))


def sequential(
    dataset: Pairs,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    limit: int = 0,
) -> Iterator[Batch]:
    """Every pair once over all ranks, in order, without augmentation; the last batch may be short.

    Where the samples' shapes differ, a batch holds one shape, and shape follows shape. Rank r takes
    items r, r + world_size, ...; ranks may have different numbers of batches. `draw` is the item's
    index. With a `limit` only so many items, evenly spaced.
    """
    _check(batch_size, rank, world_size, num_workers)
    batches = _held_out(dataset, batch_size, rank, world_size, limit)
    return _one_sentence(iter(_loader(dataset, batches, num_workers)))


def _held_out(
    dataset: Pairs, batch_size: int, rank: int, world_size: int, limit: int
) -> list[list[int]]:
    """The batches of `sequential`; where shapes differ, each holds one shape."""
    mine = evenly_spaced(len(dataset), limit)[rank::world_size]
    shapes = dataset.shapes or [dataset.size] * len(dataset)
    return one_shape_a_batch(mine, shapes, batch_size)


def in_step(
    dataset: Pairs,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    limit: int = 0,
) -> Iterator[BatchInStep]:
    """`sequential` with equally many batches on every rank, for models whose passes are collective.

    Every batch has `filler` (bool): true for one that only keeps the other ranks company, whose
    results must not count.
    """
    ranks = range(world_size) if dataset.shapes else (0, rank)  # of one shape, rank 0 has the most
    counts = {r: len(_held_out(dataset, batch_size, r, world_size, limit)) for r in ranks}
    own, most = counts[rank], max(counts.values())
    for batch in sequential(dataset, batch_size, rank, world_size, num_workers, limit):
        yield {**batch, "filler": False}
    for _ in range(most - own):
        yield {**collate([dataset[0]]), "filler": True}


class _Calls(torch.utils.data.Dataset):
    """A function as a data set; its arguments are the indices."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


def in_workers(function: Callable, items: Iterable, num_workers: int = 0) -> Iterator:
    """function(item) for every item, in order, computed ahead by worker processes."""
    batches = [[item] for item in items]
    found = _loader(_Calls(function), batches, num_workers, collate_fn=lambda found: found[0])
    return _one_sentence(iter(found))


def evenly_spaced(length: int, limit: int = 0) -> list[int]:
    """At most `limit` of the indices 0..length-1, from the first on; all of them for limit 0."""
    count = min(limit or length, length)
    return [i * length // count for i in range(count)]
