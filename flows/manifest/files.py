"""What only the file system shows of a manifest: files that are missing, outputs that would replace
others, and what belongs beside the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from flows.manifest import huggingface
from flows.manifest.jobs import Copy, Job
from flows.manifest.mistakes import Mistake, Place, format_place
from flows.manifest.outputs import output_test
from flows.manifest.paths import absolute, exists, file_key, is_folder
from quant_core.errors import (
    DataError,
    ModelError,
    QuantError,
    RequestError,
    nearest_hint,
    reason_of,
)
from tasks.cache import host_cache
from tasks.locations import Location, Url, location
from tasks.stores import listing

# Of a folder in which a name similar to a missing one is looked for: each takes 30 us.
MOST_NAMES = 256


def file_mistakes(placed_jobs: Sequence[tuple[Place, Job]]) -> list[Mistake]:
    """What is wrong with files that are to be read."""
    is_there = cache(exists)  # many models share one file of samples
    hint = cache(partial(_similar_name, names_in=cache(_names_in)))
    read = {path for _, job in placed_jobs for _, path in files_to_read(job)}
    if in_stores := [path for path in read if isinstance(path, Url)]:
        host_cache().stat_all(in_stores)
    mistakes = []
    for place, job in placed_jobs:
        for key, path in files_to_read(job):
            if problem := _what_is_wrong(path, is_there, may_be_folder=key[0] != "input"):
                mistakes.append(Mistake((*place, *key), f"{problem}: {path}", hint(path)))
    return mistakes


def unreadable_file(job: Job) -> QuantError | None:
    """What is wrong with a file that the job reads, None if nothing is."""
    for key, path in files_to_read(job):
        if problem := _what_is_wrong(path, exists, may_be_folder=key[0] != "input"):
            kind = ModelError if key[0] == "input" else DataError
            return kind(problem, str(path), _similar_name(path))
    return None


def files_to_read(job: Job) -> Iterator[tuple[tuple[str, ...], Location]]:
    """The files and folders that the job reads, each with its key in the manifest."""
    yield ("input",), job.input
    for section, spec in (("calibration", job.calibration), ("evaluation", job.evaluation)):
        for key, path in spec.files() if spec else ():
            yield (section, key), location(path)


def output_mistakes(placed_jobs: Sequence[tuple[Place, Job]]) -> Iterator[Mistake]:
    """Outputs that would replace an input or another output."""
    inputs = {file_key(job.input) for _, job in placed_jobs}
    place_of_output: dict[str, tuple[Place, Job]] = {}
    for place, job in placed_jobs:
        output = file_key(job.output)
        if output in inputs:
            hint = "Originals are never overwritten: name another file"
            yield Mistake((*place, "output"), f"is also an input: {job.output}", hint)
        first_place, first = place_of_output.setdefault(output, (place, job))
        if first is not job:
            problem = f"is also the output of {format_place(first_place)}: {job.output}"
            if first_place == place:  # both were found by input_dir
                problem = f"is the output of both {first.input} and {job.input}: {job.output}"
            hint = "Name another file"
            if job.output.name != first.output.name:
                hint += ": many disks take both names for the same, whatever case and accents"
            yield Mistake((*place, "output"), problem, hint)


def copies_beside(
    batch: Mapping[str, Any], placed_jobs: Sequence[tuple[Place, Job]], folder: Path
) -> tuple[tuple[Copy, ...], list[Mistake]]:
    """What belongs beside the outputs of a layout; and originals that would be replaced."""
    place = ("batch", "input_dir")
    jobs = [job for found_at, job in placed_jobs if found_at == place]
    if not (batch.get("layout") and batch.get("output_dir") and jobs):
        return (), []
    root, output_dir = (absolute(folder, batch[key]) for key in ("input_dir", "output_dir"))
    bits_of = {job.output: job.config.bits for job in jobs}
    second = [(path, huggingface.second_name(path, bits)) for path, bits in bits_of.items()]
    names = [(source, target) for source, target in second if target is not None]
    try:
        originals = {*huggingface.files_below(root)}
        others = huggingface.other_files(root, output_dir)
    except OSError as problem:
        return (), [
            Mistake(place, f"cannot be listed: {reason_of(problem)}", str(problem.filename))
        ]
    mistakes = []
    is_output = output_test()
    for path in (*bits_of, *(target for _, target in names)):
        if path in originals and not is_output(path):
            hint = "Originals are never overwritten: name another folder"
            mistakes.append(Mistake(("batch", "output_dir"), f"holds {path} already", hint))
    return (*others, *names), mistakes


def costs_mistakes(costs: Path | None) -> Iterator[Mistake]:
    """Why the table of costs cannot be used."""
    if costs is None:
        return
    # It imports onnxruntime, and hardly any manifest names such a table.
    from quant_core.evaluate.timing_cache import TimingCache

    try:
        TimingCache(costs)
    except RequestError as error:
        yield Mistake(("batch", "costs"), f"{error.problem}: {costs}", error.hint)


def _what_is_wrong(
    path: Location, is_there: Callable[[Location], bool], may_be_folder: bool
) -> str | None:
    if isinstance(path, Url):
        return _what_is_wrong_in_store(path, may_be_folder)
    if is_there(path):
        return "is a folder, not a file" if not may_be_folder and is_folder(path) else None
    try:
        path.stat()
    except FileNotFoundError:
        return "is a link to nothing" if path.is_symlink() else "no such file"
    except OSError as problem:  # a folder above that must not be entered, links in a circle
        return reason_of(problem)
    return "is no regular file"


def _what_is_wrong_in_store(url: Url, may_be_folder: bool) -> str | None:
    try:
        is_folder = host_cache().stat(url).is_folder
    except OSError as problem:
        return reason_of(problem)
    return "is a folder, not a file" if is_folder and not may_be_folder else None


def _names_in(folder: Location) -> list[str]:
    """Raises: OSError if there is no such folder."""
    inside = folder.iterdir() if isinstance(folder, Path) else listing(folder)
    return [entry.name for entry in inside]


def _similar_name(path: Location, names_in: Callable[[Location], list[str]] = _names_in) -> str:
    """A hint for a missing file: the one beside it whose name is nearly the same, if there is one.

    names_in  the names in a folder; one that remembers, where many files are looked at
    """
    try:
        names = names_in(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return f"There is no folder {path.parent}"
    except OSError:  # what is wrong with the file says why
        return ""
    if path.name in names:  # it is there, and something else is wrong
        return ""
    if "*" in path.name:
        return "Only batch.input_dir takes a glob"
    few = names if len(names) <= MOST_NAMES else []
    return nearest_hint(path.name, few) or "Paths of a manifest start at its folder"
