"""What tests ask about processes, and how they wait for what other processes do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

LONGEST_WAIT_S = 600  # what has not happened by then, even on a busy machine, never will


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process runs: a zombie, whose parent has not waited for it yet, does not."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return after_name.split()[0] != "Z"


def descendants(pid: int) -> set[int]:
    """The processes below that one."""
    command = ["ps", "-eo", "pid=,ppid="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    below = {pid}
    while found := {child for child, parent in parents.items() if parent in below} - below:
        below |= found
    return below - {pid}


def command_line(pid: int) -> str:
    """Empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
