"""Timings on this CPU, kept by what was timed, so that nothing is timed twice.

A search with a cache that knows all its timings gives the same bytes again.
"""

from __future__ import annotations

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
from quant_core.text import digest_of

NAME_A_TABLE = "Name a table of costs, or a new file"
ROW_START = b'{"cpu": '  # of each line, also of one that was cut short


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
    ever appended, each in one write, so that many processes can share the file. If two
    processes timed the same thing, the first line counts for both, so that a search decides by
    what the next one will find. Lines of other CPUs or other versions of onnxruntime are ignored.

    Only lines that name what is looked for are parsed: a batch of a thousand models writes as many.

    Raises: RequestError if the file cannot be read, holds something else or lies in no folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._costs: dict[str, Cost] = {}
        self._digests: dict[Path, str] = {}
        self._content = b""  # of the file, as far as it has been read
        if self.path is None:
            return
        self._read_on(self.path)
        lines = self._lines()
        if lines and not any(line.startswith(ROW_START) or _parsed(line) for line in lines):
            raise RequestError("holds no costs", str(path), NAME_A_TABLE)
        if not self.path.absolute().parent.is_dir():
            raise RequestError("lies in no folder", str(path), NAME_A_TABLE)

    @property
    def skipped_lines(self) -> int:
        """How many lines of the file are no costs."""
        return sum(_parsed(line) is None for line in self._lines())

    def digest_of(self, path: Path) -> str:
        """The digest of a model's file, for keys; "" if no file holds them, as then they name no
        other. It is read once: a search does not change its original.
        """
        if self.path is None:
            return ""
        if path not in self._digests:
            self._digests[path] = digest_of(path.read_bytes())
        return self._digests[path]

    def of(self, what: str, measure: Callable[[], Timing | Cost]) -> Cost:
        """The cost of `what`; `measure` is called only if it is not known yet.

        Raises: RequestError if the cost cannot be written to the file; whatever `measure` raises.
        """
        if what not in self._costs and self.path is not None:
            self._take_up(what, self.path)  # another process may have timed it meanwhile
        if what not in self._costs:
            timing = measure()
            cost = Cost(timing.float_ms, timing.speedup)
            if self.path is not None:
                _append(self.path, what, cost)
                self._take_up(what, self.path)
            self._costs.setdefault(what, cost)
        return self._costs[what]

    def _take_up(self, what: str, path: Path) -> None:
        """Take up the first cost of this that the file holds for this CPU, if there is one."""
        self._read_on(path)
        name = json.dumps(what).encode()
        if name not in self._content:
            return
        rows = (_parsed(line) for line in self._lines() if name in line)
        here = (cpu_fingerprint(), what)
        found = next((row[2] for row in rows if row is not None and row[:2] == here), None)
        if found is not None:
            self._costs[what] = found

    def _read_on(self, path: Path) -> None:
        """Read what the file holds from the last line on: a crash may have cut that short."""
        last_line = self._content.rfind(b"\n") + 1
        try:
            with path.open("rb") as file:
                file.seek(last_line)
                self._content = self._content[:last_line] + file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RequestError(
                f"cannot be read: {reason_of(error)}", str(path), NAME_A_TABLE
            ) from error

    def _lines(self) -> list[bytes]:
        whole = self._content.replace(b"\0", b"")  # a power cut leaves zeros
        return [line for line in whole.splitlines() if line]


@cache
def cpu_fingerprint() -> str:
    """All that a cost depends on besides the model: CPU, kernels, system, onnxruntime's version."""
    return f"{cpu_name()}, {host_kernels()}, {platform.system()}, onnxruntime {ort.__version__}"


def _parsed(line: bytes) -> tuple[str, str, Cost] | None:
    """The CPU, what was timed on it, and the cost; None if the line does not say that."""
    with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        row = json.loads(line)
        cost = Cost(float(row["float_ms"]), float(row["speedup"]))
        if all(0 < value < math.inf for value in (cost.float_ms, cost.speedup)):
            return row["cpu"], row["what"], cost
    return None


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
