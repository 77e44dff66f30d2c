"""Files in stores: URLs of any file system that fsspec knows, such as `s3://bucket/model.onnx`.

This module alone knows fsspec, and imports it when it meets the first URL. Whatever goes wrong is
an OSError that names the URL as its file, as it would be with a local file.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from quant_core.errors import RequestError
from quant_core.model.atomic import temporary_beside

T = TypeVar("T")

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
CHAIN = re.compile(r"::[A-Za-z0-9+.-]+://")  # of file systems in one another
# A URL that somebody has signed for others. In the key of a store ? alone is no query.
SIGNED = re.compile(r"[?&#][^=/]*(sig|token|key|secret|password|credential)[^=/]*=", re.IGNORECASE)
LOCAL = ("file", "local")
EXTRAS = {  # scheme -> the extra of quantmill that installs what it needs
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "abfs": "az",
    "abfss": "az",
    "hf": "hf",
    "sftp": "sftp",
    "ssh": "sftp",
}
# Stores in which a file that is written appears as a whole. Elsewhere it is written under another
# name first, and renamed.
WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"}
# What tells that a file is another one than before: tags of its content, else when it was written.
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "checksum", "Content-MD5")
TIMES = ("mtime", "modified", "LastModified", "last_modified", "updated", "created")
REQUEST_S = 60.0  # for an answer without a file's content
RETRY_S = 10.0  # how long a request is tried again, beyond what the store's own client does
FIRST_PAUSE_S = 0.5
MODELS = "*.[oO][nN][nN][xX]"  # the models in a folder, as a glob
# Names of errors that every client of a store has as its own: somebody has to log in first.
REFUSAL = re.compile("Auth|Credential|Profile|RefreshError|Token")
BUSY = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EIO,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
}


@dataclass(frozen=True, slots=True, order=True)
class Url:
    """The URL of a file or folder in a store, with what `Path` has for a local one."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, below: str | PurePath) -> Url:
        # The text of a key counts: to a store, a//b is another one than a/b.
        key = below if isinstance(below, str) else "/".join(below.parts)
        return Url(f"{self.text}/{key}") if key else self

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0].lower()

    @property
    def parts(self) -> tuple[str, ...]:
        """The store, then the names of folders and file."""
        return tuple(part for part in self.text.partition("://")[2].split("/") if part)

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else ""

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Url:
        """The folder; a store is its own."""
        is_store = len(self.parts) < 2
        return self if is_store else Url(self.text.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> Url:
        return self.parent / name

    def relative_to(self, folder: Url) -> PurePosixPath:
        """The place below a folder. Raises: ValueError if it is elsewhere."""
        return PurePosixPath(*self.parts).relative_to(PurePosixPath(*folder.parts))


Location = Path | Url


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store says of a file without reading it.

    identity  differs for another content; None if the store tells nothing of the kind
    """

    size: int
    identity: str | None
    is_folder: bool = False


def is_url(text: str) -> bool:
    """Whether the text names a file in a store; `file://` is a local one."""
    return URL.match(text) is not None and Url(text).scheme not in LOCAL


def location(text: str) -> Location:
    """The file or folder that a text names."""
    if is_url(text):
        return Url(text.rstrip("/"))
    return Path(text.partition("://")[2] if URL.match(text) else text)


def is_model(path: Location) -> bool:
    """Whether the name is a model's; in either case, as files from Windows have it."""
    return path.suffix.lower() == ".onnx"


def check_url(text: str) -> None:
    """Raises: RequestError for a URL that holds a secret, or of a file system that is missing."""
    hint = "Secrets stand where the store's own tools look for them"
    parts = urlsplit(text)
    is_web = parts.scheme.lower() in ("http", "https")
    user, at, _ = parts.netloc.rpartition("@")
    if at and (is_web or ":" in user):  # on the web a token may stand for the user
        raise RequestError("holds a password", _without_secrets(text), hint)
    if (is_web and (parts.query or parts.fragment)) or SIGNED.search(text):
        raise RequestError("holds a query, which may be a secret", _without_secrets(text), hint)
    if {".", ".."} & {*Url(text).parts}:
        raise RequestError(f"is {text!r}", "path", "Stores know no folder . or ..")
    if CHAIN.search(text):
        raise RequestError(f"is {text!r}", "path", "One URL; chains of them are not read")
    import fsspec

    scheme = Url(text).scheme
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        hint = f"Known: {', '.join(EXTRAS)}, and what fsspec knows"
        raise RequestError(f"no file system is called {scheme}", "path", hint) from None
    except ImportError as problem:
        extra = EXTRAS.get(scheme)
        hint = f'pip install "quantmill[{extra}]"' if extra else str(problem)
        raise RequestError(f"{scheme}:// needs a package", "path", hint) from None


def file_system(url: Url) -> str:
    """The first name of the file system of a URL: `s3` for `s3a` too."""
    import fsspec

    names = fsspec.get_filesystem_class(url.scheme).protocol
    return names if isinstance(names, str) else str(names[0])


def stat(url: Url) -> Stat:
    """Raises: OSError, FileNotFoundError among them."""
    fs, path = _open_store(url)

    def call() -> Mapping[str, Any]:
        fs.invalidate_cache(fs._parent(path))
        info: Mapping[str, Any] = fs.info(path)
        return info

    return _stat(_request(url, call))


def listing(folder: Url) -> dict[Url, Stat]:
    """What lies in a folder. Raises: OSError, FileNotFoundError among them."""
    fs, path = _open_store(folder)

    def call() -> list[Mapping[str, Any]]:
        fs.invalidate_cache(path)
        found: list[Mapping[str, Any]] = fs.ls(path, detail=True)
        return found

    found = {folder / _below(path, info): _stat(info) for info in _request(folder, call)}
    found.pop(folder, None)  # some stores list a folder in itself
    return dict(sorted(found.items()))


def tree(folder: Url) -> dict[Url, Stat]:
    """Every file below a folder; none if there is no such folder. Raises: OSError."""
    fs, path = _open_store(folder)

    def call() -> Mapping[str, Mapping[str, Any]]:
        fs.invalidate_cache()
        found: Mapping[str, Mapping[str, Any]] = fs.find(path, detail=True)
        return found

    return {folder / _below(path, info): _stat(info) for info in _request(folder, call).values()}


def matches(pattern: Url, root: Url) -> dict[Url, Stat]:
    """What matches a glob below the folder `root`, which holds no magic. Raises: OSError."""
    fs, path = _open_store(pattern)
    _, root_path = _open_store(root)

    def call() -> Mapping[str, Mapping[str, Any]]:
        fs.invalidate_cache()
        found: Mapping[str, Mapping[str, Any]] = fs.glob(path, detail=True)
        return found

    found = _request(pattern, call).values()
    return dict(sorted((root / _below(root_path, info), _stat(info)) for info in found))


def read(url: Url) -> bytes:
    """The content of a small file. Raises: OSError."""
    fs, path = _open_store(url)
    content: bytes = _request(url, lambda: fs.cat_file(path))
    return content


def write(url: Url, content: bytes) -> None:
    """Write a small file. Raises: OSError."""
    with _appearing(url) as (fs, path):
        _request(url, lambda: fs.pipe_file(path, content))


def create(url: Url, content: bytes) -> None:
    """Write a small file that does not exist yet.

    Raises: FileExistsError if it does; OSError.
    """
    fs, path = _open_store(url)
    _make_parent(fs, url, path)
    try:
        _request(url, lambda: fs.pipe_file(path, content, mode="create"))
    except FileNotFoundError:
        raise
    except OSError as problem:  # S3 answers "precondition failed"
        with contextlib.suppress(FileNotFoundError):
            stat(url)
            raise FileExistsError(errno.EEXIST, "exists", str(url)) from problem
        raise


def download(url: Url, path: Path, limit_s: float, *, was_written: bool = False) -> None:
    """Copy a file of a store to a local path, within so many seconds.

    was_written  it has to be there: a store that does not show it yet is asked again

    Raises: OSError.
    """
    fs, source = _open_store(url)
    passing = BUSY | {errno.ENOENT} if was_written else BUSY
    _request(url, lambda: fs.get_file(source, str(path)), limit_s, passing)


def upload(path: Path, url: Url, limit_s: float) -> None:
    """Copy a local file into a store, where it appears as a whole. Raises: OSError."""
    with _appearing(url) as (fs, target):
        _request(url, lambda: fs.put_file(str(path), target), limit_s)


def copy(source: Url, url: Url, limit_s: float) -> None:
    """Copy a file inside one store, where it appears as a whole.

    Raises: OSError, with EOPNOTSUPP if files of this store have to pass through this host.
    """
    _, path = _open_store(source)
    with _appearing(url) as (fs, target):
        _request(url, lambda: fs.cp_file(path, target), limit_s)


def is_same_store(one: Url, other: Url) -> bool:
    """Whether a file can be copied from one to the other without passing through this host."""
    return _open_store(one)[0] is _open_store(other)[0]


def remove(url: Url) -> None:
    """Delete a file or folder, if there is one. Raises: OSError."""
    fs, path = _open_store(url)
    with contextlib.suppress(FileNotFoundError):
        _request(url, lambda: fs.rm(path, recursive=True))


@contextlib.contextmanager
def _appearing(url: Url) -> Iterator[tuple[Any, str]]:
    """The file system, and the path where to write what is to appear at `url` as a whole."""
    fs, path = _open_store(url)
    if url.scheme in WHOLE:
        yield fs, path
        return
    _make_parent(fs, url, path)
    temporary = f"{fs._parent(path)}/{temporary_beside(Path(url.name)).name}"
    yield fs, temporary
    _request(url, lambda: fs.mv(temporary, path))


def _make_parent(fs: Any, url: Url, path: str) -> None:
    """Make the folder of a file, where a store has folders: others would make a bucket."""
    if url.scheme not in WHOLE:
        _request(url, lambda: fs.makedirs(fs._parent(path), exist_ok=True))


def _open_store(url: Url) -> tuple[Any, str]:
    """The file system of a URL, which is kept by fsspec, and the path in it.

    `fsspec.url_to_fs` does the same, but takes `::` in a key for a chain of file systems.
    """
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(url.scheme)
        fs = fsspec.filesystem(url.scheme, **kind._get_kwargs_from_urls(str(url)))
        path: str = kind._strip_protocol(str(url))
    except Exception as problem:
        raise _as_os_error(problem, url) from problem
    return fs, path


def _below(root: str, info: Mapping[str, Any]) -> str:
    return str(info["name"]).rstrip("/").removeprefix(root.rstrip("/")).removeprefix("/")


def _stat(info: Mapping[str, Any]) -> Stat:
    for keys in (TAGS, TIMES):
        known = [f"{key} {_plain(info[key])}" for key in keys if info.get(key)]
        if known:
            break
    size = int(info.get("size") or 0)
    identity = f"{size} {known}" if known else None
    return Stat(size, identity, info.get("type") == "directory")


def _plain(value: Any) -> Any:
    """A time as seconds: some stores give it in one way in a list, and in another alone."""
    return value.timestamp() if isinstance(value, datetime) else value


def _request(
    url: Url, call: Callable[[], T], limit_s: float = REQUEST_S, passing: Collection[int] = BUSY
) -> T:
    """What the call returns, which is made again for a while if the store is busy.

    passing  errors that may be gone the next time

    Raises: OSError; TimeoutError, which is one, after `limit_s` seconds.
    """
    started, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return _within(limit_s - (time.monotonic() - started), call)
        except Exception as problem:
            error = _as_os_error(problem, url)
            elapsed_s = time.monotonic() - started
            if error.errno not in passing or elapsed_s + pause_s > min(RETRY_S, limit_s):
                raise error from problem
        time.sleep(pause_s)
        pause_s *= 2


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """What the call returns. Raises: as the call; TimeoutError if it takes longer.

    Few clients of stores can be given a time limit. A call that hangs keeps its thread, which does
    not keep this process from ending.
    """
    results: list[T] = []
    problems: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=work, daemon=True, name="quantmill-store")
    thread.start()
    thread.join(max(0.0, limit_s))
    if problems:
        raise problems[0]
    if not results:
        raise TimeoutError(errno.ETIMEDOUT, f"the store did not answer within {limit_s:.0f} s")
    return results[0]


def _as_os_error(problem: BaseException, url: Url) -> OSError:
    """Any exception of a store's client as an OSError that names the URL."""
    if not isinstance(problem, OSError) and REFUSAL.search(type(problem).__name__):
        problem = PermissionError(str(problem))
    known = {
        FileNotFoundError: (errno.ENOENT, "no such file"),
        FileExistsError: (errno.EEXIST, "exists"),
        PermissionError: (errno.EACCES, "the store refuses access"),
    }
    where = str(url)
    text = str(getattr(problem, "strerror", None) or problem) or type(problem).__name__
    text = _without_secrets(text.splitlines()[0])
    for kind, (number, words) in known.items():
        if isinstance(problem, kind):
            says_more = kind is PermissionError or "bucket" in text.lower()
            return kind(number, f"{words}: {text}" if says_more else words, where)
    if isinstance(problem, OSError) and problem.errno is not None:
        return OSError(problem.errno, text, where)
    if isinstance(problem, NotImplementedError):
        return OSError(errno.EOPNOTSUPP, "the store has no such operation", where)
    # What a client raises that is no OSError is mostly a connection that it did not get.
    is_programming = isinstance(problem, (TypeError, ValueError, AttributeError, ImportError))
    number = errno.EINVAL if is_programming else errno.EIO
    return OSError(number, f"{type(problem).__name__}: {text}", where)


def _without_secrets(text: str) -> str:
    """The text without the queries and passwords of the URLs in it."""
    text = re.sub(r"(https?://)[^/\s:@]*@", r"\1***@", text)
    text = re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)
    return re.sub(r"(://[^\s?#\"']*)[?#][^\s\"']*", r"\1?***", text)
