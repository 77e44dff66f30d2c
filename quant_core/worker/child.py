"""A warm child process that runs stages one after another: how it is started, used and killed.

1. A request is one JSON line on the child's stdin. An answer is one JSON line on a pipe of its own,
   because native code prints on stdout.
2. It is killed with its whole group if a stage outlives its deadline or its memory limit.
3. It never outlives its parent.
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
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any

from quant_core.errors import StageError, StageReason
from quant_core.worker import host, memory
from quant_core.worker.memory import MORE_MEMORY, megabytes

POLL_S = 0.05
STAGES_PER_CHILD = 500  # then a fresh one: small leaks of native code never add up
IDLE_BYTES = 1 << 30  # a child that holds more than this between stages is replaced
LAST_OUTPUT_BYTES = 8192  # of what a dead child printed, in which its last message is looked for
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


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
