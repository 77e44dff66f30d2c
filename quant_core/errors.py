"""What went wrong, where, and what to do about it."""

from __future__ import annotations

from quant_core.text import printable


class QuantError(Exception):
    """A failure that a person can act on.

    `problem` says what is wrong, `where` names the file, node or key, `hint` says what to do.
    All three are positional arguments of the exception, so it survives pickling between processes.
    """

    exit_code = 1

    def __init__(self, problem: str, where: str = "", hint: str = "") -> None:
        super().__init__(problem, where, hint)
        self.problem, self.where, self.hint = problem, str(where), hint

    def __str__(self) -> str:
        """On one line, or on as many as the problem has: names from strangers' files cannot steer a terminal."""
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.hint})" if self.hint else ""
        return "\n".join(map(printable, f"{place}{self.problem}{advice}".split("\n")))


class RequestError(QuantError):
    """The request itself is wrong: a key, a value, a combination. Nothing was started."""

    exit_code = 2


class ModelError(QuantError):
    """The model cannot be read, or cannot be what was asked of it."""


class DataError(QuantError):
    """Samples, labels or a metric do not fit the model."""


class StageError(QuantError):
    """A stage died: out of time, out of memory, or killed by a signal."""
