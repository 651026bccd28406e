"""Latents of both flips of every pair on disk, so that training need not encode them again.

    latents-<sha256 of the file>.safetensors    <key>/latents, <key>/masked (2, N, 64) fp32, a pair

The first row of a tensor is of the plain pair, the second of its mirror image. A key is a hash of
all that the latents depend on: what has changed has another key, and nothing stale is ever read.

Dimension key:  N tokens of the diptych
"""

import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

SHARD = 64  # pairs a file
PATTERN = "latents-*.safetensors"
NAMES = ("latents", "masked")
STALE = 3600.0  # seconds; no shard takes so long to write
Entry = tuple[Tensor, Tensor]  # latents and masked latents, (2, N, 64) each


def key_of(fingerprint: str, codec: str) -> str:
    """The key of a pair's latents. `fingerprint`: of images, window and size; `codec`: of it."""
    return hashlib.sha256(f"{fingerprint} {codec} plain and flipped".encode()).hexdigest()


def make_folder(path: str) -> Path:
    """Raises: ValueError: there is none and none can be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.latents is {path}, but no folder can be created there ({error.strerror})"
        ) from None
    return Path(path)


def check_room(folder: Path, pairs: int, tokens: tuple[int, int]) -> None:
    """Raises: ValueError: nothing can be written there, or not so many pairs of (N, 64)."""
    needed, free = pairs * 16 * tokens[0] * tokens[1], shutil.disk_usage(folder).free
    if pairs and not os.access(folder, os.W_OK):
        raise ValueError(f"data.latents: {pairs} pairs are missing in {folder}, which is read-only")
    if needed > free:
        raise ValueError(
            f"data.latents: {pairs} pairs need {needed / 2**30:.1f} GiB more in"
            f" {folder}, but {free / 2**30:.1f} are free"
        )


def remove_damaged(folder: Path, rank: int, world_size: int) -> list[str]:
    """Check this rank's share of the shards against their hashes. Returns: the names of those lost.

    Also removes what killed processes left half-written.
    """
    damaged = []
    for path in folder.glob(PATTERN):
        if zlib.crc32(path.name.encode()) % world_size != rank:
            continue  # by name: places in a list shift while another rank removes a file
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        if digest.hexdigest() != path.stem.removeprefix("latents-"):
            path.unlink()
            damaged.append(path.name)
    for path in folder.glob("*.tmp"):
        if time.time() - path.stat().st_mtime > STALE:  # a younger one may be of another run
            path.unlink(missing_ok=True)
    return damaged


def write_shard(folder: Path, entries: dict[str, Entry]) -> None:
    """Write a shard whole or not at all."""
    tensors = {f"{key}/{n}": x for key, entry in entries.items() for n, x in zip(NAMES, entry)}
    data = save(tensors)
    path = folder / f"latents-{hashlib.sha256(data).hexdigest()}.safetensors"
    temporary = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def find(folder: Path) -> dict[str, Path]:
    """The shard of every key in the folder. Raises: ValueError: one is damaged."""
    shards: dict[str, Path] = {}
    for path in sorted(folder.glob(PATTERN)):
        with _named(path), safe_open(path, "pt") as file:
            shards |= {name.split("/")[0]: path for name in file.keys()}  # noqa: SIM118
    return shards


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading a shard as one sentence: safetensors raises kinds of its own."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it made again") from None


class Latents:
    """The latents of a data set's pairs, by index, from memory-mapped shards.

    Raises: ValueError: some are not in the folder.
    """

    def __init__(self, folder: Path, keys: list[str]):
        shards = find(folder)
        absent = sum(key not in shards for key in keys)
        if absent:
            raise ValueError(
                f"data.latents: {absent} of {len(keys)} pairs are not in {folder}; it"
                " must be on storage that all machines see"
            )
        self.places = [(key, shards[key]) for key in keys]
        self.files: dict[Path, safe_open] = {}  # opened by each process when first needed

    def get(self, index: int, flipped: bool) -> dict[str, Tensor]:
        """latents and masked, (N, 64) fp32, of a pair or of its mirror image."""
        key, path = self.places[index]
        with _named(path):
            if path not in self.files:
                self.files[path] = safe_open(path, "pt")
            return {n: self.files[path].get_slice(f"{key}/{n}")[int(flipped)] for n in NAMES}
