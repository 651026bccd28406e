"""Aspects of images: shapes of about one number of pixels, and batches that hold one shape each."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.order import permutation

STEP = 16  # pixels: sides are multiples of it, as the models' tokens are
ASPECTS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 5 / 2, 3)  # long side by short side
LEAST_SIDE = 32  # pixels: the discriminator's convolutions see no less
Shape = tuple[int, int]  # height, width


def same_area(size: Shape, aspect: float) -> Shape:
    """About the pixels of `size` at height / width = `aspect`, sides in multiples of STEP.

    Of the shapes around the exact one the nearest: its aspect counts, its area a quarter of it.
    """
    area = size[0] * size[1]
    exact = math.sqrt(area * aspect) / STEP, math.sqrt(area / aspect) / STEP
    heights, widths = ([max(1, int(n) + k) for k in (-1, 0, 1, 2)] for n in exact)

    def distance(shape: Shape) -> float:
        of_aspect = abs(math.log(shape[0] / shape[1] / aspect))
        return of_aspect + abs(math.log(shape[0] * shape[1] * STEP**2 / area)) / 4

    height, width = min(itertools.product(heights, widths), key=distance)
    return height * STEP, width * STEP


def bucket_shapes(size: Shape) -> list[Shape]:
    """`size` itself, and shapes of about as many pixels for ASPECTS, portrait and landscape."""
    aspects = [a for aspect in ASPECTS for a in (aspect, 1 / aspect)]
    shapes = [size, *(same_area(size, aspect) for aspect in aspects)]
    return [shape for shape in dict.fromkeys(shapes) if min(shape) >= min(LEAST_SIDE, *size)]


def nearest_shape(shapes: list[Shape], size: Shape) -> Shape:
    """The shape whose aspect is nearest to that of an image of `size`."""
    wanted = math.log(size[0] / size[1])
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - wanted))


class Draw(NamedTuple):
    """A sample to be made: its place in the run, the item, and the shape that it gets."""

    position: int
    item: int
    shape: Shape | None = None  # None: the item's own


class BucketOrder:
    """Which samples come together when a batch holds one shape: a function of (seed, batch).

    Position p is item order(seed, p // n)[p % n], as everywhere. An epoch's whole batches are
    taken together and their positions dealt out anew, so that every batch has one shape and every
    image is seen once an epoch. What is left of each shape, less than a batch, is put together with
    the nearest aspects and cropped to the shape that most of them have.

    Args:
        shapes: of every item.
        batch: samples of all ranks in a micro-batch.
        order: (seed, epoch) -> every item once; a permutation of all, if not given.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        seed: int,
        batch: int,
        order: Callable[[int, int], np.ndarray] | None = None,
    ):
        self.shapes, self.seed, self.batch = shapes, seed, batch
        self.order = order or (lambda seed, epoch: permutation(seed, epoch, len(shapes)))
        self.dealt = lru_cache(maxsize=2)(self._deal)

    def draws(self, batch: int) -> list[Draw]:
        """The samples of a micro-batch of all ranks, in order."""
        epoch = batch * self.batch // len(self.shapes)
        while batch >= self._first(epoch + 1):
            epoch += 1  # it begins at the end of an epoch
        return self.dealt(epoch)[batch - self._first(epoch)]

    def _first(self, epoch: int) -> int:
        """The first micro-batch that begins in this epoch."""
        return -(-epoch * len(self.shapes) // self.batch)

    def _deal(self, epoch: int) -> list[list[Draw]]:
        n, first, last = len(self.shapes), self._first(epoch), self._first(epoch + 1)
        orders: dict[int, np.ndarray] = {}
        own: dict[Shape, list[Draw]] = {}
        for position in range(first * self.batch, last * self.batch):
            turn, place = divmod(position, n)
            if turn not in orders:
                orders[turn] = self.order(self.seed, turn)
            item = int(orders[turn][place])
            shape = self.shapes[item]
            own.setdefault(shape, []).append(Draw(position, item, shape))
        batches, left = [], []
        for shape in sorted(own, key=lambda shape: shape[0] / shape[1]):
            whole = len(own[shape]) // self.batch * self.batch
            batches += _cut(own[shape][:whole], self.batch)
            left += own[shape][whole:]
        for mixed in _cut(left, self.batch):
            shapes = [draw.shape for draw in mixed]
            most = max(dict.fromkeys(shapes), key=shapes.count)
            batches.append([draw._replace(shape=most) for draw in mixed])
        rng = np.random.default_rng([self.seed, epoch, 2])  # [.., 1]: augmentation
        return [batches[i] for i in rng.permutation(len(batches))]


def one_shape_a_batch(
    items: Sequence[int], shapes: Sequence[Shape], batch_size: int
) -> list[list[int]]:
    """`items` in batches of at most `batch_size` whose `shapes` (of every item) are equal."""
    own: dict[Shape, list[int]] = {}
    for item in items:
        own.setdefault(shapes[item], []).append(item)
    return [batch for same in own.values() for batch in _cut(same, batch_size)]


def _cut(items: list, length: int) -> list[list]:
    return [items[i : i + length] for i in range(0, len(items), length)]
