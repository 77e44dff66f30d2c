"""Whether a quantized model satisfies its contract, with the reason in one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from quant_core.config import Contract
from quant_core.errors import DataError
from quant_core.metrics import Fidelity, find_metric

TOLERANCE = 1e-9  # 0.985 - 0.975 is a little more than 0.01 in binary


class Verdict(StrEnum):
    """The result of judging a contract; NONE where there is no contract."""

    MET = "met"
    NOT_MET = "not_met"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Ruling:
    """The verdict on a contract, and the clauses that decide it."""

    verdict: Verdict
    reason: str


NO_CONTRACT = Ruling(Verdict.NONE, "no contract")


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause of a contract: whether it holds, and the measured value beside its bound."""

    holds: bool
    text: str


def judge(
    fidelity: Fidelity,
    contract: Contract | None,
    *,
    speedup: float | None = None,
    size_ratio: float | None = None,
) -> Ruling:
    """The ruling on the whole contract; speed-up and size are judged only where they are given.

    Raises: DataError if the contract's metric was not measured.
    """
    if contract is None:
        return NO_CONTRACT
    gain = gain_clauses(contract, speedup=speedup, size_ratio=size_ratio)
    return conclude([*accuracy_clauses(fidelity, contract), *gain])


def accuracy_clauses(fidelity: Fidelity, contract: Contract) -> list[Clause]:
    """The clauses on accuracy, after one clause that fails for each unusable output.

    Raises: DataError if the contract's metric was not measured.
    """
    value, of_float = score(fidelity, contract.metric)
    clauses = [Clause(False, flaw) for flaw in fidelity.flaws]
    if contract.max_drop is not None and of_float is not None:
        drop = of_float - value
        change = f"{contract.metric} {of_float:.4f} to {value:.4f}"
        text = f"{change}: drop {drop:.4f}, at most {contract.max_drop:g}"
        clauses.append(Clause(drop <= contract.max_drop + TOLERANCE, text))
    if contract.min is not None:
        least = contract.min - TOLERANCE
        text = f"{contract.metric} {value:.4f}, at least {contract.min:g}"
        if value < least and float_misses(fidelity, contract):
            text += f", which float misses too: {of_float:.4f}"
        clauses.append(Clause(value >= least, text))
    return clauses


def float_misses(fidelity: Fidelity, contract: Contract) -> bool:
    """Whether float itself is below the least value of the contract's metric.

    Raises: DataError if the metric was not measured.
    """
    _, of_float = score(fidelity, contract.metric)
    if contract.min is None or of_float is None:
        return False
    return of_float < contract.min - TOLERANCE


def gain_clauses(
    contract: Contract, *, speedup: float | None, size_ratio: float | None
) -> list[Clause]:
    """The clauses on speed-up and size, without those whose value is not known.

    speedup     float latency / quantized latency
    size_ratio  quantized bytes / float bytes
    """
    clauses = []
    if contract.min_speedup is not None and speedup is not None:
        text = f"speedup {speedup:.2f}, at least {contract.min_speedup:g}"
        clauses.append(Clause(speedup >= contract.min_speedup, text))
    if contract.max_size_ratio is not None and size_ratio is not None:
        text = f"size {size_ratio:.3f}, at most {contract.max_size_ratio:g}"
        clauses.append(Clause(size_ratio <= contract.max_size_ratio, text))
    return clauses


def conclude(clauses: Iterable[Clause]) -> Ruling:
    """Met if all clauses hold. The reason lists those that fail, or if none fails all of them."""
    clauses = list(clauses)
    failed = [clause.text for clause in clauses if not clause.holds]
    if failed:
        return Ruling(Verdict.NOT_MET, "; ".join(failed))
    return Ruling(Verdict.MET, "; ".join(clause.text for clause in clauses))


def score(fidelity: Fidelity, metric_name: str) -> tuple[float, float | None]:
    """Value of the metric, and the float model's own value if that means something.

    Raises: DataError if the metric was not measured.
    """
    metric = find_metric(metric_name)
    value = metric.value(fidelity)
    if value is None:
        raise DataError("was not measured", metric_name, metric.missing)
    of_float = metric.of_float(fidelity) if metric.of_float is not None else None
    return value, of_float
