"""What this host is doing: the lock for stages that must run alone, and how busy its CPUs are."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

BUSY_CORES = 0.25  # used by others beside a benchmark: batch and system take a twentieth
LOCK = "\0quantmill-benchmark"  # of Linux: an address that is no file
POLL_S = 0.1


@contextlib.contextmanager
def alone_on_host(patience_s: float) -> Iterator[bool]:
    """Hold a lock that all processes of this host share, of whichever user.

    Yields whether it is held: if another process keeps it for `patience_s`, the work goes on
    beside that process. The lock is the name of a socket, so there is no file that somebody else
    may own, and it ends with the process that holds it. A system without such names has no lock.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        deadline = time.monotonic() + patience_s
        while not (is_alone := _try_lock(lock)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        yield is_alone


def _try_lock(lock: socket.socket) -> bool:
    try:
        lock.bind(LOCK)
    except OSError as problem:
        return problem.errno != errno.EADDRINUSE
    return True


class Others(TypedDict):
    """What others did on this host.

    host_load  their share of the CPU time of all cores
    busy       whether that is too much to trust a timing
    """

    host_load: float
    busy: bool


class OtherLoad:
    """The CPU time that others use while process `pid` works; it is measured from now on."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.started = time.perf_counter()
        self.others_seconds = self._others_seconds()

    def until_now(self) -> Others:
        """What others used since then."""
        seconds = time.perf_counter() - self.started
        cores = (self._others_seconds() - self.others_seconds) / seconds
        return {
            "host_load": max(0.0, cores) / (os.cpu_count() or 1),
            "busy": cores > BUSY_CORES,
        }

    def _others_seconds(self) -> float:
        return busy_seconds() - cpu_seconds(self.pid)


def busy_seconds() -> float:
    """CPU seconds that this host has worked since it started, or that its own host took away."""
    fields = (read_text("/proc/stat") or "cpu" + 8 * " 0").split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, stolen = map(int, fields)
    ticks = user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU seconds that the process, and the children it has waited for, have used."""
    fields = read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    utime_to_cstime = fields[11:15]
    return sum(map(int, utime_to_cstime)) / os.sysconf("SC_CLK_TCK")


def out_of_memory_kills() -> int:
    """The number of processes that the kernel has killed for want of memory."""
    counts = dict(line.split() for line in read_text("/proc/vmstat").splitlines())
    return int(counts.get("oom_kill", 0))


def read_text(path: str | Path) -> str:
    """The content of a file of the kernel, "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
