"""What this host is doing: the lock for stages that must run alone, and how busy its CPUs are."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypedDict

PACKAGES = ("quantmill", "onnx", "onnxruntime")
BUSY_CORES = 0.25  # used by others beside a benchmark: batch and system take a twentieth
LOCK = "\0quantmill-benchmark"  # of Linux: an address that is no file
POLL_S = 0.1
OWN_NAMES = 10  # of a temporary folder, where others hold the first ones


@cache
def versions() -> dict[str, str]:
    """Package -> version of what decides a result; `unknown` for what is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


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


def own_folder() -> Path:
    """A temporary folder of this user's own, the same one for all their processes.

    What somebody else has put in its place stays there: the folder has the next name. Raises:
    OSError if none can be made.
    """
    user = os.getuid()
    first = Path(tempfile.gettempdir()) / f"quantmill-{user}"
    for k in range(OWN_NAMES):
        folder = first.with_name(f"{first.name}-{k}") if k else first
        with contextlib.suppress(FileExistsError):  # a file, or a link to nothing
            folder.mkdir(mode=0o700, exist_ok=True)
            if not folder.is_symlink() and folder.stat().st_uid == user:
                return folder
    raise PermissionError(errno.EACCES, "belongs to somebody else", str(first))


def cache_folder() -> Path:
    """Where what quantmill keeps for this user lies; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home() raises for a user without one
    return Path(home) / "quantmill"


def read_text(path: str | Path) -> str:
    """The content of a file of the kernel, "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
