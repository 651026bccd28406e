"""Files that appear whole or not at all, and a gate for those that come from outside."""

import os
from pathlib import Path


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside it, then rename it to `path`.

    Raises: OSError: one sentence with the file; what was at `path` before is still there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} was not written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_limited(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises: ValueError: a device, pipe or other special file, or larger. OSError: cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a device, pipe or socket, not a file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, the most that is read of its kind")
    return data
