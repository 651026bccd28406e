"""Decoded pairs in memory that forked loader workers share: later epochs decode nothing."""

import mmap
import multiprocessing

import numpy as np

from data.transforms import Pair

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
FIELDS = 5  # of one entry: offset + 1 (0 = absent), height, width, infrared dtype, has semantic


class PairCache:
    """At most `max_bytes` of pairs by index; when full, stored pairs stay and others are decoded.

    Anonymous shared memory: pages are taken as they are written, workers started by fork see what
    any of them stored, and a copy for another process (pickle) begins empty.
    """

    def __init__(self, num_items: int, max_bytes: int):
        self.num_items, self.max_bytes = num_items, max_bytes
        self.lock = multiprocessing.get_context("fork").Lock()
        try:
            self.memory = mmap.mmap(-1, max(1, max_bytes))
        except OSError as error:
            raise ValueError(
                f"no {max_bytes / 2**30:.1f} GiB of memory for the cache ({error}); set a smaller "
                f"data.cache_gib, or data.cache=none"
            ) from None
        index = mmap.mmap(-1, 8 * (1 + num_items * FIELDS))
        table = np.frombuffer(index, dtype=np.int64)
        self.used = table[:1]
        self.entries = table[1:].reshape(num_items, FIELDS)

    def __reduce__(self):
        return PairCache, (self.num_items, self.max_bytes)

    def get(self, index: int) -> Pair | None:
        """The stored pair as read-only views, or None."""
        with self.lock:  # also orders memory: an entry is seen only after its pixels
            offset, height, width, code, has_semantic = self.entries[index].tolist()
        if offset == 0:
            return None
        at, pixels = offset - 1, height * width

        def view(dtype, shape, start):
            array = np.frombuffer(self.memory, dtype, int(np.prod(shape)), start).reshape(shape)
            array.flags.writeable = False
            return array

        infrared = view(DTYPES[code], (height, width), at)
        at += pixels * DTYPES[code].itemsize
        visible = view(DTYPES[0], (height, width, 3), at)
        semantic = view(DTYPES[0], (height, width), at + 3 * pixels) if has_semantic else None
        return Pair(visible, infrared, semantic)

    def put(self, index: int, pair: Pair) -> None:
        """Store a pair if there is room and no other worker was faster."""
        arrays = [pair.infrared, pair.visible, *([] if pair.semantic is None else [pair.semantic])]
        size = -(-sum(a.nbytes for a in arrays) // 8) * 8
        with self.lock:
            start = int(self.used[0])
            if self.entries[index, 0] or start + size > self.max_bytes:
                return
            self.used[0] = start + size
        at = start
        for array in arrays:
            target = np.frombuffer(self.memory, array.dtype, array.size, at)
            target.reshape(array.shape)[...] = array
            at += array.nbytes
        code = DTYPES.index(pair.infrared.dtype)
        with self.lock:
            self.entries[index, 1:] = (*pair.infrared.shape, code, pair.semantic is not None)
            self.entries[index, 0] = start + 1
