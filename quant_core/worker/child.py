"""The parent's side: a stage runs in a warm child process, with a deadline and a memory limit.

No timeout of Prefect or Dask stops native code. So a worker keeps one child
(`python -m quant_core.worker.stages`) in its own process group.

1. A request is one JSON line on the child's stdin. An answer is one JSON line on a pipe of its own,
   because native code prints on stdout.
2. The child serves the next stage too, since its imports cost more than most stages.
3. It is killed with its whole group if a stage outlives its deadline or its memory limit.
4. It is replaced after any death, and it never outlives its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from quant_core.errors import QuantError, StageError, StageReason, error_from_dict
from quant_core.worker import host, memory
from quant_core.worker.memory import MORE_MEMORY, megabytes

STAGE_MODULE = "quant_core.worker.stages"
TIMEOUT_S = 3600.0
MEMORY_SHARE = 0.9  # of this host: the limit of a stage that has no other
POLL_S = 0.05
MAX_WORKER_DEATHS = 3  # during one stage, before it is reported as failed
STAGES_PER_CHILD = 500  # then a fresh one: small leaks of native code never add up
IDLE_BYTES = 1 << 30  # a child that holds more than this between stages is replaced
LAST_OUTPUT_BYTES = 8192  # of what a dead child printed, in which its last message is looked for
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


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


def run_stage(
    name: str,
    request: Mapping[str, Any],
    limits: StageLimits = DEFAULT_LIMITS,
    mark: str | None = None,
    module: str = STAGE_MODULE,
) -> dict[str, Any]:
    """The stage's answer to `request`: `{"result": {...}, "seconds": s, "peak_bytes": n,
    "versions": {...}}`, the last of what decides a result.

    Of a stage that runs alone the answer has `host_load` and `busy` too (host.py), and `waited_s`,
    the seconds that it waited.

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
        run = {
            "result": answer["result"],
            "seconds": time.perf_counter() - started,
            "peak_bytes": memory.peak_bytes(child.process.pid),
            "versions": host.versions(),
        }
        if not limits.alone:
            return run
        measured = load.until_now()
        busy = measured["busy"] or not is_alone
        return run | measured | {"busy": busy, "waited_s": waited_s}


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


class Child:
    """A process that runs stages one after another."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.stages = 0
        self.unread = b""
        self.output: IO[bytes] = tempfile.TemporaryFile(mode="ab+")  # noqa: SIM115 - lives as long as the child
        self.answers, child_end = os.pipe()
        try:
            command = [sys.executable, "-P", "-m", module, str(child_end)]
            self.process = _spawner().submit(_spawn, command, child_end, self.output).result()
        finally:
            os.close(child_end)

    def ask(
        self, message: Mapping[str, Any], timeout_s: float, memory_bytes: int, need_bytes: int
    ) -> dict[str, Any]:
        """The answer to one message. Raises: StageError if the child dies, or has to be killed."""
        name = message["stage"]
        kills = host.out_of_memory_kills()
        deadline = time.monotonic() + timeout_s
        self.stages += 1
        self.output.truncate(0)
        memory.reset_peak(self.process.pid)
        self._send(message)
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if selector.select(POLL_S):
                    chunk = os.read(self.answers, 1 << 20)
                    if not chunk:
                        raise self._death(name, kills)
                    self.unread += chunk
                elif time.monotonic() > deadline:
                    raise StageError(
                        f"took longer than {timeout_s:g} s",
                        f"stage {name}",
                        "Raise limits.timeout_s, or use fewer samples",
                        StageReason.TIMEOUT,
                    )
                else:
                    self._check_memory(name, memory_bytes, need_bytes)
        line, self.unread = self.unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def is_fresh(self) -> bool:
        """Whether the child is alive, and worth keeping for another stage."""
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
        self.output.close()
        os.close(self.answers)

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # `ask` notices a dead child by its silence
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _check_memory(self, name: str, memory_bytes: int, need_bytes: int) -> None:
        """Raises: StageError if the child holds too much, for its limit or for this host."""
        held = memory.held_bytes(self.process.pid)
        if held <= min(need_bytes, memory_bytes):
            return
        peak = megabytes(memory.peak_bytes(self.process.pid))
        if held > memory_bytes:
            raise StageError(
                f"out of memory: {peak} held, {megabytes(memory_bytes)} allowed",
                f"stage {name}",
                MORE_MEMORY,
                StageReason.MEMORY,
            )
        if memory.available_bytes() < 0:
            raise StageError(
                f"out of memory: {peak} held, and this host has no more",
                f"stage {name}",
                MORE_MEMORY,
                StageReason.HOST_MEMORY,
            )

    def _death(self, name: str, kills_before: int) -> StageError:
        """The error of a child that is gone, from its exit code and its last message."""
        code, peak_bytes = self._wait()
        where = f"stage {name}"
        message = self._last_message()
        held = f"{megabytes(peak_bytes)} held"
        if code == -signal.SIGKILL and host.out_of_memory_kills() > kills_before:
            problem = f"out of memory: killed by the kernel, {held}"
            return StageError(problem, where, MORE_MEMORY, StageReason.HOST_MEMORY)
        if "bad_alloc" in message:  # C++ tells why it aborts on stderr only
            problem = f"out of memory: {message} ({held})"
            return StageError(problem, where, MORE_MEMORY, StageReason.MEMORY)
        if code == -signal.SIGKILL:
            hint = "Something outside quantmill killed it; run it again"
            return StageError("killed by SIGKILL", where, hint, StageReason.KILLED)
        problem = f"ended with exit code {code}"
        if code < 0:
            problem = f"crashed with {signal.Signals(-code).name}"
        hint = f"Last seen: {message}" if message else "It left no message"
        return StageError(problem, where, hint, StageReason.CRASHED)

    def _wait(self) -> tuple[int, int]:
        """The exit code of the dead child, and its peak memory in bytes."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, usage.ru_maxrss << 10

    def _last_message(self) -> str:
        """The innermost frame that faulthandler printed, else the last line of the output."""
        size = os.fstat(self.output.fileno()).st_size
        self.output.seek(max(0, size - LAST_OUTPUT_BYTES))
        text = self.output.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for line in lines:
            if line.startswith("File "):
                return line
        return lines[-1] if lines else ""


@cache
def _spawner() -> ThreadPoolExecutor:
    """A thread that lives as long as this process.

    The kernel's parent-death signal is sent when the thread that spawned the child ends.
    """
    return ThreadPoolExecutor(1, "quantmill-spawner")


def _spawn(command: list[str], answers: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {key: os.environ[key] for key in KEPT_ENVIRONMENT if key in os.environ}
    environment |= ONE_THREAD
    environment["PYTHONPATH"] = os.pathsep.join(import_path())
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=(answers,),
        env=environment,
        start_new_session=True,
    )


def import_path() -> list[str]:
    """`sys.path` for a process of ours: without the current folder, and with our packages.

    The current folder may hold a `numpy.py` of somebody else.
    """
    own = str(Path(__file__).parents[2])
    entries = [str(Path(entry).absolute()) for entry in sys.path if entry]
    return entries if own in entries else [*entries, own]


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
