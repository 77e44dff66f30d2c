"""Whether this host has memory for one more stage.

Each stage reserves what it will need, and waits until that fits. A reservation is a locked file, so
it ends with its process, however that ends. Memory that is reserved and not yet held counts as
taken, so that stages that start together do not count on the same memory. All batches of a user on
this host share the reservations.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from uuid import uuid4

from quant_core.worker.folders import own_folder
from quant_core.worker.host import read_text

POLL_S = 0.05
KEPT_SHARE = 0.03  # of all memory: never reserved, for the host itself
ASSUMED_BYTES = 8 << 30  # of a host that does not say how much it has
MORE_MEMORY = (
    "Fewer models at once (jobs), a higher limits.memory_mb, or a machine with more memory"
)


@contextlib.contextmanager
def reserve(need_bytes: int, pid: int) -> Iterator[None]:
    """Reserve `need_bytes` for process `pid` while the block runs; wait until they fit.

    The only stage of a host never waits: whether it needs too much shows when it takes the memory.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a host without a folder to write to may run stages too
            while not _try_reserve(need_bytes, pid, stack):
                time.sleep(POLL_S)
        yield


def usable_cores() -> int:
    """Cores that this process may run on, which a container or taskset may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_bytes() -> int:
    """All memory: the machine's, or its container's limit if that is less."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        physical = ASSUMED_BYTES
    limits = [_number(folder / limit) or physical for folder, limit, _ in _control_groups()]
    return min([physical, *limits])


def available_bytes() -> int:
    """Memory that can be taken now without swapping, less what is kept for the host."""
    total = total_bytes()
    available = [_kilobytes("/proc/meminfo").get("MemAvailable", total)]
    for folder, limit, used in _control_groups():
        if allowed := _number(folder / limit):
            reclaimable = _numbers(folder / "memory.stat").get("inactive_file", 0)
            available.append(allowed - _number(folder / used) + reclaimable)
    return min(available) - int(KEPT_SHARE * total)


def held_bytes(pid: int) -> int:
    """Memory that only this process can give back: mapped files do not count."""
    status = _kilobytes(f"/proc/{pid}/status")
    return sum(status.get(key, 0) for key in ("RssAnon", "RssShmem", "VmSwap"))


def peak_bytes(pid: int) -> int:
    """The most that was resident since the peak was last reset."""
    return _kilobytes(f"/proc/{pid}/status").get("VmHWM", 0)


def reset_peak(pid: int) -> None:
    """Let the kernel count the peak anew; where it does not, the peak stays that of the process."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def megabytes(size_bytes: int) -> str:
    """A size for people, such as `1,234 MB`."""
    return f"{size_bytes / 1e6:,.0f} MB"


def _try_reserve(need_bytes: int, pid: int, stack: contextlib.ExitStack) -> bool:
    """Whether the memory fits; if it does, it is reserved until `stack` ends."""
    folder = own_folder()
    with (folder / "gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        others = _reservations(folder)
        missing = max(0, need_bytes - held_bytes(pid))
        if others and missing > available_bytes() - sum(others):
            return False
        path = folder / f"stage-{uuid4().hex}"
        file = stack.enter_context(path.open("w"))
        stack.callback(path.unlink, missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{need_bytes} {pid}")
        file.flush()
    return True


def _reservations(folder: Path) -> list[int]:
    """The bytes that each running stage may still take."""
    found = []
    for path in folder.glob("stage-*"):
        with contextlib.suppress(OSError, ValueError), path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                need, pid = map(int, file.read().split())
                found.append(max(0, need - held_bytes(pid)))
            else:
                path.unlink()  # its process is gone
    return found


@cache
def _control_groups() -> tuple[tuple[Path, str, str], ...]:
    """This process's memory control groups: folder, file of the limit, file of the use."""
    found = []
    root = Path("/sys/fs/cgroup")
    for line in read_text("/proc/self/cgroup").splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds == "":  # version 2
            base, limit, used = root, "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = base / name.lstrip("/")
        folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
        found += [(folder, limit, used) for folder in folders if (folder / limit).exists()]
    return tuple(found)


def _kilobytes(path: str) -> dict[str, int]:
    """Lines such as `VmHWM:  1234 kB`, in bytes."""
    found = {}
    for line in read_text(path).splitlines():
        if line.endswith(" kB"):
            key, _, value = line.partition(":")
            found[key] = int(value.split()[0]) << 10
    return found


def _numbers(path: Path) -> dict[str, int]:
    """Lines such as `inactive_file 1234`."""
    lines = [line.split() for line in read_text(path).splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) == 2}


def _number(path: Path) -> int:
    """The number in a file; 0 if there is none, as in `max`, which means no limit."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else 0
