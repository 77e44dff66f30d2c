"""How a stage runs so that it can be killed: in a warm child process, with a deadline and a memory limit.

No timeout of Prefect or Dask stops native code. So a worker keeps one child (`python -m quant_core.worker.stages`) in its own
process group: one JSON line per request on its stdin, one JSON line per answer on a pipe of its own (native code prints
on stdout). The child serves the next stage too, since its imports cost more than most stages; it is killed with its
whole group when a stage outlives its deadline or its memory, and replaced after any death. It never outlives
its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import gc
import json
import os
import queue
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

from quant_core import errors
from quant_core.errors import QuantError, StageError
from quant_core.worker import memory

STAGE_MODULE = "quant_core.worker.stages"
TIMEOUT_S = 3600.0
MEMORY_SHARE = 0.9  # of this host: what a stage may hold that no other limit is set for
POLL_S = 0.05
STRIKES = 3  # deaths of its worker in the midst of a stage, after which the stage is set aside
BUSY_CORES = 0.25  # of others beside a benchmark: batch and system take a twentieth
STAGES_PER_CHILD = 500  # then a fresh one: small leaks of native code never add up
IDLE_BYTES = 1 << 30  # a child that holds more than this between stages is replaced
BUSY = {errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.ENFILE, errno.EMFILE}
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MORE_MEMORY = (
    "Fewer models at once (jobs), a higher limits.memory_mb, or a machine with more memory"
)


class InterruptedStage(StageError):
    """A stage was lost for a reason outside itself: the same stage may pass another time."""


class NoRoom(InterruptedStage):
    """A stage took more memory than it had asked for, when others needed it: it may pass if it asks for more."""


def run_stage(
    name: str,
    request: Mapping[str, Any],
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int | None = None,
    need_bytes: int = 0,
    alone: bool = False,
    mark: str | None = None,
    module: str = STAGE_MODULE,
) -> dict[str, Any]:
    """What the stage `name` answers to `request`: `{"result": {...}, "seconds": s, "peak_bytes": n}`.

    memory_bytes  what the stage may hold at most; most of this host without it
    need_bytes    what it is expected to hold: it begins when there is room for that (memory.py)
    alone         takes turns with every other such stage on this host, and adds `host_load`: the share of the host's
                  CPU time that went to others meanwhile, and `busy`: whether that is too much to trust a timing
    mark          a file that has a byte for each time the stage was begun and its process died in it

    Raises: the QuantError that the stage raised; StageError for a deadline, a memory limit or a crash;
    InterruptedStage where trying again makes sense.
    """
    memory_bytes = memory_bytes or int(MEMORY_SHARE * memory.total_bytes())
    message = {"stage": name, "request": dict(request), "memory_bytes": memory_bytes}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_LOCK)
        if alone:
            stack.enter_context(_host_to_itself())
        child = _warm_child(module)
        stack.enter_context(memory.promised(need_bytes, child.process.pid))
        stack.enter_context(_marked(mark, name))
        started, busy, own = time.perf_counter(), _busy_seconds(), child.cpu_seconds()
        try:
            answer = child.ask(message, timeout_s, memory_bytes, need_bytes)
        except BaseException:
            shut_down()
            raise
        if error := answer.get("error"):
            raise _as_exception(error, name, child)
        seconds = time.perf_counter() - started
        run = {
            "result": answer["result"],
            "seconds": seconds,
            "peak_bytes": memory.peak_bytes(child.process.pid),
        }
        if alone:
            others = _busy_seconds() - busy - (child.cpu_seconds() - own)
            run["host_load"] = max(0.0, others) / (seconds * (os.cpu_count() or 1))
            run["busy"] = others / seconds > BUSY_CORES
        return run


def lost_worker(strikes: int, name: str) -> StageError:
    """What to say of a stage in whose midst so many workers have died."""
    kind = InterruptedStage if strikes < STRIKES else StageError
    return kind(
        "its Dask worker died",
        f"stage {name}",
        "The model may be what kills it: try it alone, with more memory",
    )


def warm_up(module: str = STAGE_MODULE) -> None:
    """Start this process's child, so that it imports while something else starts."""
    with _LOCK:
        _warm_child(module)


def shut_down() -> None:
    """Kill this process's child, if there is one."""
    if child := _CHILDREN.pop(os.getpid(), None):
        child.kill()


# The one warm child of each process. A forked process has another pid, so it never talks to its parent's child.
_CHILDREN: dict[int, Child] = {}
_LOCK = threading.RLock()


def _warm_child(module: str) -> Child:
    child = _CHILDREN.get(os.getpid())
    if child is None or child.module != module or not child.is_fresh():
        shut_down()
        child = _CHILDREN[os.getpid()] = Child(module)
    return child


class Child:
    """A process that runs stages one after another."""

    def __init__(self, module: str) -> None:
        self.module, self.stages, self.unread = module, 0, b""
        self.words: IO[bytes] = tempfile.TemporaryFile(mode="ab+")  # noqa: SIM115 - it lives as long as the child
        self.answers, theirs = os.pipe()
        try:
            command = [sys.executable, "-m", module, str(theirs)]
            self.process = _spawner().submit(_spawn, command, theirs, self.words).result()
        finally:
            os.close(theirs)

    def ask(
        self, message: Mapping[str, Any], timeout_s: float, memory_bytes: int, need_bytes: int
    ) -> dict[str, Any]:
        """The answer to one message. Raises: StageError when the child died of it, or has to."""
        name, kills, deadline = message["stage"], _kernel_kills(), time.monotonic() + timeout_s
        where = f"stage {name}"
        self.stages += 1
        self.words.truncate(0)
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text(
                "5"
            )  # VmHWM starts again: the peak of this stage alone
        with contextlib.suppress(BrokenPipeError):  # a dead child is noticed below, by its silence
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if selector.select(POLL_S):
                    chunk = os.read(self.answers, 1 << 20)
                    if not chunk:
                        raise self._death(name, kills)
                    self.unread += chunk
                elif time.monotonic() > deadline:
                    late = f"took longer than {timeout_s:g} s"
                    raise StageError(late, where, "Raise limits.timeout_s, or use fewer samples")
                elif (held := memory.held_bytes(self.process.pid)) > min(need_bytes, memory_bytes):
                    peak = _mb(memory.peak_bytes(self.process.pid))
                    if held > memory_bytes:
                        raise StageError(
                            f"out of memory: {peak} held, {_mb(memory_bytes)} allowed",
                            where,
                            MORE_MEMORY,
                        )
                    if memory.available_bytes() < 0:
                        raise NoRoom(
                            f"out of memory: {peak} held, and this host has no more",
                            where,
                            MORE_MEMORY,
                        )
        line, self.unread = self.unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def is_fresh(self) -> bool:
        """Alive, and worth keeping for another stage."""
        return (
            self.process.poll() is None
            and self.stages < STAGES_PER_CHILD
            and memory.held_bytes(self.process.pid) < IDLE_BYTES
        )

    def kill(self) -> None:
        """End the whole group, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.words.close()
        os.close(self.answers)

    def cpu_seconds(self) -> float:
        ticks = _read(f"/proc/{self.process.pid}/stat").rpartition(")")[2].split()[11:15]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def _death(self, name: str, kills_before: int) -> StageError:
        """Why the child is gone, told from its exit code and its last words."""
        (code, peak), where, words = self._end(), f"stage {name}", self._last_words()
        if code == -signal.SIGKILL and _kernel_kills() > kills_before:
            return NoRoom(
                f"out of memory: killed by the kernel, {_mb(peak)} held", where, MORE_MEMORY
            )
        if "bad_alloc" in words:
            return StageError(f"out of memory: {words} ({_mb(peak)} held)", where, MORE_MEMORY)
        if code == -signal.SIGKILL:
            return InterruptedStage(
                "killed by SIGKILL", where, "Something outside quantmill killed it; run it again"
            )
        how = (
            f"crashed with {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        return StageError(how, where, f"Last seen: {words}" if words else "It left no message")

    def _end(self) -> tuple[int, int]:
        """The exit code of what is dead, and its peak memory."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, usage.ru_maxrss << 10

    def _last_words(self) -> str:
        """The innermost frame that faulthandler saw, else the last line on stderr."""
        self.words.seek(max(0, os.fstat(self.words.fileno()).st_size - 8192))
        lines = [
            line.strip()
            for line in self.words.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
        return next(
            (line for line in lines if line.startswith("File ")), lines[-1] if lines else ""
        )


@cache
def _spawner() -> ThreadPoolExecutor:
    """A thread that lives as long as this process: the kernel's parent-death signal follows the thread that spawned."""
    return ThreadPoolExecutor(1, "quantmill-spawner")


def _spawn(command: list[str], answers: int, words: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {
        key: os.environ[key] for key in KEPT_ENVIRONMENT if key in os.environ
    } | ONE_THREAD
    environment["PYTHONPATH"] = os.pathsep.join(
        str(Path(entry).absolute()) for entry in sys.path
    )  # our imports are its
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=words,
        stderr=words,
        pass_fds=(answers,),
        env=environment,
        start_new_session=True,
    )


def _as_exception(error: Mapping[str, str], name: str, child: Child) -> QuantError:
    problem = error["problem"]
    if problem.startswith("out of memory"):
        problem += f" ({_mb(memory.peak_bytes(child.process.pid))} held)"
        shut_down()
    return _error_kinds()[error["kind"]](problem, error["where"] or f"stage {name}", error["hint"])


@contextlib.contextmanager
def _marked(mark: str | None, name: str) -> Iterator[None]:
    """The file has one byte more for as long as this lasts, and for ever if this process dies meanwhile.

    Raises: StageError if that has happened too often.
    """
    if mark is None:
        yield
        return
    with contextlib.suppress(OSError), Path(mark).open("ab") as file:
        if (
            file.tell() >= STRIKES
        ):  # a scheduler that tries again by itself does not ask for a reason
            raise lost_worker(file.tell(), name)
        file.write(b"x")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(mark, Path(mark).stat().st_size - 1)


@contextlib.contextmanager
def _host_to_itself() -> Iterator[None]:
    """A lock that all processes of this host share."""
    path = Path(tempfile.gettempdir()) / "quantmill-benchmark.lock"
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _busy_seconds() -> float:
    """CPU seconds that this host has worked since it started, or that its own host took away."""
    spent = list(map(int, (_read("/proc/stat") or "cpu" + 8 * " 0").split()[1:9]))
    user, nice, system, _idle, _wait, irq, softirq, stolen = spent
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def _kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory."""
    counts = dict(line.split() for line in _read("/proc/vmstat").splitlines())
    return int(counts.get("oom_kill", 0))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


# The child's side


def serve(stages: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests from stdin until it ends, on the descriptor that the first argument names, else on stdout."""
    parent = len(sys.argv) > 1
    answers = os.fdopen(int(sys.argv[1]) if parent else os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)
    if parent:
        _die_with_parent()
    requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests, parent), daemon=True).start()
    gc.freeze()  # what was imported stays: collecting after a stage then costs a millisecond
    while line := requests.get():
        message = json.loads(line)
        _limit_memory(message.get("memory_bytes"))
        answers.write(json.dumps(_answer(stages[message["stage"]], message["request"])) + "\n")
        answers.flush()
        _give_memory_back()


def _answer(stage: Callable[..., dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": stage(**request)}
    except (
        BaseException
    ) as problem:  # sys.exit() in a metric of the user's own must not look like success
        kind, what, where, hint = _told(problem)
        return {"error": {"kind": kind, "problem": what, "where": where, "hint": hint}}


def _told(problem: BaseException) -> tuple[str, str, str, str]:
    """Kind, problem, where and hint of any exception."""
    text = str(problem) or type(problem).__name__
    if isinstance(problem, QuantError):
        kind = next(cls.__name__ for cls in type(problem).__mro__ if cls.__name__ in _error_kinds())
        return kind, problem.problem, problem.where, problem.hint
    if (
        isinstance(problem, MemoryError)
        or "bad_alloc" in text
        or "Failed to allocate memory" in text
    ):
        return "StageError", f"out of memory: {text}", "", MORE_MEMORY
    if isinstance(problem, OSError) and problem.errno is not None:
        kind = "InterruptedStage" if problem.errno in BUSY else "StageError"
        return (
            kind,
            (problem.strerror or text).lower(),
            str(problem.filename or ""),
            _OS_HINTS.get(problem.errno, ""),
        )
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    return (
        "StageError",
        f"{type(problem).__name__}: {text}",
        "",
        f"Raised in {Path(frame.filename).name}:{frame.lineno}",
    )


_OS_HINTS = {
    errno.ENOSPC: "Free some space, then run it again",
    errno.EDQUOT: "Free some of your quota, then run it again",
    errno.EACCES: "Check who may read and write there",
    errno.EROFS: "Choose an output folder that can be written",
}


@cache
def _error_kinds() -> dict[str, type[QuantError]]:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, QuantError)
    ]
    return {kind.__name__: kind for kind in (*kinds, InterruptedStage, NoRoom)}


def _read_requests(requests: queue.SimpleQueue[str | None], parent: bool) -> None:
    """Pass requests on. The end of stdin means that the parent is gone: so is this group then, whatever it does."""
    for line in sys.stdin:
        requests.put(line)
    if parent:
        _end_group()
    requests.put(None)


def _die_with_parent() -> None:
    """Where Linux can: the kernel kills us with our parent, even while native code holds the interpreter."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_group() -> NoReturn:
    os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)


def _limit_memory(memory_bytes: int | None) -> None:
    """A second fence far behind the parent's own watch, for what grows faster than it looks."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if memory_bytes is None else 2 * memory_bytes
    resource.setrlimit(
        resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def _give_memory_back() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
