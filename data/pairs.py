"""Pairs of visible and infrared images by index, from parquet shards or rendered on the fly."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
import torch

from data import order
from data.aspect import Shape, bucket_shapes, nearest_shape
from data.batch import Sample
from data.cache import PairCache
from data.latents import Latents
from data.manifest import SPLITS, sha256
from data.materials import TABLES
from data.parquet_source import ParquetSource
from data.pseudo_labels import LabelConfig
from data.radiometry import Planck
from data.shard_files import find_files, secret_in
from data.synthetic_source import SyntheticSource
from data.transforms import (
    AugmentConfig,
    Pair,
    Window,
    augment,
    crop_centre,
    resize,
    to_tensors,
    will_flip,
)
from utils.labels import IGNORE
from utils.problems import Checked

LOOKED = 5  # pairs that are checked when a data set is opened


@dataclass(kw_only=True)
class DataConfig(Checked):
    """Which pairs, at which size, and how they are read."""

    path: str = "synthetic"  # or a parquet file, folder, glob or URI (s3://, gs://)
    size: int | list[int] = 256  # pixels: one side, or [height, width]
    # for images whose aspect differs from that of `size`. crop: a random crop of that aspect, the
    # centre for held-out images; buckets: each in its own aspect with about as many pixels, one
    # shape per batch; squash: distorted to `size`
    aspect: Literal["crop", "buckets", "squash"] = "crop"
    window: list[float] | str = "auto"  # [low, high], "auto" (manifest; 8 bit: 0..255), "per_image"
    palette: str = ""  # colour table of class images stored in colour; "": they hold ids
    # train, val, test, if the data set stores no splits
    split_fractions: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    synthetic_scenes: dict[str, int] = field(
        default_factory=lambda: {"train": 2000, "val": 100, "test": 100}
    )
    synthetic_seed: int = 0
    shuffle_window: int = 0  # rows shuffled together, from row groups in random order; 0: all rows
    cache: str = "ram"  # "ram": decoded pairs stay in memory; "none"
    cache_gib: float = 4.0  # limit of the cache per rank
    latents: str | None = None  # folder of latents: each pair is encoded once, not in every step
    num_workers: int = 2  # decoding processes per rank
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)

    def problems(self) -> Iterator[str]:
        if self.num_workers < 0:
            yield f"num_workers must not be negative, got {self.num_workers}"
        if self.shuffle_window < 0:
            yield f"data.shuffle_window must be a number of rows, or 0, got {self.shuffle_window}"
        if secret := secret_in(self.path):
            yield secret
        change = self.augment
        exact = list(change.crop_scale) == [1, 1] and change.brightness == change.contrast == 0
        if self.latents is not None and not exact:
            yield (
                "data.latents holds each pair and its mirror image only; set"
                " data.augment.crop_scale=[1,1] data.augment.brightness=0 data.augment.contrast=0"
                f" (now {change.crop_scale}, {change.brightness} and {change.contrast}) or"
                " data.latents=null"
            )
        if self.latents is not None and self.aspect == "buckets":
            yield (
                "data.latents holds each pair in one shape, and with data.aspect=buckets some"
                " batches need another; set data.aspect=crop or data.latents=null"
            )

    def obstacles(self) -> Iterator[str]:
        if self.path != "synthetic" and "://" not in self.path:  # a URI is asked when it is opened
            try:
                find_files(self.path)
            except ValueError as error:
                yield str(error)

    def height_width(self) -> tuple[int, int]:
        """Size of every sample. Raises: ValueError: not one or two positive whole numbers."""
        size = [self.size, self.size] if isinstance(self.size, int) else list(self.size)
        if len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"data.size must be a side or [height, width], got {self.size}")
        return size[0], size[1]


class Pairs(torch.utils.data.Dataset):
    """One split, by index.

    names, sources: one string per pair. window: maps counts to [0,1] and back (`restore`); None if
    every image is stretched separately. planck: converts counts to kelvin; None if not known.
    """

    def __init__(self, cfg: DataConfig, split: str):
        self.cfg, self.split, self.size = cfg, split, cfg.height_width()
        if cfg.cache not in ("ram", "none"):
            raise ValueError(f"data.cache must be ram or none, got {cfg.cache}")
        self.source: SyntheticSource | ParquetSource
        if cfg.path == "synthetic":
            scenes, seed = cfg.synthetic_scenes, cfg.synthetic_seed
            self.source = SyntheticSource(scenes, seed, self.size, split)
        else:
            self.source = ParquetSource(cfg, split)
        self.shapes: list[Shape] | None = None  # of every sample, where they differ
        if cfg.aspect == "buckets":
            shapes = bucket_shapes(self.size)
            self.shapes = [nearest_shape(shapes, stored) for stored in self.source.sizes()]
        self.names: Sequence[str] = self.source.names
        self.sources: Sequence[str] = self.source.sources
        self.window: Window | None = self.source.window
        self.planck: Planck | None = self.source.planck
        self.notes = list(self.source.notes)
        self.num_classes = self._check_table()
        if not 0 <= cfg.cache_gib < math.inf:
            raise ValueError(f"data.cache_gib must be a number of GiB, got {cfg.cache_gib}")
        max_bytes = int(cfg.cache_gib * 2**30) if cfg.cache == "ram" else 0
        self.cache = PairCache(len(self.names), max_bytes) if max_bytes else None
        self.latents: Latents | None = None  # set by a run that caches them
        self._check_window()  # a set that cannot be read fails here, before training starts

    def _check_window(self) -> None:
        """Raises: ValueError: of the pairs looked at, none has a value inside the window."""
        number, outside = min(LOOKED, len(self)), []
        for index in (i * len(self) // number for i in range(number)):
            values = self.pair(index).infrared
            low, high = values.min(), values.max()
            if self.window is None or (high >= self.window.low and low <= self.window.high):
                return  # as a rule the first one
            outside.append(f"{self.where(index)} has {low:g} to {high:g}")
        assert self.window is not None
        raise ValueError(
            f"no infrared value of {number} pairs lies inside the window {self.window.low:g} to"
            f" {self.window.high:g} (data.window, or that of the run in use): {outside[0]}"
        )

    def _check_table(self) -> int | None:
        """Number of class ids, None if the semantic images are not used or not there."""
        wanted, stored = self.cfg.labels.material_source, self.source.table
        if wanted not in TABLES:
            return len(TABLES[stored]) if stored else None
        if stored and stored != wanted:
            raise ValueError(
                f"data.path {self.cfg.path} holds '{stored}' classes but "
                f"data.labels.material_source is '{wanted}'; set it to {stored}, quantized or none"
            )
        if not self.source.has_semantic:
            self.notes.append(f"no semantic images: '{wanted}' materials are all unlabelled")
        return len(TABLES[wanted])

    def __len__(self) -> int:
        return len(self.names)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(n,) every index once, as an epoch of training draws them."""
        if self.cfg.shuffle_window and self.source.groups is not None:
            return order.windowed(seed, epoch, self.source.groups, self.cfg.shuffle_window)
        return order.permutation(seed, epoch, len(self))

    def where(self, index: int) -> str:
        """File, row and name of a pair, for messages."""
        return self.source.where(index)

    def pair(self, index: int) -> Pair:
        """The decoded pair at its own size. Raises: ValueError naming file, row and name."""
        pair = self.cache.get(index) if self.cache else None
        if pair is not None:
            return pair
        pair = self.source.pair(index)
        if pair.semantic is not None and self.num_classes is not None:
            outside = pair.semantic[(pair.semantic >= self.num_classes) & (pair.semantic != IGNORE)]
            if outside.size:
                raise ValueError(
                    f"{self.where(index)}: class id {int(outside[0])} ({outside.size} pixels) is "
                    f"outside the table of {self.num_classes} classes"
                )
        if self.cache:
            self.cache.put(index, pair)
        return pair

    def shape(self, index: int) -> Shape:
        """(H,W) of a sample."""
        return self.shapes[index] if self.shapes else self.size

    def get(
        self, index: int, rng: np.random.Generator | None = None, shape: Shape | None = None
    ) -> Sample:
        """One sample, with latents if `self.latents` is set; `rng` None: without augmentation.

        `shape`: (H,W), if not its own: a batch of buckets may need another.
        """
        pair, stored = self.pair(index), {}
        shape, squash = shape or self.shape(index), self.cfg.aspect == "squash"
        if self.latents:
            flipped = rng is not None and will_flip(self.cfg.augment, rng)
            stored = self.latents.get(index, flipped)
        if rng is None:
            pair = resize(pair if squash else crop_centre(pair, shape), shape)
        else:
            pair = augment(pair, self.cfg.augment, rng, shape, squash)
        known = {"draw": index, "name": self.names[index], "source": self.sources[index]}
        return cast(Sample, to_tensors(pair, self.window) | stored | known)

    def check(self, index: int) -> None:
        """Raises: ValueError: a pair is damaged, or not as it was written."""
        self.source.check(index)
        self.get(index)

    def both_flips(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """visible and infrared (2,3,H,W): of the plain pair and of its mirror image."""
        rng, made, pair = np.random.default_rng(0), [], self.pair(index)
        squash = self.cfg.aspect == "squash"
        for flip in (0.0, 1.0):
            change = replace(self.cfg.augment, flip=flip)
            turned = augment(pair, change, rng, self.size, squash)
            made.append(to_tensors(turned, self.window))
        visible, infrared = (torch.stack([x[k] for x in made]) for k in ("visible", "infrared"))
        return visible, infrared

    def fingerprint(self, index: int) -> str:
        """Hash of what `both_flips` is made from: the stored images, window and size."""
        window = self.window and (self.window.low, self.window.high)
        kept = "" if self.cfg.aspect == "squash" else " cropped"
        return sha256(f"{self.source.content(index)} {self.size} {window}{kept}".encode())

    def __getitem__(self, index: int) -> Sample:
        return self.get(index)


def open_pairs(cfg: DataConfig, split: str) -> Pairs:
    """The split "train", "val" or "test" of `cfg.path`; "all" takes every row of parquet files.

    Raises: ValueError: what is wrong with the files (columns, splits, window, first row).
    """
    allowed = SPLITS if cfg.path == "synthetic" else (*SPLITS, "all")
    if split not in allowed:
        raise ValueError(f"split must be one of {', '.join(allowed)}, got {split}")
    return Pairs(cfg, split)


def describe(dataset: Pairs, samples: int = 4) -> dict:
    """Counts, sizes and ranges for a dry run, from the first `samples` pairs."""
    indices = range(min(samples, len(dataset)))
    pairs = [dataset.pair(i) for i in indices]
    sources = Counter(dataset.sources)
    return {
        "split": dataset.split,
        "pairs": len(dataset),
        "sources": dict(sorted(sources.items())),
        "size": list(dataset.size),
        "aspect": dataset.cfg.aspect,
        "shapes": sorted(set(dataset.shapes or [dataset.size])),
        "stored_sizes": sorted({p.infrared.shape for p in pairs}),
        "infrared_type": sorted({str(p.infrared.dtype) for p in pairs}),
        "infrared_range": [
            float(min(p.infrared.min() for p in pairs)),
            float(max(p.infrared.max() for p in pairs)),
        ],
        "window": "per image" if dataset.window is None else list(dataset.window),
        "semantic": dataset.source.has_semantic,
        "notes": dataset.notes,
    }
