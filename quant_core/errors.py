"""What went wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from quant_core.text import printable

SPACE_HINT = "Is there space, and may you write there?"


class QuantError(Exception):
    """A failure that a person can act on.

    problem  what is wrong
    where    the file, node or key that is wrong
    hint     what to do about it

    All are positional arguments of the exception, so that it survives pickling between processes.
    """

    exit_code = 1

    def __init__(self, problem: str, where: str = "", hint: str = "") -> None:
        super().__init__(problem, where, hint)
        self.problem = problem
        self.where = str(where)
        self.hint = hint

    def __str__(self) -> str:
        """The error on one line, or on as many as the problem has.

        Names from strangers' files cannot steer a terminal.
        """
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.hint})" if self.hint else ""
        lines = f"{place}{self.problem}{advice}".split("\n")
        return "\n".join(printable(line) for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `error_from_dict` reads them."""
        kind = next(c.__name__ for c in type(self).__mro__ if c.__name__ in _KINDS)
        return {"kind": kind, "problem": self.problem, "where": self.where, "hint": self.hint}


class RequestError(QuantError):
    """The request itself is wrong: a key, a value, a combination. Nothing was started."""

    exit_code = 2


class ModelError(QuantError):
    """The model cannot be read, or cannot be quantized as requested."""


class DataError(QuantError):
    """Samples, labels or a metric do not fit the model."""


def nearest_hint(word: str, known: Iterable[str]) -> str:
    """A question for the known name that is nearest to a word; "" if none is near.

    An ending that both have, as files of one kind do, brings them no nearer.
    """
    ending = PurePath(word).suffix
    names = {name.removesuffix(ending): name for name in known}
    near = difflib.get_close_matches(word.removesuffix(ending), names, 1)
    return f"Did you mean {names[near[0]]}?" if near else ""


def reason_of(error: OSError) -> str:
    """What the system says is wrong, beginning in lower case as in the middle of a sentence."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def not_written(error: OSError, where: object, verb: str = "written") -> RequestError:
    """The error for a file that cannot be written."""
    return RequestError(f"cannot be {verb}: {reason_of(error)}", str(where), SPACE_HINT)


class StageReason(StrEnum):
    """Why a stage has no result."""

    FAILED = "failed"  # it raised an exception
    CRASHED = "crashed"  # its process ended by itself
    TIMEOUT = "timeout"  # it took longer than its limit
    MEMORY = "memory"  # it needed more than its limit, or than the host has for anyone
    HOST_MEMORY = "host_memory"  # it held more than was reserved when others needed memory
    KILLED = "killed"  # something outside quantmill killed its process
    BUSY = "busy"  # a file or device was busy
    LOST = "lost"  # the worker or the scheduler that ran it died
    DEADLY = "deadly"  # it was running whenever several workers died

    @property
    def is_transient(self) -> bool:
        """Whether the same stage may pass another time."""
        return self in _TRANSIENT


_TRANSIENT = {
    StageReason.HOST_MEMORY,
    StageReason.KILLED,
    StageReason.BUSY,
    StageReason.LOST,
}


class StageError(QuantError):
    """A stage died: out of time, out of memory, killed or crashed. `reason` says which."""

    def __init__(
        self,
        problem: str,
        where: str = "",
        hint: str = "",
        reason: StageReason = StageReason.FAILED,
    ) -> None:
        super().__init__(problem, where, hint)
        self.args = (problem, where, hint, reason)
        self.reason = StageReason(reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `error_from_dict` reads them."""
        return super().to_dict() | {"reason": str(self.reason)}


def error_from_dict(values: Mapping[str, Any]) -> QuantError:
    """The inverse of `QuantError.to_dict`."""
    arguments = dict(values)
    if "reason" in arguments:
        arguments["reason"] = StageReason(arguments["reason"])
    return _KINDS[arguments.pop("kind")](**arguments)


_KINDS: dict[str, type[QuantError]] = {
    kind.__name__: kind for kind in (QuantError, RequestError, ModelError, DataError, StageError)
}
