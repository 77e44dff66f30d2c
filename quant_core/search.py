"""Which of several plans is best: a bounded loop over plan, rewrite and compare that always ends in a model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.fidelity import Fidelity, compare, judge, run_all, score
from quant_core.observe import Statistics
from quant_core.outliers import Easing, easings
from quant_core.plan import DYNAMIC, FLOAT, STATIC, QuantPlan, make_plan
from quant_core.rewrite import apply_plan
from quant_core.rules import RULES
from quant_core.samples import Samples
from quant_core.session import open_session
from quant_core.targets import TARGETS
from quant_core.timing import Timing, measure

MAX_EVALUATIONS = 40
MAX_SEARCH_FEEDS = 64
AS_FAST = 0.97  # paired medians within 3 % are noise
POLISH_GROUPS, POLISH_FEEDS = 12, 16
RARE = 0.1  # below this share of the weighted nodes, those that could be dynamic are not worth variants of their own
LAST_RESORTS = ("dynamic, convolutions in float", "weight-only")
GOOD_ENOUGH = 0.2  # doublings of net worth at which last resorts, worth about 0, need not be tried
FAITHFUL_DB = 30.0  # outputs this close to float's are as good as equal


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One plan, the model it makes, and what that model is worth."""

    name: str
    plan: QuantPlan
    model: ir.Model
    size_bytes: int
    fidelity: Fidelity | None = None
    speedup: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Of the worst output, 200 where there is nothing to compare."""
        if self.fidelity is None:
            return 200.0
        return min((o.sqnr_db for o in self.fidelity.per_output if o.sqnr_db is not None), default=200.0)

    @property
    def noise(self) -> float:
        """Noise over signal of the worst output."""
        return float(10 ** (-self.sqnr_db / 10))

    @property
    def worth(self) -> float:
        """Speed gained, in doublings, less what the lost fidelity would have to buy.

        Outputs 10 dB below FAITHFUL_DB must buy a speed-up of 1.5, 20 dB below of 5; a model slower than its float
        original is worth less than any that is not.
        """
        missing = max(0.0, FAITHFUL_DB - self.sqnr_db) / 10
        speed = self._expected_speedup() if self.speedup is None else self.speedup
        slow = 0.0 if speed >= AS_FAST else 10.0
        return math.log2(max(speed, 1e-3)) - 0.6 * missing**2 - slow

    def _expected_speedup(self) -> float:
        """For a CPU of another kind, where nothing can be timed: integers take half of float's time."""
        weighted = [n for n in self.plan.nodes if n.weights]
        integer = sum(n.elements for n in weighted if n.compute != FLOAT)
        return 1 / (1 - 0.5 * integer / max(1, sum(n.elements for n in weighted)))

    def trace(self) -> dict[str, Any]:
        """One row of what was tried."""
        assert self.fidelity is not None
        return {"candidate": self.name, "speedup": self.speedup, "sqnr_db": self.sqnr_db,
                "agreement": self.fidelity.agreement, "size_bytes": self.size_bytes}  # fmt: skip


@dataclass(slots=True)
class Bench:
    """The float model's answers and a session to race against: what every candidate is held to."""

    float_path: Path
    samples: Samples
    float_size_bytes: int
    metric: str | None = None
    seconds: float = 0.1
    is_host: bool = True  # models are for CPUs like this one, so that their speed can be measured here
    _session: Any = field(init=False)
    _reference: list[list[NDArray[Any]]] = field(init=False)

    def __post_init__(self) -> None:
        if self.samples.labels is None:
            self.samples = self.samples.spread(MAX_SEARCH_FEEDS)
        self._session = open_session(self.float_path)
        self._reference = run_all(self._session, self.samples)

    def judge(self, candidate: Candidate, *, timed: bool = True) -> Candidate:
        """The candidate with its fidelity and, if timed, its speed-up."""
        session = open_session(ir.to_proto(candidate.model).SerializeToString())
        names = [o.name for o in session.get_outputs()]
        outputs = run_all(session, self.samples)
        fidelity = compare(self._reference, outputs, names, self.samples.labels, self.metric)
        timing: Timing | None = None
        if timed and self.is_host:
            timing = measure(self._session, session, self.samples[0], seconds=self.seconds, clock=time.thread_time)
        return replace(candidate, fidelity=fidelity, speedup=timing.speedup if timing else candidate.speedup)


@dataclass(frozen=True, slots=True)
class Found:
    """The best candidate, whether it keeps the contract, and all that was tried."""

    best: Candidate
    verdict: str  # met, not_met, none
    reason: str
    trace: list[dict[str, Any]]


def search(
    model: ir.Model,
    plan: QuantPlan,
    stats: Statistics | None,
    bench: Bench | None,
    contract: Contract | None = None,
    *,
    exact: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """The best model that can be made of a prepared one.

    1. `mode: auto` races the ways in which weighted nodes can compute; any other mode is one way.
    2. Without a contract the candidate of most worth wins: speed, less what lost fidelity must buy.
    3. With one, the candidate of most worth that keeps it wins. If none does, nodes that hurt most are restored to
       float, most harmful first, half as many or twice as many at a time, until it holds or MAX_EVALUATIONS are spent;
       the best file found is returned all the same, with verdict `not_met`.

    Without a bench (no samples), or if the plan is to be done exactly, nothing is measured and the plan is applied.
    """
    trace: list[dict[str, Any]] = []
    if exact or bench is None:
        best = build(model, plan, stats, "the plan")
        if bench is None or contract is None:
            return Found(best, "none", "no contract", trace)
        best = bench.judge(best)
        return Found(best, *_verdict(best, contract, bench), [best.trace()])
    candidates: list[Candidate] = []

    def eased() -> Mapping[str, Easing]:
        dynamic = [
            n.node for n in plan.nodes if n.compute != FLOAT and RULES[n.op_type].dynamic and n.op_type != "LSTM"
        ]
        if stats is None or not candidates or candidates[-1].sqnr_db > FAITHFUL_DB:
            return {}
        progress("measuring what easing outliers gains")
        return easings(model, dynamic, stats.means, bench.samples)

    refused = ModelError("there is no way to compute this model")
    for name, variant in variants(model, plan, eased):
        if name in LAST_RESORTS and candidates and max(c.worth for c in candidates) > GOOD_ENOUGH:
            continue
        progress(f"trying {name}")
        try:
            candidates.append(bench.judge(build(model, variant, stats, name)))
        except ModelError as error:  # one way that does not load is no reason to give up the others
            refused = error
            trace.append({"candidate": name, "error": str(error)})
        else:
            trace.append(candidates[-1].trace())
    if not candidates:
        raise refused
    best = max(candidates, key=lambda c: c.worth)
    if contract is None and best.sqnr_db < FAITHFUL_DB:
        best = _polish(model, best, stats, bench, trace, progress)
    if contract is None:
        return Found(best, "none", "no contract", trace)
    met = [c for c in candidates if _verdict(c, contract, bench)[0] == "met"]
    best = max(met, key=lambda c: c.worth) if met else _restore(model, best, stats, bench, contract, trace, progress)
    return Found(best, *_verdict(best, contract, bench), trace)


def build(model: ir.Model, plan: QuantPlan, stats: Statistics | None, name: str) -> Candidate:
    """The candidate that a plan makes, not yet judged."""
    made = apply_plan(model, plan, stats)
    return Candidate(name, plan, made, len(ir.to_proto(made).SerializeToString()))


def variants(
    model: ir.Model, plan: QuantPlan, eased: Callable[[], Mapping[str, Easing]]
) -> Iterator[tuple[str, QuantPlan]]:
    """The ways in which the plan's weighted nodes can compute, without repetition.

    `eased` is asked, when its turn comes, how the outliers of which tensors are worth easing.
    """
    if plan.config.mode != "auto":
        yield plan.config.mode, plan
        return
    ways: dict[str, Callable[[str], str]] = {
        "static": lambda _: STATIC,
        "dynamic": lambda op: DYNAMIC if RULES[op].dynamic else STATIC,
        "dynamic, eased": lambda op: DYNAMIC if RULES[op].dynamic else STATIC,
        "dynamic, convolutions in float": lambda op: DYNAMIC if RULES[op].dynamic else FLOAT,
        "weight-only": lambda _: FLOAT,
    }
    weighted = [n for n in plan.nodes if n.weights]
    if sum(RULES[n.op_type].dynamic for n in weighted) < RARE * len(weighted):
        ways = {name: way for name, way in ways.items() if not name.startswith("dynamic")}
    seen: list[Any] = []
    for name, way in ways.items():
        wanted = {n.node: DYNAMIC if n.op_type == "LSTM" and way(n.op_type) == STATIC else way(n.op_type)
                  for n in weighted}  # fmt: skip
        how = eased() if name == "dynamic, eased" else None
        variant = make_plan(model, plan.config, TARGETS[plan.target], wanted, eased=how)
        computes = [tuple(variant.eased), *((n.node, n.compute) for n in variant.nodes)]
        if computes not in seen:
            seen.append(computes)
            yield name, variant


def restored(model: ir.Model, plan: QuantPlan, nodes: Collection[str], bits: int = 32) -> QuantPlan:
    """The plan with the weights of these nodes in more bits: 8, or 32 and then computed in float."""
    config = replace(plan.config, layer_bits={**plan.config.layer_bits, **{_literal(n): bits for n in sorted(nodes)}})
    wanted = {n.node: n.compute for n in plan.nodes}
    return make_plan(model, config, TARGETS[plan.target], wanted, eased=plan.eased)


def _polish(
    model: ir.Model, start: Candidate, stats: Statistics | None, bench: Bench, trace: list[dict[str, Any]],
    progress: Callable[[str], None],
) -> Candidate:  # fmt: skip
    """The candidate of most worth among `start` and those with the most harmful nodes in float: 1, 2, 4, ... groups.

    Nodes are ranked in at most POLISH_GROUPS groups of neighbours, on a few samples.
    """
    nodes = [n.node for n in start.plan.nodes if n.weights and n.compute != FLOAT]
    quick = replace(bench, samples=bench.samples.spread(POLISH_FEEDS))
    groups = [list(g) for g in np.array_split(np.array(nodes, object), min(len(nodes), POLISH_GROUPS))] if nodes else []
    gain = []
    for i, group in enumerate(groups):
        progress(f"what {group[0]} in float gains")
        gain.append((-quick.judge(_floated(model, start, stats, group), timed=False).sqnr_db, i))
    order = [groups[i] for _, i in sorted(gain)]
    best, count = start, 1
    while count < len(order):
        harmful = [n for group in order[:count] for n in group]
        candidate = bench.judge(_floated(model, start, stats, harmful))
        trace.append(candidate.trace())
        if candidate.worth <= best.worth:
            break
        best, count = candidate, 2 * count
    return best


def _floated(model: ir.Model, start: Candidate, stats: Statistics | None, nodes: list[str]) -> Candidate:
    """The candidate with these nodes computed in float, their weights stored as they were."""
    wanted = {n.node: FLOAT if n.node in nodes else n.compute for n in start.plan.nodes if n.weights}
    plan = make_plan(model, start.plan.config, TARGETS[start.plan.target], wanted, eased=start.plan.eased)
    return build(model, plan, stats, f"{start.name}, {len(nodes)} nodes in float")


def _restore(
    model: ir.Model, start: Candidate, stats: Statistics | None, bench: Bench, contract: Contract,
    trace: list[dict[str, Any]], progress: Callable[[str], None],
) -> Candidate:  # fmt: skip
    """The candidate that keeps the contract with the fewest nodes restored, else the best one found.

    1. What is stored in 4 bits goes to 8 first; only where all of it is not enough do nodes return to float.
    2. Nodes in groups: how much less noise has the whole model with this group alone restored?
    3. The groups that help most per weight are restored first: 1, 2, 4, ... until the contract holds, then bisection.
    """
    tried = [start]
    for bits, storage in ((8, ("int4",)), (32, ("int4", "int8"))):
        nodes = [n.node for n in tried[-1].plan.nodes if n.weights and n.storage in storage]
        if not nodes:
            continue
        groups = [list(g) for g in np.array_split(np.array(nodes, object), min(len(nodes), MAX_EVALUATIONS // 4))]
        base, gain = tried[-1], []
        for i, group in enumerate(groups):
            progress(f"what restoring {group[0]} gains")
            raised = bench.judge(_raised(model, base, stats, group, bits), timed=False)
            elements = sum(n.elements for n in base.plan.nodes if n.node in group)
            gain.append((-(base.noise - raised.noise) / elements, -_value(raised, contract), i))
        order = [groups[i] for *_, i in sorted(gain)]
        low, high, step = 0, None, 1
        for _ in range(MAX_EVALUATIONS // 4):
            if low == len(order) or (high is not None and high - low <= 1):
                break
            count = min(low + step, len(order)) if high is None else (low + high) // 2
            harmful = [n for group in order[:count] for n in group]
            progress(f"{len(harmful)} of {len(nodes)} nodes in {bits} bits")
            tried.append(bench.judge(_raised(model, base, stats, harmful, bits)))
            trace.append(tried[-1].trace())
            if _verdict(tried[-1], contract, bench)[0] == "met":
                high = count
            else:
                low, step = count, 2 * step
        if high is not None:
            break
    met = [c for c in tried if _verdict(c, contract, bench)[0] == "met"]
    return min(met, key=lambda c: c.size_bytes) if met else max(tried, key=lambda c: _value(c, contract))


def _raised(model: ir.Model, base: Candidate, stats: Statistics | None, nodes: list[str], bits: int) -> Candidate:
    plan = restored(model, base.plan, nodes, bits)
    return build(model, plan, stats, f"{base.name}, {len(nodes)} nodes in {bits} bits")


def _value(candidate: Candidate, contract: Contract) -> float:
    """What the contract looks at, and fidelity where that says nothing new."""
    assert candidate.fidelity is not None
    return score(candidate.fidelity, contract.metric)[0] + 1e-6 * candidate.sqnr_db


def _verdict(candidate: Candidate, contract: Contract, bench: Bench) -> tuple[str, str]:
    if candidate.fidelity is None:
        raise ModelError(f"{candidate.name} was not judged")
    ratio = candidate.size_bytes / bench.float_size_bytes
    return judge(candidate.fidelity, contract, speedup=candidate.speedup, size_ratio=ratio)


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
