"""What got worse in one model since the run before, beyond what measurements vary by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Shares of the earlier value. A quarter of all timings on a shared host vary by some per cent; the
# accuracy is of the same samples, where one decision of a hundred may turn with the rounding.
SLOWER = 0.10
LESS_ACCURATE = 0.01
LARGER = 0.01


def regressions(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """One phrase for each thing that got worse; nothing for the first run of a model."""
    if before is None:
        return []
    if row["outcome"] == "failed":
        return ["succeeded before"]
    found = []
    if before["verdict"] == "met" and row["verdict"] == "not_met":
        found.append("met its contract before")
    if row.get("metric") == before.get("metric") and _fell(row, before, "accuracy", LESS_ACCURATE):
        found.append("less accurate than before")
    is_quiet = not row.get("busy") and not before.get("busy")
    if is_quiet and _fell(row, before, "speedup", SLOWER):
        found.append("slower than before")
    if _fell(before, row, "size_bytes", LARGER):
        found.append("larger than before")
    return found


def _fell(now: Mapping[str, Any], before: Mapping[str, Any], column: str, share: float) -> bool:
    """Whether the value now is lower than before by more than this share of it."""
    value, earlier = now.get(column), before.get(column)
    if value is None or earlier is None:
        return False
    return bool(value < earlier - share * abs(earlier))
