"""Finds shards: a file, folder, glob or URI to parquet files, and the manifests beside them."""

import fnmatch
import os
import posixpath
import re
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from data import manifest as mf

# Seconds before a request that failed is made again. Arrow's client of S3 has by then repeated it
# itself for about 6 seconds, and that of Google's store for as long as its URI says.
WAITS = (1.0,)
GOOGLE_RETRIES = "retry_limit_seconds"  # 15 minutes if the URI does not say
# A password in front of the host, or a parameter that is one.
SECRET = re.compile(r"://[^/@]*:(?!\d+/)[^@]*@|[?&][^=]*(key|secret|token|password|sas|sig)[^=]*=")
PERMANENT = re.compile(
    r"ACCESS_DENIED|FORBIDDEN|INVALID_ACCESS_KEY|SIGNATURE|CREDENTIAL|NO_SUCH|NOT_FOUND|"
    r"PERMISSION|UNAUTHENTICATED|HTTP status 40[0134]",
    re.IGNORECASE,
)
DENIED = re.compile(r"ACCESS_DENIED|FORBIDDEN|PERMISSION|HTTP status 40[13]", re.IGNORECASE)
MOST_MANIFEST_BYTES = 16 * 2**20
Result = TypeVar("Result")


class Storage:
    """The file system of a path or URI. Each process opens its own: clients do not outlive a fork.

    Raises: ValueError: the URI holds a password, which would end in logs and checkpoints.
    """

    def __init__(self, path: str):
        if secret := secret_in(path):
            raise ValueError(secret)
        self.uri = path if "://" in path else ""
        self.scheme = self.uri.partition("://")[0]
        self.pid = -1

    def __getstate__(self):
        return {"uri": self.uri, "scheme": self.scheme, "pid": -1}

    @property
    def remote(self) -> bool:
        return self.scheme not in ("", "file")

    @property
    def fs(self) -> pafs.FileSystem:
        if self.pid != os.getpid():
            self._open()
        return self._fs

    def base(self, path: str) -> str:
        """The path inside the file system."""
        if self.uri:
            _ = self.fs
            return self._base
        return os.path.abspath(os.path.expanduser(path or "."))

    def _open(self) -> None:
        if self.uri:
            uri = self.uri
            if self.scheme in ("gs", "gcs") and GOOGLE_RETRIES not in uri:
                uri += f"{'&' if '?' in uri else '?'}{GOOGLE_RETRIES}=10"
            self._fs, base = pafs.FileSystem.from_uri(uri)
            self._base = base.rstrip("/") or base
        else:
            self._fs = pafs.LocalFileSystem()
        self.pid = os.getpid()

    def name(self, path: str) -> str:
        """A path of this file system as a message names it."""
        return f"{self.scheme}://{path}" if self.remote else path

    def attempt(self, action: Callable[[], Result]) -> Result:
        """action(); after a network's error again, `WAITS` seconds later.

        Raises: OSError: of the last attempt; or of the first, where another would not help.
        """
        for wait in WAITS if self.remote else ():
            try:
                return action()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                if PERMANENT.search(str(error)):
                    raise
                time.sleep(wait)
        return action()

    def reason(self, error: Exception) -> str:
        """Why a request failed, in one line."""
        text = " ".join(str(error).split()).rstrip(".")
        if self.remote and DENIED.search(text):
            text += "; the credentials in the environment do not permit it"
        return text


def secret_in(path: str) -> str:
    """What is wrong with a URI that has a password or key in it, without repeating it; or ""."""
    if "://" not in path or not SECRET.search(path):
        return ""
    scheme = path.partition("://")[0]
    return (
        f"data.path is a {scheme}:// URI with a password or key in it, which would be written "
        f"to logs and checkpoints; leave it out and set the environment variables of the store "
        f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...)"
    )


class Files(NamedTuple):
    """Sorted parquet files below a base folder; `whole` if the folder itself was asked for."""

    storage: Storage
    sizes: dict[str, int]  # bytes of each file, by its path
    base: str
    whole: bool

    @property
    def paths(self) -> list[str]:
        return list(self.sizes)


def find_files(path: str) -> Files:
    """The parquet files of a file, folder, glob or URI.

    Raises: ValueError: nothing there, or no parquet file in it; a URI that cannot be opened.
    """
    address, mark, query = path.partition("?") if "://" in path else (path, "", "")
    wildcard = None if os.path.exists(path) else re.search(r"[*?\[]", address)
    fixed = address[: address.rfind("/", 0, wildcard.start()) + 1] if wildcard else address
    storage = Storage(fixed + mark + query)
    try:
        base = storage.attempt(lambda: storage.base(fixed))
        info = storage.attempt(lambda: storage.fs.get_file_info(base))
        if info.type == pafs.FileType.NotFound:
            raise ValueError(
                f"data.path {path}: no such file or folder; make one with prepare.py, or use "
                f"data.path=synthetic"
            )
        if info.type == pafs.FileType.File:
            return Files(storage, {base: info.size}, posixpath.dirname(base), False)
        selector = pafs.FileSelector(base, recursive=True)
        listed = storage.attempt(lambda: storage.fs.get_file_info(selector))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data.path {path}: cannot be opened ({storage.reason(error)})") from None
    sizes = {f.path: f.size for f in listed if f.type == pafs.FileType.File}
    inside = {f: posixpath.relpath(f, base) for f in sorted(sizes)}
    if wildcard:
        rest = address[len(fixed) :]
        inside = {f: name for f, name in inside.items() if _matches(name, rest)}
    files = [f for f, name in inside.items() if f.endswith(".parquet") and not _hidden(name)]
    if not files:
        raise ValueError(
            f"data.path {path}: no .parquet file there; prepare.py makes a data set of images"
        )
    return Files(storage, {f: sizes[f] for f in files}, base, wildcard is None)


def _matches(name: str, pattern: str) -> bool:
    """fnmatch where * stays inside one folder and ** does not."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def load_manifests(found: Files) -> list[dict]:
    """The manifests beside these files, without the names of pairs; shard sizes are checked.

    Raises: ValueError: a shard is missing, unknown or not as long as it was written.
    """
    storage, manifests = found.storage, []
    for folder in sorted({posixpath.dirname(f) for f in found.sizes}):
        path = f"{folder}/manifest.json"
        where = storage.name(path)
        if (text := _read_if_there(storage, path)) is None:
            continue
        manifest = mf.parse(text, where)
        for split in manifest["splits"].values():
            split.pop("names", None)  # the rows have them
        shards = {shard["file"]: shard for shard in manifest["shards"]}
        for file, size in found.sizes.items():
            if posixpath.dirname(file) != folder:
                continue
            shard = shards.pop(posixpath.basename(file), None)
            name = storage.name(file)
            if shard is None:
                raise ValueError(f"{name}: not listed in {where}; keep other files elsewhere")
            if size != shard["bytes"]:
                raise ValueError(
                    f"{name}: {size:,} bytes, but {where} says {shard['bytes']:,}: "
                    f"the file is truncated or was changed"
                )
        if found.whole and shards:
            here = storage.name(folder)
            raise ValueError(f"{here}: {min(shards)} is listed in {where} but missing")
        manifests.append(manifest)
    return manifests


def _read_if_there(storage: Storage, path: str) -> str | None:
    def read() -> str | None:
        if storage.fs.get_file_info(path).type != pafs.FileType.File:
            return None
        with storage.fs.open_input_stream(path) as stream:
            data = stream.read(MOST_MANIFEST_BYTES + 1)
        if len(data) > MOST_MANIFEST_BYTES:
            where = storage.name(path)
            raise ValueError(f"{where}: more than {MOST_MANIFEST_BYTES:,} bytes, no manifest")
        return data.decode(errors="replace")

    try:
        return storage.attempt(read)
    except OSError as error:
        where = storage.name(path)
        raise ValueError(f"{where}: cannot be read ({storage.reason(error)})") from None
