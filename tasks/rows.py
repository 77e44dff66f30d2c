"""The rows of the reports: one frozen type for each table, one field for each column.

The Arrow schemas (tasks/report.py) and the JSON of the journal (flows/journal.py) follow from
these types. To add a column, add a field here and set it in flows/batch/rows.py.
None means that a value is not known or does not apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from enum import StrEnum
from functools import cache
from pathlib import PurePath
from typing import Any, ClassVar, Self

from quant_core.evaluate.contract import Verdict
from quant_core.fields import field_types
from quant_core.text import printable

SCHEMA_VERSION = 5  # of all tables; it grows whenever a column is added, renamed or removed


def model_label(model: str, output: str) -> str:
    """A model's name with that of its output, for people: a model may have several outputs.

    >>> model_label("ocr", "quantized/ocr_int8.onnx")
    'ocr (ocr_int8)'
    """
    return printable(f"{model} ({PurePath(output).stem})")


class Outcome(StrEnum):
    """How a batch ended for one model."""

    DONE = "done"  # it was made by this run
    SKIPPED = "skipped"  # it was up to date; the numbers are those of the run that made it
    FAILED = "failed"  # a stage failed; `stage` and `error` say which and why


class AuditOutcome(StrEnum):
    """What an audit found of one model."""

    KEPT = "kept"  # as accurate and as fast as it was
    REGRESSED = "regressed"  # missing, changed, less accurate or slower
    INCONCLUSIVE = "inconclusive"  # as accurate, but a busy host makes its speed unknown
    STALE = "stale"  # its original or its samples changed: nothing can be compared
    FAILED = "failed"  # a stage of the audit failed


@dataclass(frozen=True, slots=True)
class Row:
    """A row that is valid once built.

    Raises: TypeError for a value of another type than its field has.
    """

    renamed: ClassVar[Mapping[str, str]] = {}  # old names of columns -> today's

    def __post_init__(self) -> None:
        for name, types in field_types(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, types):
                allowed = " or ".join(kind.__name__ for kind in types)
                message = f"{type(self).__name__}.{name} is {value!r}, which is not {allowed}"
                raise TypeError(message)

    def to_json(self) -> dict[str, Any]:
        """Every column as a plain JSON value, in the order of the table."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _to_json(value) for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The row that `to_json` gave these values for, in this version or in an earlier one.

        Keys that are no column any more are passed over, columns that are missing are None.

        Raises: KeyError without one of the columns that every row has; TypeError or ValueError for
            a value of another type.
        """
        present = {cls.renamed.get(name, name): value for name, value in values.items()}
        types = field_types(cls)
        row = {
            name: _from_json(value, types[name]) for name, value in present.items() if name in types
        }
        for name in _required(cls):  # type: ignore[arg-type] # as in fields.py
            if name not in row:
                raise KeyError(name)
        return cls(**row)


@dataclass(frozen=True, slots=True)
class RunRow(Row):
    """One run of a batch."""

    run_id: str  # sorts after those of earlier runs of the folder, even where a clock was ahead
    started_at: datetime  # of the first attempt, if the run was interrupted and went on
    finished_at: datetime
    seconds: float  # of the last attempt, also where the clock was set meanwhile
    models: int  # how many were requested
    done: int  # how many of them ended in this outcome, as the next two
    skipped: int
    failed: int
    not_met: int  # how many miss their contract, whether made now or before
    folder: str  # the output folder
    workers: int  # Dask workers
    host: str
    target: str  # the target that this host is, see quant_core/plan/targets.py
    python: str  # versions of what made the models
    quantmill: str
    onnx: str
    onnxruntime: str
    cpu: str | None = None  # its name, as the system gives it
    command: str | None = None  # command line of the process that ran the batch
    schema_version: int | None = None  # of the reports of this run; None before there were versions


@dataclass(frozen=True, slots=True)
class ModelRow(Row):
    """One model of one run of a batch."""

    run_id: str
    model: str  # its name in the manifest
    digest: str  # names everything that made it (flows/batch/digests.py); "" if it cannot be read
    input: str  # path of the float model
    output: str  # path of the quantized model
    outcome: Outcome
    verdict: Verdict
    reason: str | None = None  # of the verdict, in one line
    note: str | None = None  # what makes the result doubtful
    stage: str | None = None  # the stage that failed
    error: str | None = None  # what went wrong there
    where: str | None = None  # the file, node or option concerned
    hint: str | None = None  # what to do about it
    bits: int | None = None  # of weights, as requested
    mode: str | None = None  # as requested: auto, static, dynamic or weight_only
    method: str | None = None  # how ranges are chosen, as requested
    target: str | None = None  # which the plan is made for
    saturation_safe: bool | None = None  # no 16-bit sum can saturate on x86 without VNNI
    float_size_bytes: int | None = None  # of the input with its external data
    size_bytes: int | None = None  # of the output with its external data
    size_ratio: float | None = None  # size_bytes / float_size_bytes
    metric: str | None = None  # which `accuracy` is measured in: the contract's, else a default
    accuracy_float: float | None = None  # of the float model
    accuracy: float | None = None  # of the quantized model
    agreement: float | None = None  # share of decisions equal to the float model's
    cosine: float | None = None  # similarity of outputs, mean over outputs
    sqnr_db: float | None = None  # signal to quantization noise of outputs, mean over outputs
    max_abs_error: float | None = None  # of any output value; None if infinite
    floor_db: float | None = None  # least SQNR of each output that the file was held to
    worst_db: float | None = None  # SQNR of the worst output around its mean; None: not checked
    lower_db: float | None = None  # its lower bound for other samples, with 95 % confidence
    float_ms: float | None = None  # median latency of one inference
    quantized_ms: float | None = None
    speedup: float | None = None  # float latency / quantized latency, measured in turns
    host_load: float | None = None  # share of all cores that others took while it was timed
    busy: bool | None = None  # others took more than a quarter of a core: doubt the speed
    seconds: float | None = None  # of all its stages
    peak_bytes: int | None = None  # most memory that one stage held
    started_at: datetime | None = None
    finished_at: datetime | None = None
    config: str | None = None  # QuantConfig as JSON
    trace: str | None = None  # what the search tried, as JSON
    chosen: str | None = None  # the candidate of the trace that was written

    @property
    def is_wrong(self) -> bool:
        """Whether the model failed, or misses its contract."""
        return self.outcome is Outcome.FAILED or self.verdict is Verdict.NOT_MET


@dataclass(frozen=True, slots=True)
class LayerRow(Row):
    """One node of one model that a run made."""

    renamed: ClassVar[Mapping[str, str]] = {
        "alone_db": "isolated_db",
        "so_far_db": "cumulative_db",
    }

    run_id: str
    model: str
    digest: str
    position: int  # in the plan, from 0
    node: str
    op_type: str | None = None
    compute: str | None = None  # float, static, dynamic or blocks
    storage: str | None = None  # of its weight: float32, float16, int8 or int4
    weight: str | None = None  # names of its weights, joined by ", "
    scale: float | None = None  # of its output, where that is static
    zero_point: int | None = None
    sqnr_db: float | None = None  # of its rounded weight
    isolated_db: float | None = None  # SQNR of its output given float inputs
    cumulative_db: float | None = None  # SQNR of its output in the quantized model
    saturation_safe: bool | None = None
    seen_lo: float | None = None  # least and largest value of its output that calibration saw
    seen_hi: float | None = None
    range_lo: float | None = None  # what the integers of its output cover
    range_hi: float | None = None
    histogram: str | None = None  # JSON: per mille of the values in equal bins from seen_lo on
    elements: int | None = None  # of its weights
    reason: str | None = None  # why it is not quantized, or why in this way
    rewrites: str | None = None  # rules that rewrote it in float, joined by ", "


@dataclass(frozen=True, slots=True)
class TimingRow(Row):
    """One stage of one model that a run made; latencies only where the stage is `benchmark`."""

    run_id: str
    model: str
    digest: str
    stage: str
    started_at: datetime | None = None
    seconds: float | None = None
    peak_bytes: int | None = None  # most memory that the stage held
    float_ms: float | None = None  # median latency of one inference
    quantized_ms: float | None = None
    float_p95_ms: float | None = None  # 95th percentile
    quantized_p95_ms: float | None = None
    speedup: float | None = None  # median over rounds
    speedup_lo: float | None = None  # quartiles over rounds, as the next
    speedup_hi: float | None = None
    rounds: int | None = None
    threads: int | None = None  # of each model
    float_deciles_ms: str | None = None  # JSON: latency over rounds, minimum, 10 %, ... maximum
    quantized_deciles_ms: str | None = None
    host_load: float | None = None  # share of all cores that others took
    busy: bool | None = None  # others took more than a quarter of a core


@dataclass(frozen=True, slots=True)
class AuditRow(Row):
    """One model of one audit. `before` is what the batch that made it had measured."""

    run_id: str  # of the audit
    model: str
    digest: str
    output: str
    outcome: AuditOutcome
    reason: str | None = None  # what got worse, in one line
    stage: str | None = None  # the stage that failed, and what went wrong there
    error: str | None = None
    where: str | None = None
    hint: str | None = None
    metric: str | None = None  # which accuracy is measured in
    accuracy_before: float | None = None
    accuracy: float | None = None
    speedup_before: float | None = None
    speedup: float | None = None
    host_load: float | None = None  # share of all cores that others took while it was timed
    busy: bool | None = None  # others took more than a quarter of a core
    made_with: str | None = None  # versions of the batch that made it, as JSON
    host: str | None = None  # of the audit, as the versions
    quantmill: str | None = None
    onnx: str | None = None
    onnxruntime: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether the model got worse, or a stage failed."""
        return self.outcome in (AuditOutcome.REGRESSED, AuditOutcome.FAILED)


TABLES: dict[str, type[Row]] = {
    "runs": RunRow,
    "models": ModelRow,
    "layers": LayerRow,
    "timings": TimingRow,
    "audits": AuditRow,
}


@cache
def _required(row: type[Row]) -> tuple[str, ...]:
    """The columns that every row has."""
    return tuple(field.name for field in fields(row) if field.default is MISSING)


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    """Whether the value has one of these types. An int is a float too, a bool is no number."""
    kind = type(value)
    if kind is datetime:
        return datetime in types and value.tzinfo is not None
    return kind in types or (kind is int and float in types)


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value.value if isinstance(value, StrEnum) else value


def _from_json(value: Any, types: tuple[type, ...]) -> Any:
    """The value that `_to_json` turned into this one. Raises: ValueError for an unknown word."""
    if type(value) in types or value is None:
        return value
    kind = types[0]
    if kind is datetime:
        return datetime.fromisoformat(value)
    return kind(value) if issubclass(kind, StrEnum) else value
