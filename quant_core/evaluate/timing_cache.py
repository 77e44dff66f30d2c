"""Timings on this CPU, kept by what was timed, so that nothing is timed twice.

A search with a cache that knows all its timings gives the same bytes again.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnxruntime as ort

from quant_core.errors import RequestError, reason_of
from quant_core.evaluate.timing import Timing
from quant_core.plan.targets import cpu_name, host_kernels

NAME_A_TABLE = "Name a table of costs, or a new file"
ROW_START = '{"cpu": '  # of each line, also of one that was cut short


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds per call in float, and float time / quantized time."""

    float_ms: float
    speedup: float

    @property
    def quantized_ms(self) -> float:
        return self.float_ms / self.speedup


class TimingCache:
    """Costs by what was timed: in memory, and with a path also in a file that others can read.

    The file holds one JSON object per line: {"cpu", "what", "float_ms", "speedup"}. Lines are only
    ever appended, each in one write, so that many processes can share the file. Of two lines for
    one thing the first counts, also for the process that wrote the second: what a search went by
    is what the next one finds. Lines of other CPUs or other versions of onnxruntime are ignored.

    skipped_lines  how many lines of the file are no costs

    Raises: RequestError if the file cannot be read, holds something else or lies in no folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._costs: dict[str, Cost] = {}
        self._last_line = 0  # where it begins in the file
        self.skipped_lines = 0
        if self.path is None:
            return
        self.skipped_lines = self._read_on(self.path)
        if not self.path.absolute().parent.is_dir():
            raise RequestError("lies in no folder", str(path), NAME_A_TABLE)

    def digest_of(self, path: Path) -> str:
        """The digest of a file, for keys; "" if no file holds them, as then they name no other."""
        return digest_of(path.read_bytes()) if self.path is not None else ""

    def of(self, what: str, measure: Callable[[], Timing | Cost]) -> Cost:
        """The cost of `what`; `measure` is called only if it is not known yet.

        Raises: RequestError if the cost cannot be written to the file; whatever `measure` raises.
        """
        if what not in self._costs and self.path is not None:
            self._read_on(self.path)  # another process may have timed it meanwhile
        if what not in self._costs:
            timing = measure()
            cost = Cost(timing.float_ms, timing.speedup)
            if self.path is not None:
                _append(self.path, what, cost)
                self._read_on(self.path)
            self._costs.setdefault(what, cost)
        return self._costs[what]

    def _read_on(self, path: Path) -> int:
        """Takes up the costs of the lines from the last one read on; how many lines are none."""
        costs, skipped_lines, self._last_line = _read(path, self._last_line)
        self._costs = costs | self._costs
        return skipped_lines


def digest_of(content: bytes) -> str:
    """A hex digest of what a key names."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@cache
def cpu_fingerprint() -> str:
    """All that a cost depends on besides the model: CPU, kernels, system, onnxruntime's version."""
    return f"{cpu_name()}, {host_kernels()}, {platform.system()}, onnxruntime {ort.__version__}"


def _read(path: Path, start: int = 0) -> tuple[dict[str, Cost], int, int]:
    """The costs of this CPU from byte `start` on, {} if there is no file; how many lines are none;
    and where the last line begins.

    A line that a crash cut short is passed over.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return {}, 0, 0
    except OSError as error:
        raise RequestError(
            f"cannot be read: {reason_of(error)}", str(path), NAME_A_TABLE
        ) from error
    text = content.decode(errors="replace").replace("\0", "")  # a power cut leaves zeros
    lines = [line for line in text.splitlines() if line]
    costs: dict[str, Cost] = {}
    valid_lines = 0
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            row = json.loads(line)
            cost = Cost(float(row["float_ms"]), float(row["speedup"]))
            if not all(0 < value < math.inf for value in (cost.float_ms, cost.speedup)):
                continue
            if row["cpu"] == cpu_fingerprint():
                costs.setdefault(row["what"], cost)
            valid_lines += 1
    is_table = valid_lines > 0 or any(line.startswith(ROW_START) for line in lines)
    if lines and not is_table and not start:
        raise RequestError("holds no costs", str(path), NAME_A_TABLE)
    return costs, len(lines) - valid_lines, start + content.rfind(b"\n") + 1


def _append(path: Path, what: str, cost: Cost) -> None:
    row = {
        "cpu": cpu_fingerprint(),
        "what": what,
        "float_ms": cost.float_ms,
        "speedup": cost.speedup,
    }
    try:
        with path.open("ab", buffering=0) as file:
            # the newline comes first, because a crash may have left half a line
            file.write(b"\n" + json.dumps(row).encode())
    except OSError as error:
        problem = f"cannot be written: {reason_of(error)}"
        raise RequestError(problem, str(path), "Name a file in another folder") from error
