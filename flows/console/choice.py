"""Why the plan that was written was chosen among those that were tried, in words."""

from __future__ import annotations

from collections.abc import Sequence

from quant_core.search.policy import POLICY
from quant_core.search.trace import MeasuredRow, TrialRow, is_measured

EQUAL_SHARE = 1 - POLICY.equal_speed  # speeds that differ by less are equal, but for noise
EQUAL_DB = 0.5  # plans whose SQNR differs by less are as near to float


def chosen_trial(trace: Sequence[TrialRow], chosen: str | None) -> TrialRow | None:
    """The trial that was written: the last one of that name; None if it is not in the trace."""
    return next((trial for trial in reversed(trace) if trial["candidate"] == chosen), None)


def lead(trace: Sequence[TrialRow], chosen: str | None) -> float | None:
    """How much faster the chosen plan is than the fastest other, as a share; negative if slower.

    None without another plan that was timed. What was made of the chosen plan later has its speed
    and is no other.
    """
    written, rival = _written_and_rival(trace, chosen)
    return None if written is None or rival is None else written["speedup"] / rival["speedup"] - 1


def why_chosen(trace: Sequence[TrialRow], chosen: str | None, verdict: str) -> str:
    """Why it was written, in a sentence without its name; empty if the search does not say."""
    if chosen_trial(trace, chosen) is None:
        return ""
    written, rival = _written_and_rival(trace, chosen)
    if written is None or rival is None:
        reason = _without_a_rival(trace, written)
    else:
        reason = _beside(written, rival, len(trace))
    return f"{reason}; none of them keeps the contract" if verdict == "not_met" else reason


def _written_and_rival(
    trace: Sequence[TrialRow], chosen: str | None
) -> tuple[MeasuredRow | None, MeasuredRow | None]:
    """The chosen plan and the fastest other one, as far as they were measured."""
    written = chosen_trial(trace, chosen)
    if written is None or not is_measured(written):
        return None, None
    others = [t for t in trace if is_measured(t) and t["speedup"] != written["speedup"]]
    return written, max(others, key=lambda trial: trial["speedup"], default=None)


def _without_a_rival(trace: Sequence[TrialRow], written: MeasuredRow | None) -> str:
    """Why no other plan was timed: there is none, or all run the same kernels."""
    if len(trace) < 2:
        return "no other plan was tried"
    others = [t for t in trace if t is not written and is_measured(t)]
    if written is None or not others:
        return "no other plan was timed"
    nearest = max(others, key=lambda trial: trial["sqnr_db"])
    nearer_db = nearest["sqnr_db"] - written["sqnr_db"]
    by = f"{nearer_db:.1f} dB" if nearer_db > EQUAL_DB else "no"
    return f"{_quoted(nearest)} runs the same kernels, and is {by} nearer to float"


def _beside(written: MeasuredRow, rival: MeasuredRow, tried: int) -> str:
    """How the chosen plan stands beside the fastest other."""
    share = written["speedup"] / rival["speedup"] - 1
    faster = f"{rival['speedup'] / written['speedup'] - 1:.0%}"
    nearer_db = written["sqnr_db"] - rival["sqnr_db"]
    name = _quoted(rival)
    if share > EQUAL_SHARE:
        return f"fastest of {tried} plans, {share:.0%} ahead of {name}"
    if share < -EQUAL_SHARE and nearer_db > EQUAL_DB:
        return f"{name} is {faster} faster, but {nearer_db:.1f} dB further from float"
    if share < -EQUAL_SHARE:
        return f"{name} is {faster} faster, but misses the contract or the floor"
    if nearer_db > EQUAL_DB:
        return f"as fast as {name}, and {nearer_db:.1f} dB nearer to float"
    return f"as good as {name}, the next of {tried} plans"


def _quoted(trial: MeasuredRow) -> str:
    """The name of a plan in a sentence; one with a comma would end the clause."""
    name = str(trial["candidate"])
    return f'"{name}"' if "," in name else name
