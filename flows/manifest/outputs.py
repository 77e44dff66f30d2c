"""Whose output a file is: a record in `.quantmill/outputs` beside it, one small file for each.

With it two batches that would write one file are stopped, and an output is never taken for an
original.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.errors import RequestError
from quant_core.model.atomic import MAX_NAME_BYTES

FOLDER = ".quantmill"


@dataclass(frozen=True, slots=True)
class Owner:
    """The batch that writes a file: the folder of its journal, and its manifest if it has one."""

    folder: str
    manifest: str | None = None

    def is_same_batch(self, other: Owner) -> bool:
        """Whether the journal or the manifest is the same."""
        return self.folder == other.folder or (
            self.manifest is not None and self.manifest == other.manifest
        )


def claim(output: Path, owner: Owner, take_over: bool = False) -> None:
    """Record the owner of an output, which need not exist yet.

    take_over  also from another batch

    Raises: RequestError if another batch owns it, whose journal still exists, or if its name is too
        long for a file; OSError if the record cannot be written.
    """
    size = len(os.fsencode(output.name))
    if size > MAX_NAME_BYTES:
        problem = f"its name of {size} bytes is too long"
        hint = f"List the model under `models`, with an output of at most {MAX_NAME_BYTES} bytes"
        raise RequestError(problem, str(output), hint)
    path = _record(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"output": output.name, **_values(owner)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        # Of two batches that begin at the same time one finds the record of the other.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
            return
        recorded = read_owner(output)
        if recorded == owner:
            return
        is_free = recorded is None or recorded.is_same_batch(owner) or not _exists(recorded)
        if not (is_free or take_over):
            assert recorded is not None
            problem = f"is the output of another batch, whose journal is in {recorded.folder}"
            hint = "Name another output; --force takes it over"
            raise RequestError(problem, str(output), hint)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_owner(output: Path) -> Owner | None:
    """The recorded owner of the file at `output`; None if there is no record that can be read."""
    try:
        values = json.loads(_record(output).read_text(encoding="utf-8"))
        owner = Owner(values["folder"], values.get("manifest"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return owner if isinstance(owner.folder, str) else None


def is_output(path: Path) -> bool:
    """Whether a batch has written, or is about to write, the file at `path`."""
    return read_owner(path) is not None


def _record(output: Path) -> Path:
    """The record lies beside the real file, so that it is found through any link to its folder."""
    real = Path(os.path.realpath(output.parent))
    # the name may be as long as a name can be
    digest = hashlib.blake2b(os.fsencode(output.name), digest_size=16).hexdigest()
    return real / FOLDER / "outputs" / f"{digest}.json"


def _values(owner: Owner) -> Mapping[str, Any]:
    return {"folder": owner.folder, "manifest": owner.manifest}


def _exists(owner: Owner) -> bool:
    return (Path(owner.folder) / FOLDER / "journal.jsonl").exists()
