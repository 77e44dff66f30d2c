"""The published models of an output folder: those that its journal says a batch has made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.entries import ModelEntry
from flows.journal import read_journal
from flows.manifest.jobs import Job, Manifest, select
from flows.manifest.outputs import FOLDER
from quant_core.errors import QuantError, RequestError
from tasks.rows import Outcome, TimingRow


@dataclass(frozen=True, slots=True)
class Published:
    """A model that the journal says is there.

    entry   of the run that finished it last
    timing  its benchmark, by the run that made it; None if there was none
    """

    job: Job
    entry: ModelEntry
    timing: TimingRow | None


def read_published(folder: Path, only: Sequence[str]) -> tuple[list[Published], int]:
    """The models that the journal of an output folder says are there.

    Returns them, and how many lines of the journal are spoiled: each of them may have been a model.

    Raises: RequestError if there is no journal, no model, or none that matches `only`.
    """
    if not (folder / FOLDER / "journal.jsonl").is_file():
        hint = "Name the output_dir of a manifest"
        raise RequestError("is no batch's output folder", str(folder), hint)
    lines, skipped_lines = read_journal(folder / FOLDER)
    entries = [entry for entry in lines if isinstance(entry, ModelEntry) and entry.job]
    timings = {
        entry.digest: timing
        for entry in entries
        for timing in entry.timings
        if timing.stage == "benchmark"
    }
    made = [entry for entry in entries if entry.row.outcome is not Outcome.FAILED]
    found: dict[str, Published] = {}
    for entry in reversed(made):
        if entry.row.output in found:
            continue
        if job := _job_of(entry):
            found[entry.row.output] = Published(job, entry, timings.get(entry.digest))
        else:
            skipped_lines += 1
    if not found:
        hint = "Run the batch first"
        raise RequestError("holds no model that a batch has made", str(folder), hint)
    models = list(reversed(found.values()))
    chosen = {job.output for job in select(manifest_of(folder, models), only)}
    return [one for one in models if one.job.output in chosen], skipped_lines


def _job_of(entry: ModelEntry) -> Job | None:
    """What the model was made of; None if its line of the journal is spoiled there."""
    try:
        job = Job.from_dict(entry.job or {})
        return job if isinstance(job.name, str) else None
    except (QuantError, AttributeError, KeyError, TypeError, ValueError):
        return None


def manifest_of(folder: Path, published: Sequence[Published]) -> Manifest:
    """A manifest of these models, with default limits and benchmark."""
    return Manifest(tuple(one.job for one in published), folder)
