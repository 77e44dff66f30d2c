"""summary.json of a run: it is written when the run begins, and whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.console.artifacts import MAX_ROWS, show_in_prefect
from flows.console.result import Result
from flows.journal import Journal, is_taken, open_journal
from flows.manifest.jobs import Manifest
from flows.runtime.prefect_api import is_lost
from flows.runtime.signals import before_stop
from quant_core.errors import not_written
from quant_core.model.atomic import atomic_write, overwrite
from quant_core.text import plain
from tasks.cache import forget_files
from tasks.rows import AuditRow, ModelRow

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

# Prefect is imported only where it runs: a run begins before Prefect is started.

# Draws rows of a table of the reports as lines of words.
Lines = Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, object]]]

NAMES = {"batch": "summary.json", "audit": "audit-summary.json"}
RUNNING = "Running"  # the state of a run that has not ended
NO_FLOW_RUN = {"flow_run": None, "flow_run_id": None}  # of a run that needs no Prefect
FULL = (errno.ENOSPC, errno.EDQUOT)
WRONG_COLUMNS = (
    "model",
    "outcome",
    "verdict",
    "reason",
    "stage",
    "error",
    "where",
    "hint",
    "output",
)
KEPT = ("pid", "host", "interrupted")  # from the beginning of a run to its end


def summary_path(kind: str, folder: Path) -> Path:
    """Where the summary of a batch or an audit of that output folder lies."""
    return folder / "reports" / NAMES[kind]


@contextlib.contextmanager
def working_in(manifest: Manifest) -> Iterator[Journal]:
    """The journal of the manifest's output folder, which this batch alone writes meanwhile.

    The folder's summary.json says so, and what broke the batch off.

    Raises: RequestError if the folder cannot be written, or if a batch or an audit works there,
        whose summary stays as it is.
    """
    folder = manifest.folder
    forget_files()
    with open_journal(folder) as journal, running_summary("batch", folder):
        yield journal


@contextlib.contextmanager
def auditing(folder: Path) -> Iterator[None]:
    """Let nobody else work in an output folder while it is audited, as its audit-summary.json says.

    Raises: as `working_in`.
    """
    with open_journal(folder), running_summary("audit", folder):
        yield


@contextlib.contextmanager
def running_summary(kind: str, folder: Path) -> Iterator[None]:
    """Write that a run is working, and if an error or a signal ends it, that it failed or stopped.

    A summary that still says so when the next run starts is of a run that was killed: the
    summary of the next one names it under `interrupted`.

    Raises: RequestError if the summary cannot be written.
    """
    path = summary_path(kind, folder)
    begun: dict[str, Any] = {"kind": kind, "state": RUNNING, "message": ""}
    begun |= {"pid": os.getpid(), "host": platform.node()}
    before = read_summary(path)
    if before.get("state") == RUNNING:
        keys = ("flow_run", "flow_run_id", "pid", "host", "written_at")
        begun["interrupted"] = {key: before.get(key) for key in keys}
    try:
        write_summary(path, begun)
    except OSError as problem:
        raise not_written(problem, path) from None
    with before_stop(partial(_break_off, path, "Stopped", "stopped by a signal")):
        try:
            yield
        except BaseException as problem:
            with contextlib.suppress(OSError):
                _break_off(path, "Failed", str(problem) or type(problem).__name__)
            raise


def name_flow_run(path: Path) -> None:
    """Add the flow run of Prefect that does the work to the summary."""
    write_summary(path, read_summary(path) | _flow_run())


def summarize(kind: str, result: Result, state: State[Any], lines: Lines, path: Path) -> None:
    """Show the result in Prefect's UI, its rows as these lines, and write it to `path`."""
    shown = lines([row.to_json() for row in result.rows[:MAX_ROWS]])
    if not is_lost():
        show_in_prefect(kind, result.run_id, shown, _facts(result), result.page)
    end_summary(kind, result, str(state.name), path, _flow_run())


def end_summary(
    kind: str, result: Result, state: str, path: Path, flow_run: Mapping[str, Any] = NO_FLOW_RUN
) -> None:
    """Write how a run ended."""
    ended = {"kind": kind, **flow_run, "state": state, "message": result.message, **_kept(path)}
    write_summary(path, {**ended, **_facts(result), "wrong": _wrong(result.rows)})


def summarize_failure(kind: str, flow_run: FlowRun, state: State[Any], path: Path) -> None:
    """Write the summary of a flow run that broke off, unless it has ended already.

    A run that was turned away, because another one is working in the folder, writes nothing.
    """
    begun = read_summary(path)
    is_own = begun.get("flow_run_id") == str(flow_run.id)
    if is_taken(path.parent.parent) or (is_own and begun["state"] != RUNNING):
        return
    ended: dict[str, Any] = {
        "kind": kind,
        "flow_run": flow_run.name,
        "flow_run_id": str(flow_run.id),
        "state": state.name,
        "message": state.message,
    }
    write_summary(path, ended | (_kept(path) if is_own else {}))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON. The file appears as a whole, or stays as it was.

    A full disk has no room for another file: then the one that is there is overwritten.

    Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written_at = datetime.now(UTC).isoformat()
    values = plain({**summary, "written_at": written_at})
    content = json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as problem:
        if problem.errno not in FULL or not path.exists():
            raise
        overwrite(path, content)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary at `path`, {} if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _wrong(rows: Iterable[ModelRow | AuditRow]) -> list[dict[str, Any]]:
    """The columns that matter of each model that failed, missed its contract or got worse."""
    found = [row.to_json() for row in rows if row.is_wrong]
    return [{column: values.get(column) for column in WRONG_COLUMNS} for values in found]


def _break_off(path: Path, state: str, message: str) -> None:
    """Let the summary of a run that has not ended say how it was broken off."""
    begun = read_summary(path)
    if begun.get("state") == RUNNING:
        write_summary(path, {**begun, "state": state, "message": message})


def _kept(path: Path) -> dict[str, Any]:
    begun = read_summary(path)
    return {key: begun[key] for key in KEPT if key in begun}


def _facts(result: Result) -> dict[str, Any]:
    return {
        "run_id": result.run_id,
        "reports": str(result.reports),
        **result.counts,
        "skipped_lines": result.skipped_lines,
    }


def _flow_run() -> dict[str, Any]:
    from prefect import runtime

    return {"flow_run": runtime.flow_run.name, "flow_run_id": runtime.flow_run.id}
