"""Whose output a file is: a record in `.quantmill/outputs` beside it, one small file for each.

With it two batches that would write one file are stopped, and an output is never taken for an
original. In a store the record names the host too. Paths may be the same on two hosts, and differ
for one folder in two mounts or containers, so a journal is known by an id of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from flows.manifest.paths import is_folder
from quant_core.errors import RequestError
from quant_core.model.atomic import MAX_NAME_BYTES, atomic_write, discard, make_own_folder
from quant_core.text import digest_of
from tasks import stores
from tasks.locations import Location, Url

FOLDER = ".quantmill"
MADE_NAME = re.compile(r"(.+)_(?:int8|int4|optimized)\.onnx")  # of `quantize` without an output
MAX_KEY_BYTES = 1024  # of a file in S3, gs or az


@dataclass(frozen=True, slots=True)
class Owner:
    """The batch that writes a file: the folder of its journal, and its manifest if it has one.

    host     that the folder is on, for outputs in a store
    journal  the id of the journal; None if an earlier version wrote the record
    """

    folder: str
    manifest: str | None = None
    host: str | None = None
    journal: str | None = None

    def is_same_batch(self, other: Owner) -> bool:
        """Whether the journal is the same, or on one host its path or the manifest's."""
        if None not in (self.journal, other.journal):
            if self.journal == other.journal:
                return True
            if self.host != other.host:
                return False
        return self.folder == other.folder or (
            self.manifest is not None and self.manifest == other.manifest
        )


def claim(output: Location, owner: Owner, take_over: bool = False, is_new: bool = False) -> None:
    """Record the owner of an output, which need not exist yet.

    take_over  also from another batch
    is_new     whether no record is expected: it takes a store two requests to say that it has none

    Raises: RequestError if another batch owns it, whose journal still exists, if it is a folder, or
        if its name or key is too long; OSError if the record cannot be written.
    """
    if is_folder(output):
        raise RequestError("is a folder", str(output), "Move it away, or name another output")
    _check_length("name", output.name, MAX_NAME_BYTES, output)
    if isinstance(output, Url) and output.scheme in stores.WHOLE:
        _check_length("key", "/".join(output.parts[1:]), MAX_KEY_BYTES, output)
    if isinstance(output, Url):
        owner = replace(owner, host=platform.node())
    path, content = _record(output), _content(output, owner)
    recorded = None if is_new else read_owner(output)
    if recorded is None:
        if _create(path, content):
            return
        recorded = read_owner(output)  # of another batch, which began at the same time
    if recorded == owner:
        return
    is_free = recorded is None or recorded.is_same_batch(owner) or not _exists(recorded)
    if not (is_free or take_over):
        assert recorded is not None
        host = f" on {recorded.host}" if recorded.host else ""
        problem = f"is the output of another batch, whose journal is in {recorded.folder}{host}"
        hint = "Name another output; --force takes it over"
        raise RequestError(problem, str(output), hint)
    if isinstance(path, Url):
        stores.write(path, content)
    else:
        if path.is_dir():  # nobody can read it as a record
            discard(path)
        with atomic_write(path, survives_power_cut=False) as file:
            file.write(content)


def _check_length(what: str, text: str, most_bytes: int, output: Location) -> None:
    """Raises: RequestError if the text is too long."""
    size = len(os.fsencode(text))
    if size > most_bytes:
        hint = f"List the model under `models`, with an output whose {what} has {most_bytes} bytes"
        raise RequestError(f"its {what} of {size} bytes is too long", str(output), hint)


def read_owner(output: Location) -> Owner | None:
    """The recorded owner of the file at `output`; None if there is no record that can be read."""
    record = _record(output)
    try:
        content = stores.read(record) if isinstance(record, Url) else record.read_bytes()
        values = json.loads(content)
        own = (values.get(key) for key in ("manifest", "host", "journal"))
        owner = Owner(values["folder"], *own)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return owner if isinstance(owner.folder, str) else None


def original_of(path: Location) -> Location | None:
    """The model that the file was made of, if its name is one that `quantize` gives."""
    made = MADE_NAME.fullmatch(path.name)
    return path.with_name(f"{made[1]}.onnx") if made else None


def is_output(path: Path) -> bool:
    """Whether a batch has written, or is about to write, the file at `path`."""
    return read_owner(path) is not None


def output_test() -> Callable[[Location], bool]:
    """`is_output`, also for files in stores, of which the records of a folder are listed once."""
    records_in = cache(_records_in)

    def test(path: Location) -> bool:
        if isinstance(path, Url):
            record = _record(path)
            assert isinstance(record, Url)
            return record in records_in(record.parent)
        return is_output(path)

    return test


def _records_in(folder: Url) -> set[Url]:
    try:
        return set(stores.listing(folder))
    except OSError:  # mostly because there is no such folder
        return set()


def _record(output: Location) -> Location:
    """The record lies beside the real file, so that it is found through any link to its folder."""
    # the name may be as long as a name can be
    digest = digest_of(os.fsencode(output.name))
    folder = output.parent
    if isinstance(folder, Path):
        folder = Path(os.path.realpath(folder))
    return folder / FOLDER / "outputs" / f"{digest}.json"


def _content(output: Location, owner: Owner) -> bytes:
    values = {"output": output.name, **asdict(owner)}
    return json.dumps({key: value for key, value in values.items() if value is not None}).encode()


def _create(path: Location, content: bytes) -> bool:
    """Whether the file was created with this content; False if there is one already.

    A file without content is one whose writer was killed, or holds its lock.
    """
    if isinstance(path, Url):
        with contextlib.suppress(FileExistsError):
            stores.create(path, content)
            return True
        return False
    make_own_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # less what the umask takes
    except (IsADirectoryError, PermissionError):
        return False
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.read(1):
            return False
        try:
            file.write(content)
            file.flush()
        except OSError:  # the disk is full
            path.unlink(missing_ok=True)
            raise
        return True


def _exists(owner: Owner) -> bool:
    if owner.host not in (None, platform.node()):
        return True  # as far as can be seen from here
    return (Path(owner.folder) / FOLDER / "journal.jsonl").exists()
