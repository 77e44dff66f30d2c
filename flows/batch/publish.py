"""How the files of a finished model appear beside its output: the model itself last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant_core.model.atomic import move_synced, sync_folder, temporary_beside
from tasks.cache import TRANSFER_S, host_cache
from tasks.locations import Location, Url
from tasks.remote import transfer


def publish(
    made: Location,
    files: Mapping[str, Sequence[Any]],
    output: Location,
    *,
    link: bool = True,
    limit_s: float = TRANSFER_S,
) -> None:
    """Put these files of the folder `made` beside `output`, the model itself last.

    `made` stays as it is, so that doing it again after a crash does the same.

    files    name -> size and digest
    link     whether as links, where the file system has them, and not as copies
    limit_s  the most seconds that a store may take for one file
    """
    if isinstance(output, Path):
        output.parent.mkdir(parents=True, exist_ok=True)
    for name in sorted(files, key=lambda name: name == output.name):
        source, target = made / name, output.parent / name
        if isinstance(target, Url):
            transfer(source, target, limit_s)
            host_cache().remember(target, files[name])
        elif isinstance(source, Url):
            with host_cache().contents.work_folder() as folder:
                transfer(source, folder / "file", limit_s)
                place(folder / "file", target)
        else:
            place(source, target, link=link)
    if isinstance(output, Path):
        sync_folder(output.parent)


def place(source: Path, target: Path, *, link: bool = True) -> None:
    """Replace `target` by a link to `source`, or by a copy without `link` or where none can be."""
    temporary = temporary_beside(target)
    temporary.unlink(missing_ok=True)
    try:
        is_linked = link and _link(source, temporary)
        if not is_linked:
            shutil.copyfile(source, temporary)
        move_synced(temporary, target)
    finally:
        # It is still there after a rename onto a link to the same file, which does nothing.
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Make `target` another name of the file, if the file system can."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
