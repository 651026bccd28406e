"""Checkpoints: written whole or not at all, read without running any code, only what is trained.

checkpoint_00000500.pth   {model, optimizer, ema, step, ..., config, versions}

The file is torch's zip; its comment holds the SHA-256 of all bytes before the digits.
"""

import hashlib
import os
import platform
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from utils import dist

PATTERN = "checkpoint_*.pth"
MARK = b"thermaflux sha256 "
DIGITS = 64  # of the hash, in hexadecimal
END = 22  # bytes of a zip's last record; its last two count the comment's bytes
_pending: dict[str, Any] = {"thread": None, "error": None}


# files


def save(path: str | Path, parts: dict[str, Any], background: bool = False, keep: int = 0) -> None:
    """Write `parts` (tensors, plain values, nested) so that `path` is never half a file.

    Args:
        background: copy to memory now and write while training goes on. The next `save` or `wait`
            waits for the file and raises its error; so does the end of the program wait.
        keep: afterwards delete all but this many of the newest checkpoints beside it; 0: none.

    Raises:
        OSError: not written; what was at `path` before is still there.
    """
    wait()
    path = Path(path)
    parts = {**_on_cpu(parts), "versions": versions()}
    if not background:
        _write(path, parts, keep)
        return

    def work() -> None:
        try:
            _write(path, parts, keep)
        except Exception as error:
            _pending["error"] = error

    _pending["thread"] = threading.Thread(target=work, name="checkpoint")
    _pending["thread"].start()


def wait() -> None:
    """Return once no file is being written. Raises: OSError of the last background save."""
    if _pending["thread"]:
        _pending["thread"].join()
    error, _pending["thread"], _pending["error"] = _pending["error"], None, None
    if error:
        raise OSError(f"a checkpoint could not be written: {error}") from error


@contextmanager
def finished_on_exit() -> Iterator[None]:
    """Leaving the block, also by an error, waits for the file being written."""
    try:
        yield
    finally:
        wait()


def load(path: str | Path) -> dict[str, Any]:
    """The parts of a checkpoint, on the CPU. Only tensors and plain values are accepted.

    Raises:
        ValueError: no file, damaged, or not a checkpoint of this project. OSError: cannot be read.
    """
    if damage := damaged(path):
        raise ValueError(f"checkpoint {path} is damaged: {damage}")
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:]
        raise ValueError(f"{path} holds more than tensors and plain values: {reason}") from error
    if not isinstance(parts, dict) or not isinstance(parts.get("model"), dict):
        raise ValueError(f"{path} is no checkpoint of this project: it has no entry `model`")
    for name, value in parts["model"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{path} is no checkpoint of this project: {name!r} is a {kind}")
    return parts


def newest(
    directory: str | Path, check: Callable[[dict], str | None] = lambda parts: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a folder that can be used, and its parts; None if there is none.

    Every one passed over is named, with the reason: damaged, or what `check` says of its parts.
    """
    for path in sorted(Path(directory).glob(PATTERN), key=step_of, reverse=True):
        try:
            parts = load(path)
            reason = check(parts)
        except (ValueError, OSError) as error:
            reason = str(error)
        if not reason:
            return path, parts
        dist.print0(f"passing over {path}: {reason}")
    return None


def latest(directory: str | Path) -> Path | None:
    """The newest intact checkpoint in a folder; a damaged one is named and passed over."""
    found = newest(directory)
    return found[0] if found else None


def prune(written: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to the one just written; 0 keeps all.

    Those of later steps were damaged when the run went on, and passed over.
    """
    found = [p for p in written.parent.glob(PATTERN) if step_of(p) <= step_of(written)]
    found.sort(key=step_of)
    for path in found[:-keep] if keep else []:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def damaged(path: str | Path) -> str | None:
    """What is wrong with the file, or None. Raises: OSError: cannot be read.

    A file with a hash is intact if every byte is. One without (of before there were hashes) is
    intact as far as the zip's own checksums see. A hash that is itself damaged is no missing one.
    """
    path = Path(path)
    if not path.is_file():
        return "there is no file of this name"
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - END - len(MARK) - DIGITS))
        tail = file.read()
    record, mark, digits = tail[:END], tail[END:-DIGITS], tail[-DIGITS:]
    if record[:4] == b"PK\5\6" and mark == MARK:
        return None if _hash(path, size - DIGITS) == digits else "its hash is another"
    if tail[-END:][:4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        return f"it does not end as a checkpoint does ({size} bytes)"
    try:
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                # torch checks no sums; of a part marked as compressed or as a folder (an attribute)
                # it gives memory that was never written, without an error
                stored = item.compress_type == zipfile.ZIP_STORED and item.external_attr == 0
                if not stored or item.compress_size != item.file_size:
                    return f"its entry for {item.filename!r} is not as torch writes it"
            bad = archive.testzip()
        return f"checksum of {bad!r} is wrong" if bad else None
    except Exception as error:  # zipfile raises a dozen types on foreign bytes
        return f"{type(error).__name__}: {' '.join(str(error).split())} ({size} bytes)"


def _hash(path: Path, length: int) -> bytes:
    """SHA-256 of the first `length` bytes, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while length > 0 and (block := file.read(min(length, 2**22))):
            found.update(block)
            length -= len(block)
    return found.hexdigest().encode()


def _add_hash(path: Path) -> None:
    """Give the zip of `path` a comment with the hash of all that is before the hash."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size - 2)
        file.write((len(MARK) + DIGITS).to_bytes(2, "little") + MARK)
        file.flush()
        file.write(_hash(path, size + len(MARK)))
        file.flush()
        os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    return {"torch": str(torch.__version__), "python": platform.python_version()}


def _write(path: Path, parts: dict[str, Any], keep: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob("*.pth.tmp"):  # of a process that was killed here
        stale.unlink(missing_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    faults: list[OSError] = []
    try:
        with open(temporary, "wb") as file:
            torch.save(parts, cast(IO[bytes], _Noted(file, faults)))
        _add_hash(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20  # as it was when the write failed
        temporary.unlink(missing_ok=True)
        reason = faults[0] if faults else error
        raise OSError(f"{path} was not written, {free:.0f} MiB are free there: {reason}") from error
    folder = os.open(path.parent, os.O_RDONLY)  # the new name must survive a power cut too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    prune(path, keep)


class _Noted:
    """A file whose errors are kept: torch replaces them by one of its own, without the reason."""

    def __init__(self, file: IO[bytes], faults: list[OSError]):
        self.file, self.faults = file, faults

    def write(self, data: Any) -> int:
        return self._try(self.file.write, data)

    def flush(self) -> None:
        self._try(self.file.flush)

    def _try(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            self.faults.append(error)
            raise


def step_of(path: Path) -> int:
    """The number in a checkpoint's name; -1 if it has none."""
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _on_cpu(value: Any) -> Any:
    """A copy that later steps of training do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on_cpu(item) for item in value]
    return value


# what belongs in


def saved_names(model: nn.Module) -> list[str]:
    """Names of the tensors of `model` that a checkpoint holds, as in its state_dict.

    These are the parameters that require grad, the buffers of the modules they sit in, and
    everything below a module with a true attribute `saved_when_frozen`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name for name, parameter in parameters.items() if parameter.requires_grad}
    modules = dict(model.named_modules(remove_duplicate=False))
    state = model.state_dict()
    kept = [
        prefix for prefix, module in modules.items() if getattr(module, "saved_when_frozen", False)
    ]
    for name in state:
        owner = name.rpartition(".")[0]
        if any(not prefix or name.startswith(prefix + ".") for prefix in kept):
            names.add(name)
        elif name not in parameters:
            # a module with only buffers (BatchNorm without affine) goes with what is around it
            while owner and not any(True for _ in modules[owner].parameters()):
                owner = owner.rpartition(".")[0]
            if any(p.requires_grad for p in modules[owner].parameters()):
                names.add(name)
    return [name for name in state if name in names]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors named by `saved_names`; names without the prefix that torch.compile adds."""
    state = model.state_dict()
    return {_plain(name): state[name] for name in saved_names(model)}


def load_into(model: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Copy the tensors of `trained_state` back into a model of the same architecture.

    Raises:
        ValueError: one that should be there is missing, unknown here, or of another shape.
    """
    own = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    missing = [n for n in map(_plain, saved_names(model)) if n not in state]
    unknown = [n for n in state if n not in own]
    unequal = [n for n in state if n in own and own[n].shape != state[n].shape]
    for names, text in (
        (missing, "it lacks {}"),
        (unknown, "this model has no {}"),
        (unequal, "{} is {} there and {} here"),
    ):
        if names:
            name, more = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            shapes = [tuple(s[name].shape) for s in (state, own) if name in s]
            raise ValueError(f"{where} does not fit: {text.format(repr(name), *shapes)}{more}")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")
