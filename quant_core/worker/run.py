"""A stage runs in a warm child process, with a deadline and a memory limit.

No timeout of Prefect or Dask stops native code. So a worker keeps one child
(`python -m quant_core.worker.stages`) in its own process group. It serves the next stage too, since
its imports cost more than most stages, and is replaced after any death.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from quant_core.errors import QuantError, StageError, StageReason, error_from_dict
from quant_core.versions import versions
from quant_core.worker import host, memory
from quant_core.worker.child import Child
from quant_core.worker.memory import megabytes

STAGE_MODULE = "quant_core.worker.stages"
TIMEOUT_S = 3600.0
MEMORY_SHARE = 0.9  # of this host: the limit of a stage that has no other
MAX_WORKER_DEATHS = 3  # during one stage, before it is reported as failed


@dataclass(frozen=True, slots=True)
class StageLimits:
    """What a stage may take of its host, and what it may do there.

    timeout_s     how long it may run
    memory_bytes  the most that it may hold; None: most of the host's memory
    need_bytes    what it is expected to hold: it begins when that fits (memory.py)
    alone         whether it waits until no other such stage runs on its host
    patience_s    how long it waits for that; then it goes on, and is `busy`
    allow_code    the folder from which metrics `module:function` are imported; None: none may run
    """

    timeout_s: float = TIMEOUT_S
    memory_bytes: int | None = None
    need_bytes: int = 0
    alone: bool = False
    patience_s: float = TIMEOUT_S
    allow_code: str | None = None


DEFAULT_LIMITS = StageLimits()


class StageAnswer(TypedDict):
    """What a stage answered, and what it took; plain JSON values.

    result      what the function of worker/stages.py returned
    peak_bytes  the most that it held
    versions    of what decides a result
    host_load   with `busy`, of a stage that runs alone: what others did meanwhile (host.py)
    waited_s    the seconds that it waited to be alone
    files       name -> size and digest, of a stage that writes into a store (tasks/remote.py)
    started_at  of an answer that a batch keeps
    """

    result: dict[str, Any]
    seconds: float
    peak_bytes: int
    versions: NotRequired[dict[str, str]]
    host_load: NotRequired[float]
    busy: NotRequired[bool]
    waited_s: NotRequired[float]
    files: NotRequired[dict[str, list[Any]]]
    started_at: NotRequired[str]


def run_stage(
    name: str,
    request: Mapping[str, Any],
    limits: StageLimits = DEFAULT_LIMITS,
    mark: str | None = None,
    module: str = STAGE_MODULE,
) -> StageAnswer:
    """The stage's answer to `request`.

    mark  a file that gets a byte each time that this process dies during the stage

    Raises: the QuantError that the stage raised; StageError, whose `reason` says whether another
    try makes sense, for a deadline, a memory limit or a crash.
    """
    memory_bytes = limits.memory_bytes or int(MEMORY_SHARE * memory.total_bytes())
    message = {
        "stage": name,
        "request": dict(request),
        "memory_bytes": memory_bytes,
        "allow_code": limits.allow_code,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_LOCK)
        asked_at = time.perf_counter()
        is_alone = not limits.alone or stack.enter_context(host.alone_on_host(limits.patience_s))
        waited_s = time.perf_counter() - asked_at
        child = _warm_child(module)
        stack.enter_context(memory.reserve(limits.need_bytes, child.process.pid))
        stack.enter_context(_marked(mark, name))
        started = time.perf_counter()
        load = host.OtherLoad(child.process.pid)
        try:
            answer = child.ask(message, limits.timeout_s, memory_bytes, limits.need_bytes)
        except BaseException:
            shut_down()
            raise
        if error := answer.get("error"):
            raise _as_exception(error, name, child)
        run: StageAnswer = {
            "result": answer["result"],
            "seconds": time.perf_counter() - started,
            "peak_bytes": memory.peak_bytes(child.process.pid),
            "versions": versions(),
        }
        if limits.alone:
            others = load.until_now()
            run["host_load"], run["busy"] = others["host_load"], others["busy"] or not is_alone
            run["waited_s"] = waited_s
        return run


def worker_death(deaths: int, name: str) -> StageError:
    """The error of a stage during which this many workers have died."""
    return StageError(
        "its Dask worker died",
        f"stage {name}",
        "The model may be what kills it: try it alone, with more memory",
        StageReason.LOST if deaths < MAX_WORKER_DEATHS else StageReason.DEADLY,
    )


def warm_up() -> None:
    """Start this process's child, so that it imports while something else starts.

    A child that there is already stays, whatever stages it runs.
    """
    with _LOCK:
        if os.getpid() not in _CHILDREN:
            _warm_child(STAGE_MODULE)


def shut_down() -> None:
    """Kill this process's child, if there is one."""
    if child := _CHILDREN.pop(os.getpid(), None):
        child.kill()


# The one warm child of each process. A forked process has another pid, so it never talks to its
# parent's child.
_CHILDREN: dict[int, Child] = {}
_LOCK = threading.RLock()


def _warm_child(module: str) -> Child:
    child = _CHILDREN.get(os.getpid())
    if child is None or child.module != module or not child.is_fresh():
        shut_down()
        child = _CHILDREN[os.getpid()] = Child(module)
    return child


def _as_exception(values: Mapping[str, Any], name: str, child: Child) -> QuantError:
    """The error that the child answered; after running out of memory the child is replaced."""
    values = {**values, "where": values["where"] or f"stage {name}"}
    error = error_from_dict(values)
    if isinstance(error, StageError) and error.reason is StageReason.MEMORY:
        held = megabytes(memory.peak_bytes(child.process.pid))
        shut_down()
        return error_from_dict({**values, "problem": f"{error.problem} ({held} held)"})
    return error


@contextlib.contextmanager
def _marked(mark: str | None, name: str) -> Iterator[None]:
    """Add a byte to the file while the block runs; it stays if this process dies meanwhile.

    Raises: StageError if that has happened too often.
    """
    if mark is None:
        yield
        return
    with contextlib.suppress(OSError), Path(mark).open("ab") as file:
        # A scheduler that tries a task again by itself does not look at errors: this does.
        if file.tell() >= MAX_WORKER_DEATHS:
            raise worker_death(file.tell(), name)
        file.write(b"x")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(mark, Path(mark).stat().st_size - 1)
