"""Which stage of a model failed, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quant_core.errors import QuantError


@dataclass(frozen=True, slots=True)
class Failure:
    """The stage at which a model failed, and why."""

    stage: str
    problem: QuantError

    def columns(self) -> dict[str, Any]:
        """The columns of a report that tell it."""
        problem = self.problem
        return {
            "stage": self.stage,
            "error": problem.problem,
            "where": problem.where,
            "hint": problem.hint,
        }
