"""The folders on this host that are a user's own, for what quantmill keeps there."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

OWN_NAMES = 10  # of a temporary folder, where others hold the first ones


def own_folder() -> Path:
    """A temporary folder of this user's own, the same one for all their processes.

    What somebody else has put in its place stays there: the folder has the next name. Raises:
    OSError if none can be made.
    """
    user = os.getuid()
    first = Path(tempfile.gettempdir()) / f"quantmill-{user}"
    for k in range(OWN_NAMES):
        folder = first.with_name(f"{first.name}-{k}") if k else first
        with contextlib.suppress(FileExistsError):  # a file, or a link to nothing
            folder.mkdir(mode=0o700, exist_ok=True)
            if not folder.is_symlink() and folder.stat().st_uid == user:
                return folder
    raise PermissionError(errno.EACCES, "belongs to somebody else", str(first))


def cache_folder() -> Path:
    """Where what quantmill keeps for this user lies; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home() raises for a user without one
    return Path(home) / "quantmill"
