"""What is finished: one fsynced JSON line per finished model, and each stage's answer until then."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.batch.digests import files_digest
from quant_core.errors import RequestError

FOLDER = ".quantmill"
FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
LARGE_BYTES = 16 << 20  # a journal of that size forgets what nobody will ask for


class Journal:
    """The record of an output folder. Only one batch at a time writes it."""

    def __init__(self, folder: Path, fd: int) -> None:
        self.folder, self._fd = folder, fd
        self.entries = _read(folder / "journal.jsonl")
        self.latest = {
            (e["row"]["output"], e["digest"]): e for e in self.entries if e["event"] == "model"
        }

    def append(self, entry: Mapping[str, Any]) -> None:
        """On the disk when this returns, or not there at all: half a line would spoil the next. Raises: OSError."""
        line, size = (
            json.dumps(entry, separators=(",", ":")).encode() + b"\n",
            os.fstat(self._fd).st_size,
        )
        try:
            while line:
                line = line[os.write(self._fd, line) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        self.entries.append(dict(entry))
        if entry["event"] == "model":
            self.latest[entry["row"]["output"], entry["digest"]] = self.entries[-1]

    def begin_run(self, request: str) -> tuple[str, dict[str, dict[str, Any]]]:
        """A run's id, and what it has finished by name. A run that was cut short goes on if the same is asked again."""
        runs = [entry for entry in self.entries if entry["event"] in ("run", "end")]
        if runs and runs[-1]["event"] == "run" and runs[-1]["request"] == request:
            run_id = runs[-1]["run_id"]
            models = (
                entry
                for entry in self.entries
                if entry["event"] == "model" and entry["run_id"] == run_id
            )
            return run_id, {entry["name"]: entry for entry in models}
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
        self.append(
            {"event": "run", "run_id": run_id, "request": request, "started_at": now.isoformat()}
        )
        return run_id, {}

    def started_at(self, run_id: str) -> str:
        return str(
            next(
                e["started_at"]
                for e in self.entries
                if e["event"] == "run" and e["run_id"] == run_id
            )
        )

    def up_to_date(self, output: Path, digest: str) -> dict[str, Any] | None:
        """The entry that made `output` from exactly this, if its files are still what they were then."""
        entry = self.latest.get((str(output), digest))
        stands = (
            entry is not None
            and entry["row"]["outcome"] != "failed"
            and _unchanged(output.parent, entry)
        )
        return entry if stands else None

    def peaks(self) -> dict[tuple[str, str], int]:
        """(input, stage) -> the memory that this stage of that model held last time."""
        models = (entry for entry in self.entries if entry["event"] == "model")
        return {
            (e["row"]["input"], t["stage"]): t.get("peak_bytes") or 0
            for e in models
            for t in e["timings"]
        }

    def forget_all_but(self, digests: set[str]) -> None:
        """Stages of models that nobody asks for any more."""
        for path in (self.folder / "cache").glob("*"):
            if path.name not in digests:
                shutil.rmtree(path, ignore_errors=True)

    def stages(self, digest: str) -> Stages:
        return Stages(self.folder / "cache" / digest)


class Stages:
    """What the stages of one model have answered so far, in the folder that holds their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def answer(self, stage: str) -> Any:
        """What that stage answered, None if it has not."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / f"{stage}.json").read_text(encoding="utf-8"))
        return None

    def keep(self, stage: str, answer: object) -> None:
        """The answer replaces nothing half: it is there as a whole, or not at all."""
        temporary = self.folder / f".{stage}.tmp"
        temporary.write_text(json.dumps(answer), encoding="utf-8")
        temporary.replace(self.folder / f"{stage}.json")

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of that output folder. Raises: RequestError if it cannot be written, or another batch writes it."""
    own = folder / FOLDER
    try:
        own.mkdir(parents=True, exist_ok=True)
        fd = os.open(own / "journal.jsonl", FLAGS, 0o644)
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise RequestError(
            f"cannot be written: {reason}", str(folder), "Choose another output_dir"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _drop_torn_line(fd)
        if os.fstat(fd).st_size > LARGE_BYTES:
            fd = _shortened(own / "journal.jsonl", fd)
        yield Journal(own, fd)
    except BlockingIOError:
        raise RequestError(
            "another batch is working there", str(folder), "Wait for it, or stop it"
        ) from None
    finally:
        os.close(fd)


def publish(made: Path, output: Path) -> dict[str, list[Any]]:
    """Put the model in folder `made`, and what lies beside it, where it was asked for; the model itself last.

    `made` stays as it is, so that doing it again after a crash does the same. Returns what has to be there for the
    model to count as done: file name -> size and digest.
    """
    names = sorted((path.name for path in made.iterdir()), key=lambda name: name == output.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        _place(made / name, output.parent / name)
    _sync_folder(output.parent)
    return files_digest(output.parent, names)


def _place(source: Path, target: Path) -> None:
    """`target` is what it was, or all of `source`: a link, or a copy where the file system cannot link."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(
            missing_ok=True
        )  # also after a rename onto a link to the same file, which does nothing


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unchanged(folder: Path, entry: Mapping[str, Any]) -> bool:
    try:
        return bool(entry["files"]) and files_digest(folder, list(entry["files"])) == entry["files"]
    except OSError:
        return False


def _shortened(path: Path, fd: int) -> int:
    """The journal with what is asked of it after a run: each output's last entry, and the one that timed it.

    Returns the descriptor of the new file, locked; the old one if a run has been cut short and needs all of it.
    """
    entries = _read(path)
    if not entries or entries[-1]["event"] != "end":
        return fd
    models = [entry for entry in entries if entry["event"] == "model"]
    latest = {entry["row"]["output"]: entry for entry in models}
    timed = {
        (entry["row"]["output"], entry["digest"]): entry for entry in models if entry["timings"]
    }
    wanted = {id(entry) for entry in latest.values()}
    wanted |= {
        id(timed[output, entry["digest"]])
        for output, entry in latest.items()
        if (output, entry["digest"]) in timed
    }
    temporary = path.with_name(".journal.tmp")
    with temporary.open("wb") as file:
        for entry in (*(entry for entry in models if id(entry) in wanted), entries[-1]):
            file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new = os.open(temporary, FLAGS)
    fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before anyone can find it
    temporary.replace(path)
    _sync_folder(path.parent)
    os.close(fd)
    return new


def _read(path: Path) -> list[dict[str, Any]]:
    """Every whole line; what a broken disk made of another is not worth stopping for."""
    entries = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def _drop_torn_line(fd: int) -> None:
    """What a power cut left of the last line would spoil the next one."""
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
