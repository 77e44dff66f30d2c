"""A stage whose files lie in stores: it runs on local copies, and what it writes goes back.

A worker calls `run_remote_stage` where it would call `run_stage` for local files. So it needs no
disk that another host can reach.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.errors import QuantError, StageError, StageReason, error_from_dict, reason_of
from quant_core.worker.run import (
    MAX_WORKER_DEATHS,
    StageAnswer,
    StageLimits,
    run_stage,
    worker_death,
)
from tasks import stores
from tasks.cache import Cache, Content, host_cache
from tasks.contents import file_digest
from tasks.locations import Location, Url, is_url
from tasks.store_requests import BUSY

COSTS = "costs.jsonl"  # of a worker that shares no disk: its own table of measured costs


@dataclass(frozen=True, slots=True)
class Remote:
    """Where the files of a request are.

    contents  URL -> what it held when the batch read it, for each URL of the request
    folder    the folder of a store into which the stages of the model write; None: a local one
    mark      a file there that tells how many workers have died during the stage
    """

    contents: Mapping[str, Content]
    folder: Url | None = None
    mark: Url | None = None


def urls_in(values: Any) -> Iterator[str]:
    """Every URL among JSON values."""
    if isinstance(values, str):
        if is_url(values):
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from urls_in(value)
    elif isinstance(values, Sequence):
        for value in values:
            yield from urls_in(value)


def run_remote_stage(
    remote: Remote,
    name: str,
    request: Mapping[str, Any],
    limits: StageLimits,
    mark: str | None = None,
) -> StageAnswer:
    """The answer of `run_stage`, with the URLs of the request in place of local paths.

    If stages write into a store, it has `files` too: name -> size and digest of what this one
    wrote, relative to their folder.

    Raises: as `run_stage`; StageError if a store cannot be read or written.
    """
    cache = host_cache()
    cache.limit_s = limits.timeout_s
    try:
        with cache.contents.work_folder() as work, _marked(remote.mark, name):
            places = dict(_places(cache, work, remote))
            if remote.folder is not None and request.get("costs"):
                request = {**request, "costs": str(cache.root / COSTS)}
            local = _to_local(request, places)
            try:
                local_answer = run_stage(name, local, limits, mark)
            except QuantError as problem:
                raise error_from_dict(_to_urls(problem.to_dict(), places)) from None
            answer: StageAnswer = _to_urls(local_answer, places)
            if remote.folder is not None:
                known = remote.contents[str(remote.folder)].files
                answer["files"] = _send(
                    cache, Path(places[str(remote.folder)]), remote.folder, known
                )
            return answer
    except OSError as problem:
        raise _as_stage_error(problem, name) from problem


def transfer(source: Location, target: Location, limit_s: float) -> None:
    """Copy a file to, from or inside a store; it appears as a whole. Raises: OSError."""
    if isinstance(source, Url) and isinstance(target, Url) and stores.is_same_store(source, target):
        try:
            stores.copy(source, target, limit_s)
            return
        except OSError as problem:
            if problem.errno != errno.EOPNOTSUPP:
                raise
    if isinstance(source, Path) and isinstance(target, Url):
        stores.upload(source, target, limit_s)
    elif isinstance(source, Url) and isinstance(target, Path):
        stores.download(source, target, limit_s)
    else:
        with host_cache().contents.work_folder() as folder:
            transfer(source, folder / "file", limit_s)
            transfer(folder / "file", target, limit_s)


def _places(cache: Cache, work: Path, remote: Remote) -> Iterator[tuple[str, str]]:
    """Each URL with the local path of its copy."""
    for number, (url, content) in enumerate(remote.contents.items()):
        folder = work / f"{number:03}"
        folder.mkdir()
        cache.place(content, folder)
        if url == str(remote.folder):
            (folder / "out").mkdir(exist_ok=True)
        yield url, str(folder / content.name if content.name else folder)


def _to_local(values: Any, places: Mapping[str, str]) -> Any:
    """The JSON values with local paths for these URLs, and for those below one of them."""

    def replace(text: str) -> str:
        for url, local in places.items():
            if text == url or text.startswith(f"{url}/"):
                return local + text[len(url) :]
        return text

    return _mapped(replace, values)


def _to_urls(values: Any, places: Mapping[str, str]) -> Any:
    """The JSON values with URLs for their local copies, also inside of sentences."""

    def replace(text: str) -> str:
        for url, local in places.items():
            text = text.replace(local, url)
        return text

    return _mapped(replace, values)


def _mapped(replace: Callable[[str], str], values: Any) -> Any:
    """The JSON values with every text replaced."""
    if isinstance(values, str):
        return replace(values)
    if isinstance(values, Mapping):
        return {key: _mapped(replace, value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_mapped(replace, value) for value in values]
    return values


def _send(
    cache: Cache, local: Path, folder: Url, known: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    """Copy what a stage has written into the store. Returns each file's size and digest."""
    sent = {}
    for path in sorted(local.rglob("*")):
        name = path.relative_to(local).as_posix()
        if name in known or path.name.startswith(".") or not path.is_file():
            continue
        digest = file_digest(path)
        stores.upload(path, folder / name, cache.limit_s)
        cache.contents.add(path, digest)
        sent[name] = [path.stat().st_size, digest]
    return sent


@contextlib.contextmanager
def _marked(mark: Url | None, stage: str) -> Iterator[None]:
    """As `run_stage` marks a local file: one byte more while the block runs.

    Raises: StageError if this process has died too often during the stage.
    """
    if mark is None:
        yield
        return
    deaths = deaths_at(mark)
    if deaths >= MAX_WORKER_DEATHS:
        raise worker_death(deaths, stage)
    stores.write(mark, b"x" * (deaths + 1))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            stores.write(mark, b"x" * deaths) if deaths else stores.remove(mark)


def deaths_at(mark: Location) -> int:
    """The number of workers that died during the stage of this mark. Raises: OSError."""
    try:
        return mark.stat().st_size if isinstance(mark, Path) else stores.stat(mark).size
    except FileNotFoundError:
        return 0


def _as_stage_error(problem: OSError, stage: str) -> StageError:
    """A failure of a store as an error of the stage; one that may pass is transient."""
    is_busy = problem.errno in BUSY | {errno.ESTALE}
    return StageError(
        reason_of(problem),
        str(problem.filename or f"stage {stage}"),
        "Do the workers reach the store, with credentials that hold, and may they write there?",
        StageReason.BUSY if is_busy else StageReason.FAILED,
    )
