"""The child's side: a process that answers one request after another until its parent is gone."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import gc
import json
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from quant_core.errors import QuantError, StageError, StageReason, reason_of
from quant_core.evaluate.custom_metric import code_allowed
from quant_core.worker.memory import MORE_MEMORY

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
BUSY_ERRORS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.ENFILE,
    errno.EMFILE,
}
OS_HINTS = {
    errno.ENOSPC: "Free some space, then run it again",
    errno.EDQUOT: "Free some of your quota, then run it again",
    errno.EACCES: "Check who may read and write there",
    errno.EROFS: "Choose an output folder that can be written",
}

Stage = Callable[..., dict[str, Any]]


def serve(stages: Mapping[str, Stage]) -> None:
    """Answer requests from stdin until it ends.

    Answers go to the descriptor that the first argument names, else to stdout. Whatever native code
    prints on stdout goes to stderr.
    """
    has_parent = len(sys.argv) > 1
    descriptor = int(sys.argv[1]) if has_parent else os.dup(1)
    answers = os.fdopen(descriptor, "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)
    if has_parent:
        _die_with_parent()
    requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests, has_parent), daemon=True).start()
    gc.freeze()  # what was imported stays: collecting after a stage then takes a millisecond
    while line := requests.get():
        message = json.loads(line)
        _limit_memory(message.get("memory_bytes"))
        with code_allowed(message.get("allow_code")):
            answer = _answer(stages[message["stage"]], message["request"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        _give_memory_back()


@np.errstate(all="ignore")  # numbers are checked where it matters
def _answer(stage: Stage, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": stage(**request)}
    except BaseException as problem:  # sys.exit() in a user's own metric is no success
        return {"error": _as_quant_error(problem).to_dict()}


def _as_quant_error(problem: BaseException) -> QuantError:
    """The error of any exception that a stage raised."""
    if isinstance(problem, QuantError):
        return problem
    text = str(problem) or type(problem).__name__
    if _is_out_of_memory(problem):
        return StageError(f"out of memory: {text}", "", MORE_MEMORY, StageReason.MEMORY)
    if isinstance(problem, OSError) and problem.errno is not None:
        is_busy = problem.errno in BUSY_ERRORS
        return StageError(
            reason_of(problem),
            str(problem.filename or ""),
            OS_HINTS.get(problem.errno, ""),
            StageReason.BUSY if is_busy else StageReason.FAILED,
        )
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    return StageError(
        f"{type(problem).__name__}: {text}",
        "",
        f"Raised in {Path(frame.filename).name}:{frame.lineno}",
    )


def _is_out_of_memory(problem: BaseException) -> bool:
    """Whether an allocation failed. onnxruntime has no class for that, only these messages."""
    text = str(problem)
    native = "bad_alloc" in text or "Failed to allocate memory" in text
    return isinstance(problem, MemoryError) or native


def _read_requests(requests: queue.SimpleQueue[str | None], has_parent: bool) -> None:
    """Pass requests on. At the end of stdin the parent is gone: the child's group ends at once."""
    for line in sys.stdin:
        requests.put(line)
    if has_parent:
        _end_group()
    requests.put(None)


def _die_with_parent() -> None:
    """Let the kernel kill this process with its parent, even while native code runs (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group() -> NoReturn:
    os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)


def _limit_memory(memory_bytes: int | None) -> None:
    """Let allocations fail at twice the limit, for what grows faster than the parent looks."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if memory_bytes is None else 2 * memory_bytes
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _give_memory_back() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
