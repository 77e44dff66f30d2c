"""Whether a candidate keeps its contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quant_core.config import Contract
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.contract import Verdict, judge, score
from quant_core.search.candidate import Bench, Candidate


def value(candidate: Candidate, contract: Contract) -> float:
    """What the contract looks at, and fidelity where that says nothing new."""
    assert candidate.fidelity is not None
    try:
        return score(candidate.fidelity, contract.metric)[0] + 1e-6 * candidate.sqnr_db
    except DataError:  # a metric of the user's own that failed: `verdict` tells
        return candidate.sqnr_db


def keeping(candidates: Iterable[Candidate], contract: Contract, bench: Bench) -> list[Candidate]:
    """Those that keep the contract."""
    return [c for c in candidates if verdict(c, contract, bench)[0] == Verdict.MET]


def is_expected_to_keep(
    candidate: Candidate, contract: Contract, bench: Bench, seen: Sequence[Candidate]
) -> bool:
    """Whether the candidate keeps the contract, by the agreement to be expected of it after all that was seen.

    Which of some near-equal candidates agrees most often with float on a few samples is luck. What differs from float
    is proportional to how far outputs are from float's.
    """
    if contract.metric != "agreement" or contract.min is None:
        return bool(keeping([candidate], contract, bench))
    differing = sum(1 - (c.fidelity.agreement or 0.0) for c in seen if c.fidelity is not None)
    rate = differing / max(sum(c.noise**0.5 for c in seen), 1e-30)
    return bool(1 - rate * candidate.noise**0.5 >= contract.min)


def verdict(candidate: Candidate, contract: Contract, bench: Bench) -> tuple[Verdict, str]:
    """(met or not_met, the reason). Raises: ModelError if the candidate was not judged."""
    if candidate.fidelity is None:
        raise ModelError(f"{candidate.name} was not judged")
    if bench.metric_failure is not None:
        return Verdict.NOT_MET, str(bench.metric_failure)
    ratio = candidate.size_bytes / bench.float_size_bytes
    return judge(candidate.fidelity, contract, speedup=candidate.speedup, size_ratio=ratio)
