"""Files that appear whole or not at all, and limits for files from outside."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside it, then rename it to `path`.

    Raises: OSError: one sentence with the file; what was at `path` before is still there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _clear_parts(path.parent)
        with open(part, "wb") as file, _held(part):
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} was not written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


_cleared: set[Path] = set()  # folders that this process has cleared


def _clear_parts(folder: Path) -> None:
    """Delete unfinished files of processes that no longer exist; once per process."""
    folder = folder.absolute()
    if folder not in _cleared:
        for left in folder.glob(".*.part"):
            with _held(left) as free:
                if free and left.is_file():
                    left.unlink(missing_ok=True)
        _cleared.add(folder)


def read_limited(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises: ValueError: a device, pipe or other special file, or larger. OSError: cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a device, pipe or socket, not a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        too_large = size > most
        # read() allocates what it is asked for; what lies in /proc has a size of 0
        data = b"" if too_large else file.read(min(most, max(size, 2**16)) + 1)
    if too_large or len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, the limit for this kind of file")
    return data


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes it if the block succeeds, else vanishes."""
    out = out.absolute()
    clear_remains(out)
    part, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    part.mkdir(parents=True)
    with _held(part):
        try:
            yield part
            with _held(out):  # it is `old` for a moment
                if out.exists():
                    out.rename(old)
                try:
                    part.rename(out)
                except OSError:
                    if old.exists():
                        old.rename(out)
                    raise
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def clear_remains(out: Path) -> None:
    """Repair what a process killed in `whole_folder(out)` left behind.

    If it died between the two renames, the old folder gets its name back. What another process
    still holds stays.
    """
    out = out.absolute()
    for kind in ("old", "new"):
        for left in sorted(out.parent.glob(f".{out.name}.{kind}-*")):
            with _held(left) as free:
                if not free or not left.is_dir() or left.is_symlink():
                    continue
                if kind == "old" and not out.exists():
                    left.rename(out)
                    print(f"{out} is back: a process was killed while it replaced it", flush=True)
                else:
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Lock a file or folder while the block runs; the end of the process unlocks it too.

    Gives whether it is ours now: no other process holds it, and this file system can tell.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(number)
