"""The published models of an output folder: those that its journal says a batch has made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.entries import ModelEntry
from flows.journal import read_journal
from flows.manifest.jobs import Job, Manifest, select
from flows.manifest.outputs import FOLDER
from quant_core.errors import RequestError
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
    latest = {entry.row.output: entry for entry in made}
    found = [
        Published(Job.from_dict(entry.job or {}), entry, timings.get(entry.digest))
        for entry in latest.values()
    ]
    if not found:
        hint = "Run the batch first"
        raise RequestError("holds no model that a batch has made", str(folder), hint)
    chosen = {job.output for job in select(manifest_of(folder, found), only)}
    return [one for one in found if one.job.output in chosen], skipped_lines


def manifest_of(folder: Path, published: Sequence[Published]) -> Manifest:
    """A manifest of these models, with default limits and benchmark."""
    return Manifest(tuple(one.job for one in published), folder)
