"""Files in stores: URLs of any file system that fsspec knows, such as `s3://bucket/model.onnx`.

This module alone knows fsspec, and imports it when it meets the first URL. Errors are OSErrors, as
those of local files (store_requests.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from quant_core.errors import RequestError
from quant_core.model.atomic import temporary_beside
from tasks.locations import Url
from tasks.store_requests import BUSY, as_os_error, request, without_secrets

CHAIN = re.compile(r"::[A-Za-z0-9+.-]+://")  # of file systems in one another
# A URL that somebody has signed for others. In the key of a store ? alone is no query.
SIGNED = re.compile(r"[?&#][^=/]*(sig|token|key|secret|password|credential)[^=/]*=", re.IGNORECASE)
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


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store says of a file without reading it.

    identity  differs for another content; None if the store tells nothing of the kind
    """

    size: int
    identity: str | None
    is_folder: bool = False


def check_url(text: str) -> None:
    """Raises: RequestError for a URL that holds a secret, or of a file system that is missing."""
    hint = "Secrets stand where the store's own tools look for them"
    parts = urlsplit(text)
    is_web = parts.scheme.lower() in ("http", "https")
    user, at, _ = parts.netloc.rpartition("@")
    if at and (is_web or ":" in user):  # on the web a token may stand for the user
        raise RequestError("holds a password", without_secrets(text), hint)
    if (is_web and (parts.query or parts.fragment)) or SIGNED.search(text):
        raise RequestError("holds a query, which may be a secret", without_secrets(text), hint)
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
    fs.invalidate_cache(fs._parent(path))
    return _stat(request(url, lambda: fs.info(path)))


def listing(folder: Url) -> dict[Url, Stat]:
    """What lies in a folder. Raises: OSError, FileNotFoundError among them."""
    fs, path = _open_store(folder)
    fs.invalidate_cache(path)
    inside = request(folder, lambda: fs.ls(path, detail=True))
    found = {folder / _below(path, info): _stat(info) for info in inside}
    found.pop(folder, None)  # some stores list a folder in itself
    return dict(sorted(found.items()))


def tree(folder: Url) -> dict[Url, Stat]:
    """Every file below a folder; none if there is no such folder. Raises: OSError."""
    fs, path = _open_store(folder)
    fs.invalidate_cache()
    found = request(folder, lambda: fs.find(path, detail=True)).values()
    return {folder / _below(path, info): _stat(info) for info in found}


def matches(pattern: Url, root: Url) -> dict[Url, Stat]:
    """What matches a glob below the folder `root`, which holds no magic. Raises: OSError."""
    fs, path = _open_store(pattern)
    _, root_path = _open_store(root)
    fs.invalidate_cache()
    found = request(pattern, lambda: fs.glob(path, detail=True)).values()
    return dict(sorted((root / _below(root_path, info), _stat(info)) for info in found))


def read(url: Url) -> bytes:
    """The content of a small file. Raises: OSError."""
    fs, path = _open_store(url)
    content: bytes = request(url, lambda: fs.cat_file(path))
    return content


def write(url: Url, content: bytes) -> None:
    """Write a small file. Raises: OSError."""
    with _appearing(url) as (fs, path):
        request(url, lambda: fs.pipe_file(path, content))


def create(url: Url, content: bytes) -> None:
    """Write a small file that does not exist yet.

    Raises: FileExistsError if it does; OSError.
    """
    fs, path = _open_store(url)
    _make_parent(fs, url, path)
    try:
        request(url, lambda: fs.pipe_file(path, content, mode="create"))
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
    request(url, lambda: fs.get_file(source, str(path)), limit_s, passing)


def upload(path: Path, url: Url, limit_s: float) -> None:
    """Copy a local file into a store, where it appears as a whole. Raises: OSError."""
    with _appearing(url) as (fs, target):
        request(url, lambda: fs.put_file(str(path), target), limit_s)


def copy(source: Url, url: Url, limit_s: float) -> None:
    """Copy a file inside one store, where it appears as a whole.

    Raises: OSError, with EOPNOTSUPP if files of this store have to pass through this host.
    """
    _, path = _open_store(source)
    with _appearing(url) as (fs, target):
        request(url, lambda: fs.cp_file(path, target), limit_s)


def is_same_store(one: Url, other: Url) -> bool:
    """Whether a file can be copied from one to the other without passing through this host."""
    return _open_store(one)[0] is _open_store(other)[0]


def remove(url: Url) -> None:
    """Delete a file or folder, if there is one. Raises: OSError."""
    fs, path = _open_store(url)
    with contextlib.suppress(FileNotFoundError):
        request(url, lambda: fs.rm(path, recursive=True))


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
    request(url, lambda: fs.mv(temporary, path))


def _make_parent(fs: Any, url: Url, path: str) -> None:
    """Make the folder of a file, where a store has folders: others would make a bucket."""
    if url.scheme not in WHOLE:
        request(url, lambda: fs.makedirs(fs._parent(path), exist_ok=True))


def _open_store(url: Url) -> tuple[Any, str]:
    """The file system of a URL, which is kept by fsspec, and the path in it.

    `fsspec.url_to_fs` does the same, but takes `::` in a key for a chain of file systems.
    """
    import fsspec

    # `request` tries again. S3's client by itself takes 8 s to find that nobody listens.
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")
    try:
        kind = fsspec.get_filesystem_class(url.scheme)
        fs = fsspec.filesystem(url.scheme, **kind._get_kwargs_from_urls(str(url)))
        path: str = kind._strip_protocol(str(url))
    except Exception as problem:
        raise as_os_error(problem, url) from problem
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
