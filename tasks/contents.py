"""Contents of files in a local folder, each once under its digest, and folders to work in.

files/DIGEST       contents; those used longest ago go when there are too many
work/              folders of links to contents, one for each stage that is running
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

MAX_GB = 20.0  # of contents, if QUANTMILL_CACHE_GB says nothing else
STRAY_S = 60.0  # after which a work folder that nobody holds is one of a process that was killed


def file_digest(path: Path) -> str:
    """The digest of a local file, which is read again only when it has changed.

    Raises: FileNotFoundError if there is no regular file; OSError if it cannot be read.
    """
    found = path.stat()
    if not S_ISREG(found.st_mode):  # to read a pipe would wait for somebody to write
        raise FileNotFoundError(errno.ENOENT, "is no regular file", str(path))
    return _file_digest(path, found.st_size, found.st_mtime_ns, found.st_ino)


def forget_local_files() -> None:
    """Read every local file again: a long-lived process must not trust times for ever."""
    _file_digest.cache_clear()


@lru_cache(maxsize=100_000)
def _file_digest(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class Contents:
    """The contents, which several processes may share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.max_bytes = int(float(os.environ.get("QUANTMILL_CACHE_GB") or MAX_GB) * 1e9)
        self._adding = threading.Lock()
        for name in ("files", "work"):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, path: Path, digest: str) -> None:
        """Keep a local file too, by a link to it."""
        with contextlib.suppress(OSError):
            os.link(path, self.root / "files" / digest)
        self._drop_oldest()

    def keep(self, path: Path) -> str:
        """Make a file one of the contents. Returns its digest."""
        digest = file_digest(path)
        path.replace(self.root / "files" / digest)
        self._drop_oldest()
        return digest

    def link(self, digest: str, size: int, target: Path) -> bool:
        """Link a content to `target`; False if it is not here, or not whole."""
        kept = self.root / "files" / digest
        try:
            stat = kept.stat()
            if stat.st_size != size or file_digest(kept) != digest:
                kept.unlink()
                return False
            os.utime(kept, ns=(time.time_ns(), stat.st_mtime_ns))
            try:
                os.link(kept, target)
            except FileNotFoundError:
                return False
            except OSError:  # a file system without links
                shutil.copyfile(kept, target)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder that is deleted at the end; those of killed processes are deleted now."""
        work = self.root / "work"
        self._delete_strays(work)
        folder = Path(tempfile.mkdtemp(dir=work))
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)

    @contextlib.contextmanager
    def new_file(self) -> Iterator[Path]:
        """A place for a file beside the contents; what is left there is deleted at the end."""
        with self.work_folder() as folder:
            yield folder / "new"

    def _drop_oldest(self) -> None:
        """Delete what was used longest ago. What a stage is using has another link to it."""
        with self._adding:
            found = []
            for entry in os.scandir(self.root / "files"):
                with contextlib.suppress(OSError):
                    stat = entry.stat()
                    found.append((stat.st_atime_ns, stat.st_size, entry.path))
            left = sum(size for _, size, _ in found)
            for _, size, path in sorted(found)[:-1]:  # never the one that was just added
                if left <= self.max_bytes:
                    break
                Path(path).unlink(missing_ok=True)
                left -= size

    def _delete_strays(self, work: Path) -> None:
        for folder in work.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime < STRAY_S:
                    continue
                held = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(held)
