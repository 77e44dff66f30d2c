"""Which models of a batch have to be made: their digests, and what keeps one from being made."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from flows.batch.digests import job_digest, url_contents
from flows.batch.failure import Failure
from flows.journal import journal_id
from flows.manifest.files import unreadable_file
from flows.manifest.jobs import Job, Manifest
from flows.manifest.outputs import Owner, claim
from flows.runtime.run_options import RunOptions
from quant_core.errors import QuantError, not_written
from quant_core.model.locations import disk_bytes
from tasks.cache import Content, host_cache
from tasks.locations import Url

A = TypeVar("A")
T = TypeVar("T")

READERS = 4  # threads that hash models ahead of their first stages


def owner_of(manifest: Manifest) -> Owner:
    """Whom the outputs of a manifest belong to."""
    folder = os.path.realpath(manifest.folder)
    file = os.path.realpath(manifest.file) if manifest.file else None
    return Owner(folder, file, journal=journal_id(manifest.folder))


def largest_first(jobs: Iterable[Job]) -> list[Job]:
    """The jobs by the size of their graph's file, the largest first; those in stores, whose sizes
    are not known yet, come last, and alike ones stay in their order.
    """

    def size_bytes(job: Job) -> int:
        try:
            return job.input.stat().st_size if isinstance(job.input, Path) else 0
        except OSError:  # it cannot be read, which its entry will say
            return 0

    return sorted(jobs, key=size_bytes, reverse=True)


def job_digests(
    jobs: Sequence[Job],
    known: Collection[str],
    owner: Owner,
    contents: dict[str, Content],
    options: RunOptions,
) -> Iterator[tuple[Job, str | Failure]]:
    """Each job with its digest, or with the stage at which it cannot be made, and why.

    known     outputs that were made before; those in stores are looked at too
    owner     claims the outputs; with `force`, those of other batches too
    contents  gets what the URLs hold that the jobs read
    """

    def digest_or_failure(job: Job) -> str | Failure:
        if unreadable := unreadable_file(job):
            return Failure("read", unreadable)
        try:
            digest = job_digest(job, options.code)
            contents.update(url_contents(job))
        except QuantError as problem:
            return Failure("read", problem)
        is_new = str(job.output) not in known
        try:
            claim(job.output, owner, take_over=options.force, is_new=is_new)
        except QuantError as problem:
            return Failure("publish", problem)
        except OSError as error:
            return Failure("publish", not_written(error, job.output))
        return digest

    files = [job.input for job in jobs]
    files += [job.output for job in jobs if str(job.output) in known]
    if in_stores := [file for file in files if isinstance(file, Url)]:
        host_cache().stat_all(in_stores)  # at once, and not one after another below
    return _read_ahead(digest_or_failure, jobs, READERS)


def in_portions(
    to_do: Iterable[tuple[Job, str]], most: int, room_bytes: int, contents: Mapping[str, Content]
) -> Iterator[list[tuple[Job, str]]]:
    """The jobs in portions of at most so many, each of which reads from stores about as much as
    there is room for.

    While one portion is made the next one is read, and nothing has to be fetched twice.
    """
    portion, held = [], 0
    for job, digest in to_do:
        portion.append((job, digest))
        if isinstance(job.input, Url):
            held += input_bytes(job, contents)
        if len(portion) == most or held > room_bytes:
            yield portion
            portion, held = [], 0
    yield portion


def input_bytes(job: Job, contents: Mapping[str, Content]) -> int:
    """The size of the job's model with its external data. Raises: OSError."""
    if isinstance(job.input, Url):
        return sum(size for size, _ in contents[str(job.input)].files.values())
    return disk_bytes(job.input)


def _read_ahead(call: Callable[[A], T], items: Iterable[A], at_once: int) -> Iterator[tuple[A, T]]:
    """Each item with what the call returns for it, in order; so many calls run ahead of the reader.

    No more begin while the reader does something else.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(at_once) as threads:
        begun = deque((item, threads.submit(call, item)) for item in islice(waiting, at_once))
        while begun:
            item, future = begun.popleft()
            result = future.result()
            begun.extend((item, threads.submit(call, item)) for item in islice(waiting, 1))
            yield item, result
