"""How a file appears: with all of its content, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from quant_core.errors import not_written
from quant_core.text import digest_of

MAX_NAME_BYTES = 255  # of one folder or file


@contextmanager
def atomic_write(path: Path, survives_power_cut: bool = True) -> Iterator[IO[bytes]]:
    """A stream whose content becomes the file at `path` when the block ends.

    If the block raises, the file at `path` stays as it was. The temporary file beside it has a name
    that starts with a dot, which readers of data sets pass over.

    survives_power_cut  whether to wait until the content is on the disk, which takes milliseconds
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
        if survives_power_cut:
            move_synced(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_named(path: Path, content: bytes) -> None:
    """The file that a person named, in a folder that is made if it is not there.

    Raises: RequestError if it cannot be written; then the file at `path` stays as it was.
    """
    try:
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise not_written(error, path) from error


def check_replaceable(path: Path) -> None:
    """Raises: OSError if a file at `path` would replace a pipe or a device such as /dev/null, or if
    the name is too long.
    """
    is_other = path.exists() and not (path.is_file() or path.is_dir())
    if is_other or path.parent == Path("/dev"):  # /dev/stdout may be a link to a file
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def overwrite(path: Path, content: bytes) -> None:
    """Replace the content of a small file in the blocks that it has, for a disk that is full.

    Readers may see a part of it for a moment.

    Raises: OSError if it needs more blocks than it has; then the file stays as it was.
    """
    with path.open("r+b", buffering=0) as file:
        allocated_bytes = 512 * os.fstat(file.fileno()).st_blocks
        if len(content) > allocated_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(content)
        file.truncate()
        os.fsync(file.fileno())


def temporary_beside(path: Path) -> Path:
    """Where the file at `path` is written first; a name too long to be lengthened is digested."""
    name = f".{path.name}.tmp"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{digest_of(os.fsencode(path.name))}.tmp"
    return path.with_name(name)


def move_synced(source: Path, target: Path) -> None:
    """Move a file to `target`, in the same file system, once its content is on the disk."""
    with source.open("rb") as stream:
        os.fsync(stream.fileno())
    source.replace(target)


def discard(path: Path) -> None:
    """Delete what is at `path`: a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_own_folder(path: Path) -> None:
    """Make a folder for what is ours alone. A file in its place, or in that of the folder above, is
    deleted: a broken disk has left it.
    """
    for folder in (path.parent, path):
        if os.path.lexists(folder) and not folder.is_dir():
            discard(folder)
    path.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
