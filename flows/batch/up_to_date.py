"""A batch that has nothing to make is reported without Prefect and workers, in a second."""

from __future__ import annotations

from flows.batch.record import Record
from flows.batch.run_summary import end_summary, summary_path
from flows.batch.to_do import job_digests, owner_of
from flows.console.events import Listener
from flows.console.result import BatchResult
from flows.journal import Journal
from flows.manifest.jobs import Manifest, select
from flows.runtime.run_options import RunOptions
from quant_core.errors import StageError, reason_of


def report_if_up_to_date(
    manifest: Manifest, journal: Journal, options: RunOptions, notify: Listener
) -> BatchResult | None:
    """The result of a batch whose models an earlier run has made; None if one has to be made.

    Raises: StageError if the reports cannot be written.
    """
    if not _is_up_to_date(manifest, journal, options):
        return None
    try:
        record = Record(manifest, journal, notify, options)
        record.start(workers=0)
        if next(record.find_what_to_do(), None) is not None:  # it has changed a moment ago
            return None
        result = record.end()
    except OSError as problem:
        where = str(problem.filename or manifest.folder)
        raise StageError(f"the batch stopped: {reason_of(problem)}", where) from problem
    record.forget_answers(manifest.store if options.scheduler else None)
    end_summary("batch", result, result.state, summary_path("batch", manifest.folder))
    return result


def _is_up_to_date(manifest: Manifest, journal: Journal, options: RunOptions) -> bool:
    """Whether a run has nothing to make, and no failure to report."""
    jobs = select(manifest, options.only)
    known = {entry.row.output for entry in journal.latest.values()}
    is_new = any(str(job.output) not in known for job in jobs)
    if is_new or options.force or not manifest.skip_existing:
        return False  # without a look at any file
    found = job_digests(jobs, known, owner_of(manifest), {}, options)
    try:
        return all(
            isinstance(digest, str) and journal.up_to_date(job.output, digest) is not None
            for job, digest in found
        )
    except OSError:  # a store does not say what it holds
        return False
