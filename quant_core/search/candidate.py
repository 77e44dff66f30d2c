"""What one plan is worth: how faithful and fast its model is, and whether it meets a contract."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from quant_core.config import Contract
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.contract import NO_CONTRACT, TOLERANCE, Ruling, Verdict, judge, score
from quant_core.evaluate.timing_cache import Cost
from quant_core.metrics import MAX_SQNR_DB, Fidelity, find_metric
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import QuantPlan
from quant_core.rewrite.apply import Quantized
from quant_core.search.policy import POLICY
from quant_core.search.trace import TrialRow


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One plan, the model it makes, and what that model is worth.

    label           for people; nothing depends on it
    size_ratio      file size over the float model's; like all below, None until it is judged
    cost            None if it cannot be timed on this CPU
    metric_failure  of the user's own metric; fidelity is then measured without it
    seconds         that it took to build it and to judge it, but for rounding weights: the next
                    candidates have them
    """

    label: str
    plan: QuantPlan
    quantized: Quantized
    size_bytes: int
    size_ratio: float | None = None
    fidelity: Fidelity | None = None
    cost: Cost | None = None
    metric_failure: DataError | None = None
    seconds: float = 0.0

    @property
    def model(self) -> ir.Model:
        """The quantized model."""
        return self.quantized.model

    @property
    def speedup(self) -> float | None:
        """Float time over quantized time; None if it cannot be timed."""
        return self.cost.speedup if self.cost is not None else None

    @property
    def sqnr_db(self) -> float:
        """SQNR of the worst output in dB; MAX_SQNR_DB if no output can be compared."""
        if self.fidelity is None:
            return MAX_SQNR_DB
        of_outputs = (o.sqnr_db for o in self.fidelity.per_output if o.sqnr_db is not None)
        return min(of_outputs, default=MAX_SQNR_DB)

    @property
    def is_sound(self) -> bool:
        """Whether no output is broken, as far as it was measured: see `QuantConfig.floor`."""
        return self.is_above(self.plan.config.floor)

    @property
    def aim(self) -> Contract:
        """What a search without a contract aims at: POLICY.noted_db, also for other samples.

        Only the floor where the user sets one, or where weights have 4 bits.
        """
        config = self.plan.config
        is_free = config.floor_db is None and not self.plan.in_four_bits
        return Contract("worst_lower_sqnr", min=POLICY.noted_db) if is_free else config.floor

    @property
    def reaches_aim(self) -> bool:
        """Whether it is above the aim at a real gain of speed."""
        return self.gain >= POLICY.real_gain and self.is_above(self.aim)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """What candidates are compared by without a contract, in this order:

        1. Sound.
        2. The grade. 2: above the aim, and fast. 1: above the aim, and no slower than float; or
           fast, and above the aim on these samples, but not with the confidence for others.
        3. Worth, with a price on bytes: weights in 16 bits, which give accuracy back, double a
           file.
        """
        is_fast = self.gain >= POLICY.real_gain
        if self.is_above(self.aim):
            grade = is_fast + self.keeps_speed
        else:
            grade = int(is_fast and self.is_above(replace(self.aim, metric="worst_sqnr")))
        bytes_price = POLICY.doublings_per_half_size * math.log2(self.size_bytes)
        return self.is_sound, grade, self.worth - bytes_price

    def is_above(self, floor: Contract) -> bool:
        """Whether no output is below this floor, as far as it can be judged: not where the number
        of results differs.
        """
        if self.fidelity is None:
            return True
        judged = tuple(o for o in self.fidelity.per_output if not o.is_reshaped)
        if any(o.flaw for o in judged):
            return False
        worst = find_metric(floor.metric).value(replace(self.fidelity, per_output=judged))
        return worst is None or worst >= (floor.min or 0.0) - TOLERANCE

    @property
    def noise(self) -> float:
        """Power of the noise over that of the signal, of the worst output."""
        return float(10 ** (-self.sqnr_db / 10))

    @property
    def worth(self) -> float:
        """Speed gained, in doublings, less what the lost fidelity would have to buy.

        By the default policy outputs 10 dB below `faithful_db` must buy a speed-up of 1.5, those
        20 dB below of 5. What a model is slower than its float original counts many times. That
        grows from nothing, so that the noise of a race alone never decides against a faithful one.
        """
        slower = max(0.0, -POLICY.clock_noise - self.gain)
        return self.gain - self._lost_fidelity - POLICY.slower_than_float * slower

    @property
    def _lost_fidelity(self) -> float:
        """What the lost fidelity would have to buy, in doublings of speed."""
        missing = max(0.0, POLICY.faithful_db - self.sqnr_db) / 10
        return POLICY.doublings_per_10_db * missing**2

    @property
    def is_faithful(self) -> bool:
        """Whether one nearer to float, and as fast, is worth no more, as far as a race can tell."""
        return self._lost_fidelity <= POLICY.clock_noise

    @property
    def gain(self) -> float:
        """Speed gained over float, in doublings."""
        speedup = self._expected_speedup() if self.speedup is None else self.speedup
        return math.log2(max(speedup, 1e-3))

    @property
    def keeps_speed(self) -> bool:
        """Whether it is no slower than float, as far as a race can tell."""
        return self.gain >= -POLICY.clock_noise

    def _expected_speedup(self) -> float:
        """The speed-up by the target's own times, where nothing can be timed."""
        weighted = self.plan.weighted
        times = TARGETS[self.plan.target].times
        taken = sum(n.elements * times.get(n.compute, 1.0) for n in weighted)
        total = sum(n.elements for n in weighted)
        return total / taken if taken else 1.0

    def row(self) -> TrialRow:
        """The candidate as a row of the trace."""
        assert self.fidelity is not None
        return {
            "candidate": self.label,
            "speedup": self.speedup,
            "sqnr_db": self.sqnr_db,
            "agreement": self.fidelity.agreement,
            "size_bytes": self.size_bytes,
        }


def ruling(candidate: Candidate, contract: Contract | None) -> Ruling:
    """The ruling on the candidate, as measured. Raises: ModelError if it was not judged."""
    if contract is None:
        return NO_CONTRACT
    if candidate.fidelity is None:
        raise ModelError(f"{candidate.label} was not judged")
    if candidate.metric_failure is not None:
        return Ruling(Verdict.NOT_MET, str(candidate.metric_failure))
    return judge(
        candidate.fidelity,
        contract,
        speedup=candidate.speedup,
        size_ratio=candidate.size_ratio,
    )


def satisfies(candidate: Candidate, contract: Contract) -> bool:
    """Whether the candidate, as measured, satisfies the contract."""
    return ruling(candidate, contract).verdict is Verdict.MET


def satisfying(candidates: Iterable[Candidate], contract: Contract) -> list[Candidate]:
    """The candidates that satisfy the contract, in their order."""
    return [c for c in candidates if satisfies(c, contract)]


def is_expected_to_satisfy(
    candidate: Candidate, contract: Contract, seen: Sequence[Candidate]
) -> bool:
    """Whether the candidate satisfies the contract by the agreement that is to be expected of it.

    Which of some near-equal candidates agrees most often with float on a few samples is luck. The
    share of decisions that differ is proportional to the amplitude of the noise, so one rate is
    estimated from all candidates in `seen`.
    """
    if contract.metric != "agreement" or contract.min is None:
        return satisfies(candidate, contract)
    differing = sum(1 - (c.fidelity.agreement or 0.0) for c in seen if c.fidelity is not None)
    rate = differing / max(sum(c.noise**0.5 for c in seen), 1e-30)
    return bool(1 - rate * candidate.noise**0.5 >= contract.min)


def contract_value(candidate: Candidate, contract: Contract) -> float:
    """The value of the contract's metric; of equal values that with the higher SQNR is larger."""
    assert candidate.fidelity is not None
    try:
        return score(candidate.fidelity, contract.metric)[0] + 1e-6 * candidate.sqnr_db
    except DataError:  # the user's own metric failed: `verdict` gives the reason
        return candidate.sqnr_db
