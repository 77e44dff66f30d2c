"""Which files and folders the paths of a manifest mean."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePath

from tasks.locations import Location, Url, location
from tasks.stores import file_system


def absolute(folder: Path, text: str) -> Location:
    """The file or folder that a manifest in `folder` means."""
    place = location(text)
    return place if isinstance(place, Url) else local(folder, str(place))


def local(folder: Path, text: str) -> Path:
    """The local file or folder that a manifest in `folder` means."""
    # resolve() would follow links
    return Path(os.path.abspath(folder / Path(text).expanduser()))  # noqa: PTH100


def below(file: Location, root: Location) -> PurePath:
    """The place of a file below the folder or store that it was found in."""
    if isinstance(file, Url):
        assert isinstance(root, Url)
        return file.relative_to(root)
    assert isinstance(root, Path)
    return file.relative_to(root)


def real_path(path: Location) -> str:
    """Where a path leads, through all links."""
    return str(path) if isinstance(path, Url) else os.path.realpath(path)


def file_key(path: Location) -> str:
    """Equal for two paths that may be one file: through links, or where letter case is ignored.

    Stores tell letter case apart. Of their schemes some mean the same store.
    """
    if isinstance(path, Url):
        return "/".join((file_system(path), *path.parts))
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def exists(path: Location) -> bool:
    """Whether there is such a local file or folder; a pipe or a device is neither."""
    try:
        assert isinstance(path, Path)
        return path.is_file() or path.is_dir()
    except OSError:  # the name is too long, or its folder must not be entered
        return False


def is_folder(path: Location) -> bool:
    """Whether there is a local folder. In most stores a file may have the name of one."""
    try:
        return isinstance(path, Path) and path.is_dir()
    except OSError:
        return False
