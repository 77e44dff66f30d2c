"""What a batch or an audit reports while it works: one frozen type for each kind of event.

A model is known by its output: one model may be made into several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from quant_core.evaluate.contract import Verdict
from tasks.rows import AuditRow, ModelRow


@dataclass(frozen=True, slots=True)
class Starting:
    """Prefect's API and Dask are being started, without these settings of the environment."""

    name: ClassVar = "starting"

    unused_settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The run has begun, with so many models and Dask workers."""

    name: ClassVar = "started"

    run_id: str
    models: int
    workers: int


@dataclass(frozen=True, slots=True)
class PhaseBegan:
    """A phase begins, through which so many models go, one at a time."""

    name: ClassVar = "phase"

    phase: str
    models: int


@dataclass(frozen=True, slots=True)
class StageBegan:
    """A stage of a model was handed to a worker."""

    name: ClassVar = "stage"

    model: str
    output: str
    stage: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A benchmark waits, for so many seconds at most, until its host has no other one."""

    name: ClassVar = "waiting"

    model: str
    output: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SkippedLines:
    """Spoiled lines of a file that is kept between runs were passed over."""

    name: ClassVar = "skipped_lines"

    file: str
    lines: int


@dataclass(frozen=True, slots=True)
class Made:
    """All stages of a model but its benchmark are over, whether they succeeded or not."""

    name: ClassVar = "made"

    model: str
    output: str


@dataclass(frozen=True, slots=True)
class ModelDone:
    """Nothing more happens to a model in this run; its row is final."""

    name: ClassVar = "model"

    row: ModelRow | AuditRow


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """The run is over, and Prefect's server does not know it: it was lost, for this reason."""

    name: ClassVar = "unrecorded"

    reason: str


Event = (
    Starting
    | Started
    | SkippedLines
    | PhaseBegan
    | StageBegan
    | Waiting
    | Made
    | ModelDone
    | Unrecorded
)

# Called with everything that happens, from any thread.
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of a run that nobody watches."""


def event_json(event: Event) -> dict[str, Any]:
    """The event as one flat JSON object: its name under `event`, and its fields or its row."""
    if isinstance(event, ModelDone):
        columns = event.row.to_json()
        return {"event": event.name, "verdict": Verdict.NONE.value, **columns}
    return {"event": event.name} | {f.name: getattr(event, f.name) for f in fields(event)}
