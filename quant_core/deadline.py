"""The time budget of the work on one model, and how its progress is reported.

A stage looks at the deadline before each thing that it can leave out; nothing is interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Is called with what is being done from now on, and the seconds that it takes if known."""

    def __call__(self, doing: str, seconds: float | None = None, /) -> None: ...


def silent(doing: str, seconds: float | None = None, /) -> None:
    """The progress of work that nobody watches."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A time budget that runs; both times are of time.monotonic()."""

    began_at: float
    ends_at: float

    @classmethod
    def after(cls, seconds: float, spent_s: float = 0.0) -> Deadline:
        """The deadline of a budget of `seconds`, of which `spent_s` are gone by now."""
        began_at = time.monotonic() - spent_s
        return cls(began_at, began_at + seconds)

    @property
    def seconds_left(self) -> float:
        """At least 0."""
        return max(0.0, self.ends_at - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return not self.seconds_left

    def allows(self, seconds: float) -> bool:
        """Whether what takes so long would end in time."""
        return self.seconds_left > seconds

    def is_past(self, share: float) -> bool:
        """Whether this share of the budget is gone."""
        return time.monotonic() > self.began_at + share * (self.ends_at - self.began_at)

    def of_stage(self, share: float) -> Deadline:
        """The deadline of a stage that may take this share of the time left."""
        now = time.monotonic()
        return Deadline(now, now + share * self.seconds_left)

    def overtime(self, share: float) -> Deadline:
        """A deadline from now on, with this share of the whole budget, even if that is used up."""
        now = time.monotonic()
        return Deadline(now, now + share * (self.ends_at - self.began_at))

    def at_most(self, seconds: float) -> Deadline:
        """A deadline from now on: `seconds`, and never beyond this one."""
        now = time.monotonic()
        return Deadline(now, min(self.ends_at, now + seconds))

    def limit(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until one more that takes as long as the last would end too late.

        The first item always comes. How long it takes does not count, as it opens sessions.
        """
        began_at = None
        for item in items:
            yield item
            ended_at = time.monotonic()
            if not self.allows(ended_at - (began_at or ended_at)):
                break
            began_at = ended_at


NO_DEADLINE = Deadline(0.0, math.inf)
