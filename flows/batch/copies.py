"""Files that belong beside the outputs: copied as they are, or another name of an output."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from flows.batch.publish import place
from flows.manifest.outputs import Owner, claim
from quant_core.errors import RequestError
from quant_core.model.atomic import temporary_beside

Copy = tuple[Path, Path]  # source and target


def copy_files(copies: Iterable[Copy]) -> None:
    """Copy each file that is not there yet as it is. Raises: RequestError if one cannot be."""
    for source, target in copies:
        try:
            if target.is_file() and filecmp.cmp(source, target):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(target)
            try:
                shutil.copy2(source, temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            hint = "Is there space, and may you write there?"
            raise RequestError(f"cannot be copied: {reason}", str(source), hint) from error


def name_outputs(copies: Iterable[Copy], made: Collection[Path], owner: Owner, force: bool) -> None:
    """Give each output that was made its second name; the file is stored once where links can be.

    Raises: RequestError if another batch owns the second name, or it cannot be written.
    """
    for source, target in copies:
        if source not in made:
            continue
        claim(target, owner, take_over=force)
        try:
            if not (target.exists() and target.samefile(source)):
                place(source, target)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            hint = "Is there space, and may you write there?"
            raise RequestError(f"cannot be written: {reason}", str(target), hint) from error
