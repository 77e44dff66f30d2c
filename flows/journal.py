"""The record of an output folder: an fsynced JSON line for each event of a run (entries.py).

Until a model is finished, the answers of its stages are kept beside it (stage_answers.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.entries import EndEntry, Entry, ModelEntry, RunEntry, new_run_id, read_entry
from flows.manifest.outputs import FOLDER
from flows.stage_answers import StageAnswers
from quant_core.errors import RequestError, reason_of
from quant_core.model.atomic import atomic_write, sync_folder
from tasks.cache import files_digest
from tasks.locations import Location, Url
from tasks.rows import Outcome

FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
LARGE_BYTES = 16 << 20  # a journal of this size drops the entries that no later run needs


def run_ids(reports: Path) -> set[str]:
    """The ids of the runs and audits that have reports."""
    return {path.stem for kind in ("runs", "audits") for path in (reports / kind).glob("*.parquet")}


def is_taken(folder: Path) -> bool:
    """Whether a batch is working in that output folder now."""
    try:
        with (folder / FOLDER / "journal.jsonl").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def journal_id(folder: Path) -> str | None:
    """A name that the journal of that output folder has under every path, and no other journal.

    None if it has none, and none can be written. Call it while the journal is open.
    """
    path = folder / FOLDER / "id"
    with contextlib.suppress(OSError, ValueError):
        if known := path.read_text(encoding="ascii").strip():
            return known
    with contextlib.suppress(OSError):
        new = uuid4().hex
        with atomic_write(path) as file:
            file.write(new.encode())
        return new
    return None


class Journal:
    """The journal of an output folder. Only one batch at a time writes it."""

    def __init__(self, folder: Path, fd: int) -> None:
        self.folder, self._fd = folder, fd
        self.path = folder / "journal.jsonl"
        self.entries, self.skipped_lines = read_journal(folder)
        self.latest = {entry.key: entry for entry in self.models()}

    def models(self) -> Iterator[ModelEntry]:
        """Every finished model of every run, oldest first."""
        return (entry for entry in self.entries if isinstance(entry, ModelEntry))

    def append(self, entry: Entry) -> None:
        """Write the entry, which is on the disk when this returns.

        Raises: OSError, and then no part of the line is left: half a line would spoil the next.
            Also if the file has left its place: nobody would read it there, nor would its lock
            keep another batch away.
        """
        if not os.path.samestat(self.path.stat(), os.fstat(self._fd)):
            raise OSError(errno.ESTALE, "Another file has taken its place", str(self.path))
        line = _line(entry)
        size = os.fstat(self._fd).st_size
        try:
            while line:
                line = line[os.write(self._fd, line) :]
            os.fsync(self._fd)
        except OSError as problem:
            os.ftruncate(self._fd, size)
            raise OSError(problem.errno, problem.strerror, str(self.path)) from problem
        self.entries.append(entry)
        if isinstance(entry, ModelEntry):
            self.latest[entry.key] = entry

    def begin_run(self, request: str) -> tuple[RunEntry, dict[str, ModelEntry]]:
        """A run, and the models that it has finished, by the path of their output.

        The last run goes on if it was interrupted and the request is the same. Else a run begins.
        """
        runs = [entry for entry in self.entries if isinstance(entry, (RunEntry, EndEntry))]
        last = runs[-1] if runs else None
        if isinstance(last, RunEntry) and last.request == request:
            finished = (entry for entry in self.models() if entry.run_id == last.run_id)
            return last, {entry.row.output: entry for entry in finished}
        now = datetime.now(UTC)
        known = {entry.run_id for entry in self.entries} | run_ids(self.folder.parent / "reports")
        run = RunEntry(new_run_id(now, known), request, now)
        self.append(run)
        return run, {}

    def was_changed(self, output: Location, digest: str) -> bool:
        """Whether the model was made, and its files are not what they were then."""
        entry = self.latest.get((str(output), digest))
        made = entry is not None and entry.row.outcome is not Outcome.FAILED
        return made and self.up_to_date(output, digest) is None

    def up_to_date(self, output: Location, digest: str) -> ModelEntry | None:
        """The entry of the model that was made at `output` from what `digest` names.

        None if there is none, if it failed, or if its files are not what they were then.

        Raises: OSError if a store does not say what it holds.
        """
        entry = self.latest.get((str(output), digest))
        if entry is None or entry.row.outcome is Outcome.FAILED:
            return None
        return entry if _is_unchanged(output.parent, entry.files) else None

    def peaks(self) -> dict[tuple[str, str], int]:
        """(input, stage) -> most bytes that this stage of that model held last time."""
        return {
            (entry.row.input, timing.stage): timing.peak_bytes or 0
            for entry in self.models()
            for timing in entry.timings
        }

    def forget_all_but(self, digests: set[str], store: Url | None) -> None:
        """Delete the answers of all stages but those of these models.

        store  where workers that share no disk have left the files of stages
        """
        for path in (self.folder / "cache").glob("*"):
            if path.name not in digests:
                self.stages(path.name, store).forget()

    def stages(self, digest: str, store: Url | None = None) -> StageAnswers:
        """The answers of the stages of one model, whose files are in `store` if that is given."""
        folder = self.folder / "cache" / digest
        return StageAnswers(folder, store / FOLDER / "cache" / digest if store else folder)


def read_journal(folder: Path) -> tuple[list[Entry], int]:
    """The entries of every whole line, and how many lines are none: a broken disk spoiled them.

    folder  `.quantmill` of an output folder
    """
    entries, skipped = [], 0
    with (folder / "journal.jsonl").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = read_entry(json.loads(line))
            except (ValueError, RecursionError):
                entry = None
            if entry is None:
                skipped += 1
            else:
                entries.append(entry)
    return entries, skipped


@contextlib.contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of that output folder, locked.

    Raises: RequestError if it cannot be written, or if another batch is writing it.
    """
    own = folder / FOLDER
    try:
        own.mkdir(parents=True, exist_ok=True)
        fd = os.open(own / "journal.jsonl", FLAGS, 0o666)  # less what the umask takes
    except OSError as problem:
        reason = f"cannot be written: {reason_of(problem)}"
        where = str(problem.filename or folder)
        raise RequestError(reason, where, "Choose another output_dir") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _drop_torn_line(fd)
        if os.fstat(fd).st_size > LARGE_BYTES:
            fd = _shortened(own / "journal.jsonl", fd)
        yield Journal(own, fd)
    except BlockingIOError:
        raise RequestError(
            "another batch or audit is working there", str(folder), "Wait for it, or stop it"
        ) from None
    finally:
        os.close(fd)


def _is_unchanged(folder: Location, files: Mapping[str, Sequence[Any]]) -> bool:
    try:
        return bool(files) and files_digest(folder, list(files)) == files
    except FileNotFoundError:
        return False
    except OSError:
        if isinstance(folder, Url):
            raise
        return False


def _shortened(path: Path, fd: int) -> int:
    """Rewrite the journal with the entries that a later run needs; see `_needed`.

    Returns the descriptor of the new file, locked. It is the old one if a run was interrupted,
    which needs all entries.
    """
    entries, _ = read_journal(path.parent)
    if not entries or not isinstance(entries[-1], EndEntry):
        return fd
    models = [entry for entry in entries if isinstance(entry, ModelEntry)]
    with atomic_write(path) as file:
        new = os.open(file.name, FLAGS)
        fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before anyone can find it
        file.writelines(map(_line, _needed(models)))
        file.write(_line(entries[-1]))
    sync_folder(path.parent)
    os.close(fd)
    return new


def _needed(models: Sequence[ModelEntry]) -> list[ModelEntry]:
    """The last entry of each output, and the last one that holds timings of the same model."""
    latest = {entry.row.output: entry for entry in models}
    timed = {entry.key: entry for entry in models if entry.timings}
    kept = {id(entry) for entry in latest.values()}
    kept |= {id(timed[entry.key]) for entry in latest.values() if entry.key in timed}
    return [entry for entry in models if id(entry) in kept]


def _line(entry: Entry) -> bytes:
    return json.dumps(entry.to_json(), separators=(",", ":")).encode() + b"\n"


def _drop_torn_line(fd: int) -> None:
    """Cut off the part of a line that a power cut left at the end: it would spoil the next line."""
    size = os.fstat(fd).st_size
    end = size
    while end:
        start = max(0, end - (1 << 16))
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
