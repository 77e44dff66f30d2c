"""The lines of the journal: a run begins, a model is finished, a run ends.

`to_json` gives the object that the journal keeps on a line, `read_entry` reads it back, also if an
earlier version wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import uuid4

from tasks.rows import LayerRow, ModelRow, RunRow, TimingRow

RUN_TIME = "%Y%m%dT%H%M%S"  # the first part of a run's id


@dataclass(frozen=True, slots=True)
class RunEntry:
    """A run begins.

    request  a digest of what was requested: the same request goes on with an interrupted run
    """

    event: ClassVar = "run"

    run_id: str
    request: str
    started_at: datetime

    def to_json(self) -> dict[str, Any]:
        return {
            "event": self.event,
            "run_id": self.run_id,
            "request": self.request,
            "started_at": self.started_at.isoformat(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunEntry:
        started_at = datetime.fromisoformat(values["started_at"])
        _check_types((values["run_id"], str), (values["request"], str))
        return cls(values["run_id"], values["request"], started_at)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model is finished: done, skipped or failed.

    name      its name in the manifest
    digest    names everything that made it; "" if it could not be read
    files     file name -> size in bytes and digest, of every file that was published
    job       Job.to_dict(), None if no stage ran
    versions  package -> version, of what made it
    layers, timings  rows of the stages that this run ran
    """

    event: ClassVar = "model"

    run_id: str
    name: str
    digest: str
    row: ModelRow
    files: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    job: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[LayerRow, ...] = ()
    timings: tuple[TimingRow, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What was made from what: the path of the output, and the digest."""
        return self.row.output, self.digest

    def to_json(self) -> dict[str, Any]:
        return {
            "event": self.event,
            "run_id": self.run_id,
            "name": self.name,
            "digest": self.digest,
            "files": dict(self.files),
            "job": self.job,
            "versions": dict(self.versions),
            "row": self.row.to_json(),
            "layers": [row.to_json() for row in self.layers],
            "timings": [row.to_json() for row in self.timings],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelEntry:
        for name, (size, digest) in values["files"].items():
            _check_types((name, str), (size, int), (digest, str))
        _check_types((values["name"], str), (values["digest"], str), (values["run_id"], str))
        _check_types((values.get("job") or {}, dict), (values.get("versions", {}), dict))
        return cls(
            run_id=values["run_id"],
            name=values["name"],
            digest=values["digest"],
            row=ModelRow.from_json(values["row"]),
            files=values["files"],
            job=values.get("job"),
            versions=values.get("versions", {}),
            layers=tuple(map(LayerRow.from_json, values.get("layers", ()))),
            timings=tuple(map(TimingRow.from_json, values["timings"])),
        )


@dataclass(frozen=True, slots=True)
class EndEntry:
    """A run is over: its reports are written.

    counts  how many models ended in which way
    row     of the report of runs; None if an earlier version wrote the entry
    """

    event: ClassVar = "end"

    run_id: str
    finished_at: datetime
    counts: Mapping[str, int]
    row: RunRow | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "event": self.event,
            "run_id": self.run_id,
            "finished_at": self.finished_at.isoformat(),
            "row": self.row.to_json() if self.row else None,
            **self.counts,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EndEntry:
        finished_at = datetime.fromisoformat(values["finished_at"])
        own = ("event", "run_id", "finished_at", "row")
        counts = {key: count for key, count in values.items() if key not in own}
        row = RunRow.from_json(values["row"]) if values.get("row") else None
        return cls(values["run_id"], finished_at, counts, row)


Entry = RunEntry | ModelEntry | EndEntry

_KINDS: dict[str, type[RunEntry | ModelEntry | EndEntry]] = {
    kind.event: kind for kind in (RunEntry, ModelEntry, EndEntry)
}


def read_entry(values: Any) -> Entry | None:
    """The entry that a line of the journal holds, None if it is no entry."""
    try:
        return _KINDS[values["event"]].from_json(values)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _check_types(*values: tuple[Any, type]) -> None:
    """Raises: TypeError for a value of another type."""
    for value, kind in values:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is no {kind.__name__}")


def new_run_id(started_at: datetime, earlier: Iterable[str] = ()) -> str:
    """An id that sorts after those of earlier runs and that no other run has.

    It is the time, or a second more than that of the last run if a clock was ahead then.
    """
    following = (begun + timedelta(seconds=1) for begun in map(_time_of, earlier) if begun)
    begun = max([started_at.astimezone(UTC), *following])
    return f"{begun:{RUN_TIME}}-{uuid4().hex[:6]}"


def now_after(began: datetime) -> datetime:
    """Now, or `began` if the clock has gone back since: nothing ends before it begins."""
    return max(datetime.now(UTC), began)


def _time_of(run_id: str) -> datetime | None:
    try:
        return datetime.strptime(run_id.partition("-")[0], RUN_TIME).replace(tzinfo=UTC)
    except ValueError:
        return None
