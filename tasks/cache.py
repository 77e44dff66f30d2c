"""The local cache of what lies in stores: each file once, by the digest of its content.

known/URL.json     the digest of what a URL held, while the store says that it is unchanged
files/, work/      the contents (contents.py)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from quant_core.errors import RequestError, reason_of
from quant_core.model.locations import data_names
from quant_core.text import digest_of
from quant_core.worker.folders import cache_folder, own_folder
from tasks import stores
from tasks.contents import Contents, file_digest, forget_local_files
from tasks.locations import Location, Url, is_model
from tasks.stores import Stat

SEEN_S = 60.0  # how long what a store said of a file is believed
TRANSFER_S = 3600.0  # for one file
TRIES = 3  # to read a file that changes meanwhile
AT_ONCE = 8  # files of one URL
FEW = 8  # files of one folder for which it is not listed
SAMPLES = (".npz", ".npy")


@dataclass(frozen=True, slots=True)
class Content:
    """What a URL holds.

    folder  that the names are relative to
    name    of the file that the URL names; "" if it names the folder
    files   name -> size in bytes and digest; the named file comes first
    """

    folder: Url
    name: str
    files: Mapping[str, Sequence[Any]]


def files_digest(folder: Location, names: Sequence[str]) -> dict[str, list[Any]]:
    """File name -> size in bytes and digest: while they hold, the result counts as done."""
    return {name: _of_file(folder / name) for name in names}


def forget_files() -> None:
    """Look at every file again, local or in a store.

    A long-lived process must not trust times of modification for ever.
    """
    forget_local_files()
    if host_cache.cache_info().currsize:
        host_cache().forget()


def _of_file(path: Location) -> list[Any]:
    if isinstance(path, Url):
        return list(host_cache().digest(path))
    return [path.stat().st_size, file_digest(path)]


@cache
def host_cache() -> Cache:
    """The cache of this host: QUANTMILL_CACHE, else `quantmill/stores` in the user's cache.

    Raises: RequestError if QUANTMILL_CACHE cannot be written.
    """
    named = os.environ.get("QUANTMILL_CACHE")
    try:
        return Cache(Path(named) if named else cache_folder() / "stores")
    except OSError as problem:
        if named:
            reason = f"cannot be written: {reason_of(problem)}"
            hint = "Let QUANTMILL_CACHE name a folder of your own"
            raise RequestError(reason, named, hint) from problem
        return Cache(own_folder() / "stores")


class Cache:
    """Contents of stores in a local folder, which several processes may share.

    limit_s  the most seconds that the transfer of one file may take

    All methods raise OSError, which names the URL, for what a store refuses or does not have.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.limit_s = TRANSFER_S
        self.contents = Contents(root)
        self._seen: dict[Url, tuple[float, Stat]] = {}
        self._fetching: dict[Url, threading.Lock] = {}
        (root / "known").mkdir(exist_ok=True, mode=0o700)

    def find(self, pattern: Url, root: Url) -> list[Url]:
        """The files that match a glob below a folder, in the order of their names."""
        return self._see(stores.matches(pattern, root))

    def files_below(self, folder: Url) -> list[Url]:
        """Every file below a folder, in the order of their names; none without such a folder."""
        return sorted(self._see(stores.tree(folder)))

    def files_in(self, folder: Url) -> list[Url]:
        """The files of a folder, in the order of their names."""
        found = stores.listing(folder)
        return self._see({url: stat for url, stat in found.items() if not stat.is_folder})

    def stat(self, url: Url) -> Stat:
        """What the store says of a file, or said a few seconds ago."""
        seen_at, stat = self._seen.get(url, (-SEEN_S, None))
        if stat is None or time.monotonic() - seen_at > SEEN_S:
            stat = stores.stat(url)
            self._see({url: stat})
        return stat

    def forget(self) -> None:
        """Ask stores again for what they have said."""
        self._seen.clear()

    def stat_all(self, urls: Sequence[Url]) -> None:
        """Ask for the `stat` of all these files at once; what fails will fail again.

        Where many lie in one folder, one list of it tells as much.
        """
        in_folder = Counter(url.parent for url in urls)
        folders = [folder for folder, count in in_folder.items() if count > FEW]
        others = [url for url in urls if in_folder[url.parent] <= FEW]

        def look(call: Callable[[Url], object], url: Url) -> None:
            with contextlib.suppress(OSError):
                call(url)

        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(partial(look, self.files_in), folders))
            list(threads.map(partial(look, self.stat), others))

    def model(self, url: Url) -> Content:
        """A model and the files of its external data, as far as they exist."""
        first = self._known(url)
        if first["data"] is None:  # what was written there was not looked into
            first = self._fetch(url)
        names = [str(PurePosixPath(name)) for name in first["data"] if _is_inside(name)]

        def data_file(name: str) -> Sequence[Any] | None:
            try:
                return _size_and_digest(self._known(url.parent / name))
            except FileNotFoundError:
                return None

        found = self._each(data_file, names)
        data = {name: file for name, file in zip(names, found, strict=True) if file}
        return Content(url.parent, url.name, {url.name: _size_and_digest(first), **data})

    def samples(self, url: Url) -> Content:
        """A file of samples or labels, or a folder of feeds."""
        if not self.stat(url).is_folder:
            return Content(url.parent, url.name, {url.name: self.digest(url)})
        visible = [file for file in self.files_in(url) if not file.name.startswith(".")]
        files = [file for file in visible if file.suffix in SAMPLES]
        found = self._each(self.digest, files)
        return Content(url, "", {f.name: d for f, d in zip(files, found, strict=True)})

    def digest(self, url: Url) -> Sequence[Any]:
        """Size and digest of a file. It is read only if the store says that it is another one."""
        return _size_and_digest(self._known(url))

    def remember(self, url: Url, file: Sequence[Any]) -> None:
        """Note the size and digest of what was just written to a URL, if the store shows it yet."""
        with contextlib.suppress(FileNotFoundError):
            stat = stores.stat(url)
            self._see({url: stat})
            self._note(url, stat, file, None)

    def place(self, content: Content, folder: Path) -> None:
        """Put the files of a content into a local folder, at once those that are not here yet."""

        def put(item: tuple[str, Sequence[Any]]) -> None:
            name, (size, digest) = item
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self.contents.link(digest, size, target):
                self._fetch_known(content.folder / name, digest, target)

        self._each(put, list(content.files.items()))

    def _each(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """What the call returns for each item, several at once."""
        if len(items) < 2:
            return [call(item) for item in items]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(call, items))

    def _see(self, found: Mapping[Url, Stat]) -> list[Url]:
        now = time.monotonic()
        self._seen |= {url: (now, stat) for url, stat in found.items()}
        return list(found)

    def _known(self, url: Url) -> Mapping[str, Any]:
        """Size, digest and names of external data of a file in a store."""
        with self._fetching.setdefault(url, threading.Lock()):  # many models share one file
            stat = self.stat(url)
            if stat.is_folder:
                raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(url))
            known = self._read_note(url)
            if known and stat.identity is not None and known["identity"] == stat.identity:
                return known
            return self._fetch(url)

    def _fetch(self, url: Url) -> Mapping[str, Any]:
        """Copy a file from its store. It is read again if it was written meanwhile."""
        before = self.stat(url)
        for _ in range(TRIES):
            with self.contents.new_file() as path:
                stores.download(url, path, self.limit_s)
                after = stores.stat(url)
                self._see({url: after})
                if after == before and path.stat().st_size == after.size:
                    names = data_names(path) if is_model(url) else []
                    digest = self.contents.keep(path)
                    return self._note(url, after, [after.size, digest], names)
            before = after
        raise OSError(errno.EBUSY, "still being written", str(url))

    def _fetch_known(self, url: Url, digest: str, target: Path) -> None:
        """Copy a file from its store that has to have this digest."""
        stores.download(url, target, self.limit_s, was_written=True)
        if file_digest(target) != digest:
            raise OSError(errno.ESTALE, "has changed since the batch began", str(url))
        self.contents.add(target, digest)

    def _note_path(self, url: Url) -> Path:
        return self.root / "known" / f"{digest_of(str(url).encode())}.json"

    def _note(
        self, url: Url, stat: Stat, file: Sequence[Any], names: Sequence[str] | None
    ) -> Mapping[str, Any]:
        """Write down what a URL holds; `names` of external data are None if they are unknown."""
        known = {
            "url": str(url),
            "identity": stat.identity,
            "size": file[0],
            "digest": file[1],
            "data": names,
        }
        with self.contents.new_file() as path:  # others may be writing a note of this URL
            path.write_text(json.dumps(known), encoding="utf-8")
            path.replace(self._note_path(url))
        return known

    def _read_note(self, url: Url) -> Mapping[str, Any] | None:
        try:
            known = json.loads(self._note_path(url).read_text(encoding="utf-8"))
            is_whole = known["url"] == str(url) and isinstance(known["data"], list | None)
            is_whole = is_whole and type(known["size"]) is int and type(known["digest"]) is str
            return known if is_whole and "identity" in known else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def _size_and_digest(known: Mapping[str, Any]) -> list[Any]:
    return [known["size"], known["digest"]]


def _is_inside(name: str) -> bool:
    """Whether a location of external data is below the folder of its model."""
    place = PurePosixPath(name)
    return not place.is_absolute() and ".." not in place.parts and bool(place.parts)
