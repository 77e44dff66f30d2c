"""What was timed on this CPU, by what it was: it is not timed twice, and can be decided by again."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnxruntime as ort

from quant_core.errors import RequestError
from quant_core.evaluate.timing import Timing
from quant_core.plan.targets import cpu_name, host_target_name


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of one call in float, and how many times as fast it is quantized."""

    float_ms: float
    speedup: float

    @property
    def quantized_ms(self) -> float:
        return self.float_ms / self.speedup


class Costs:
    """A table of costs: in memory, or with a path also in that file, for whoever reads it next.

    The file has one JSON object a line, {"cpu", "what", "float_ms", "speedup"}. Lines are only ever added, each in one
    write, so that many processes can share the file; of two lines for one thing the first counts. Lines of other CPUs,
    or of another onnxruntime, are left alone.

    Raises: RequestError if the file cannot be read, or holds something else.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._known = {} if self.path is None else _read(self.path)
        if self.path is not None and not self.path.absolute().parent.is_dir():
            raise RequestError(
                "lies in no folder", str(path), "Name a table of costs, or a new file"
            )

    def of(self, what: str, measure: Callable[[], Timing]) -> Cost:
        """What is known of it, else what `measure` finds. Raises: RequestError if that cannot be kept."""
        if what not in self._known:
            timing = measure()
            self._known[what] = Cost(timing.float_ms, timing.speedup)
            if self.path is not None:
                _add(self.path, what, self._known[what])
        return self._known[what]


@cache
def this_cpu() -> str:
    """What costs depend on: the CPU, what kernels are chosen by, and onnxruntime's version."""
    return f"{cpu_name()}, {host_target_name()}, {platform.system()}, onnxruntime {ort.__version__}"


def _read(path: Path) -> dict[str, Cost]:
    """This CPU's costs. A line that a crash cut short is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"cannot be read: {error}", str(path), "Name a table of costs, or a new file"
        ) from error
    known: dict[str, Cost] = {}
    rows = 0
    for line in filter(None, lines):
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            cost = Cost(float(row["float_ms"]), float(row["speedup"]))
            rows += 1
            if row["cpu"] == this_cpu() and min(cost.float_ms, cost.speedup) > 0:
                known.setdefault(row["what"], cost)
    if lines and not rows:
        raise RequestError("holds no costs", str(path), "Name a table of costs, or a new file")
    return known


def _add(path: Path, what: str, cost: Cost) -> None:
    row = {"cpu": this_cpu(), "what": what, "float_ms": cost.float_ms, "speedup": cost.speedup}
    try:
        with path.open("ab", buffering=0) as file:
            file.write(
                b"\n" + json.dumps(row).encode()
            )  # behind whatever a crash left of the line before
    except OSError as error:
        raise RequestError(
            f"cannot be written: {error.strerror}", str(path), "Name a file in another folder"
        ) from error
