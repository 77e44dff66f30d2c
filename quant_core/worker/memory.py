"""Whether this host has memory for one more stage: each says what it will need, and waits until that fits.

A promise is a locked file, so it ends with its process, however that ends. What is promised and not yet taken counts as
taken: stages that start together do not count on the same memory. All batches of a user on this host keep to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from uuid import uuid4

POLL_S = 0.05
KEPT_SHARE = 0.03  # of all memory: never promised, for the host itself
ASSUMED_BYTES = 8 << 30  # of a host that does not tell


@contextlib.contextmanager
def promised(need_bytes: int, pid: int) -> Iterator[None]:
    """Wait until `need_bytes` fit; meanwhile they are kept for process `pid`.

    What is alone need not wait: whether it is too much for this host shows when it is taken.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(
            OSError
        ):  # a host where nothing can be written is no reason to stop
            while not _granted(need_bytes, pid, stack):
                time.sleep(POLL_S)
        yield


def total_bytes() -> int:
    """All memory: the machine's, or its container's limit where that is less."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        physical = ASSUMED_BYTES
    return min([physical, *(_number(folder / limit) or physical for folder, limit, _ in _groups())])


def available_bytes() -> int:
    """Memory that can be had now without swapping, less what is kept for the host."""
    total = total_bytes()
    free = [_kilobytes("/proc/meminfo").get("MemAvailable", total)]
    for folder, limit, used in _groups():
        if allowed := _number(folder / limit):
            free.append(
                allowed
                - _number(folder / used)
                + _numbers(folder / "memory.stat").get("inactive_file", 0)
            )
    return min(free) - int(KEPT_SHARE * total)


def held_bytes(pid: int) -> int:
    """Memory that only this process can give back: mapped files do not count."""
    status = _kilobytes(f"/proc/{pid}/status")
    return sum(status.get(key, 0) for key in ("RssAnon", "RssShmem", "VmSwap"))


def peak_bytes(pid: int) -> int:
    """The most that was resident since that was last reset."""
    return _kilobytes(f"/proc/{pid}/status").get("VmHWM", 0)


def _granted(need_bytes: int, pid: int, stack: contextlib.ExitStack) -> bool:
    """Whether there is room; then the promise stands until `stack` ends."""
    folder = _folder()
    with (folder / "gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        others = _promises(folder)
        wanted = max(0, need_bytes - held_bytes(pid))
        if others and wanted > available_bytes() - sum(others):
            return False
        path = folder / f"stage-{uuid4().hex}"
        file = stack.enter_context(path.open("w"))
        stack.callback(path.unlink, missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{need_bytes} {pid}")
        file.flush()
    return True


def _promises(folder: Path) -> list[int]:
    """What each stage at work may still take."""
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


def _folder() -> Path:
    """A folder of this user's own. Raises: OSError if somebody else has made it."""
    folder = Path(tempfile.gettempdir()) / f"quantmill-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is not ours")
    return folder


@cache
def _groups() -> tuple[tuple[Path, str, str], ...]:
    """This process's memory control groups: folder, and the files that say what is allowed and what is used."""
    found = []
    root = Path("/sys/fs/cgroup")
    for line in _read("/proc/self/cgroup").splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds == "":
            base, files = root, ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = base / name.lstrip("/")
        found += [(folder, *files) for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return tuple(
        (folder, limit, used) for folder, limit, used in found if (folder / limit).exists()
    )


def _kilobytes(path: str) -> dict[str, int]:
    """Lines such as `VmHWM:  1234 kB`, in bytes."""
    lines = (line.partition(":") for line in _read(path).splitlines() if line.endswith(" kB"))
    return {key: int(value.split()[0]) << 10 for key, _, value in lines}


def _numbers(path: Path) -> dict[str, int]:
    lines = (line.split() for line in _read(str(path)).splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) == 2}


def _number(path: Path) -> int:
    """0 where there is none: `max` means no limit."""
    text = _read(str(path)).strip()
    return int(text) if text.isdigit() else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
