"""Files that belong beside the outputs: copied as they are, or another name of an output."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from flows.batch.publish import place, publish
from flows.manifest.jobs import Copy
from flows.manifest.outputs import Owner, claim
from quant_core.errors import not_written
from tasks.cache import TRANSFER_S, files_digest, host_cache
from tasks.locations import Location, Url
from tasks.remote import transfer


def copy_files(copies: Iterable[Copy]) -> None:
    """Copy each file that is not there yet as it is. Raises: RequestError if one cannot be."""
    for source, target in copies:
        try:
            file = files_digest(source.parent, [source.name])
            if _digest(target) != file[source.name]:
                publish(source.parent, file, target, link=False)
        except OSError as error:
            raise not_written(error, source, "copied") from error


def name_outputs(
    copies: Iterable[Copy], made: Collection[Location], owner: Owner, force: bool
) -> None:
    """Give each output that was made its second name; the file is stored once where links can be.

    Raises: RequestError if another batch owns the second name, or it cannot be written.
    """
    for source, target in copies:
        if source not in made:
            continue
        claim(target, owner, take_over=force)
        try:
            file = files_digest(source.parent, [source.name])[source.name]
            if _digest(target) == file:
                continue
            if isinstance(source, Path) and isinstance(target, Path):
                place(source, target)
                continue
            transfer(source, target, TRANSFER_S)
            if isinstance(target, Url):
                host_cache().remember(target, file)
        except OSError as error:
            raise not_written(error, target) from error


def _digest(path: Location) -> list[Any] | None:
    """Size and digest of a file, None if there is none."""
    try:
        return files_digest(path.parent, [path.name])[path.name]
    except FileNotFoundError:
        return None
