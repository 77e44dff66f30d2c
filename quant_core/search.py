"""Which of several plans is best: a bounded loop over plan, rewrite and compare that always ends in a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from quant_core.candidate import AS_FAST, FAITHFUL_DB, Bench, Candidate, build
from quant_core.config import Contract, QuantConfig
from quant_core.errors import DataError, ModelError
from quant_core.fidelity import judge, score
from quant_core.observe import Statistics
from quant_core.outliers import Easing, easings
from quant_core.plan import BLOCKS, DYNAMIC, FLOAT, STATIC, QuantPlan, make_plan
from quant_core.products import is_product, product_costs
from quant_core.rules import RULES
from quant_core.targets import TARGETS

MAX_EVALUATIONS = 40
MOST_GROUPS = {8: 16, 16: 10}  # of nodes, by the bits that they are raised to; with the steps there is room for both
POLISH_GROUPS, POLISH_FEEDS = 12, 16
EXACT_DB = 50.0  # outputs this close to float's need no other channels
EVEN_GAIN_DB = 0.5  # less is luck
ONE_SCALE, ONE_SCALE_GAIN = "dynamic, one scale a weight", 0.3  # doublings that it can gain at most
RARE = 0.1  # below this share of the weighted nodes, those that could be dynamic are not worth variants of their own
LAST_RESORTS = ("dynamic, convolutions in float", "weight-only")
GOOD_ENOUGH = 0.2  # doublings of net worth at which last resorts, worth about 0, need not be tried


@dataclass(frozen=True, slots=True)
class Found:
    """The best candidate, the float model it was made of, whether it keeps the contract, and all that was tried."""

    best: Candidate
    model: ir.Model
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
    even: Callable[[], tuple[ir.Model, Statistics] | None] = lambda: None,
    fit: Callable[[QuantPlan], Statistics | None] | None = None,
    settle: Callable[[ir.Model, Candidate], ir.Model | None] = lambda *_: None,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """The best model that can be made of a prepared one.

    1. `mode: auto` races the ways in which weighted nodes can compute; any other mode is one way.
    2. Without a contract the candidate of most worth wins: speed, less what lost fidelity must buy.
    3. With one, the candidate of most worth that keeps it wins. If none does, nodes that hurt most are restored to
       float, most harmful first, half as many or twice as many at a time, until it holds or MAX_EVALUATIONS are spent;
       the best file found is returned all the same, with verdict `not_met`.

    `even` gives the same model with channels evened out (equalize.py) and its statistics; it is asked where static
    outputs are not exact, and what it gives is used from there on if it brings them nearer to float's.
    `fit` gives the statistics anew for a plan with other bits, where rounding a weight depends on those before it.
    `settle` gives a candidate's model with biases that bring it nearer to float, if there are any (settle.py).
    Without a bench (no samples), or if the plan is to be done exactly, nothing is measured and the plan is applied.
    """
    trace: list[dict[str, Any]] = []
    if exact or bench is None:
        best = build(model, plan, stats, "the plan")
        best = replace(best, model=settle(model, best) or best.model)
        if bench is None or contract is None:
            return Found(best, model, "none", "no contract", trace)
        best = bench.judge(best)
        return Found(best, model, *_verdict(best, contract, bench), [best.trace()])
    candidates: list[Candidate] = []
    even_db = 0.0

    def found(best: Candidate, verdict: str = "none", reason: str = "no contract") -> Found:
        return Found(replace(best, plan=replace(best.plan, equalized_db=even_db)), model, verdict, reason, trace)

    def at_rest(best: Candidate) -> Candidate:
        if (made := settle(model, best)) is None:
            return best
        rested = bench.judge(replace(best, name=f"{best.name}, biases settled", model=made), timed=False)
        trace.append(rested.trace())
        broken = contract is not None and _keeping([best], contract, bench) and not _keeping([rested], contract, bench)
        return best if broken else rested

    def eased() -> Mapping[str, Easing]:
        dynamic = [
            n.node for n in plan.nodes if n.compute != FLOAT and RULES[n.op_type].dynamic and n.op_type != "LSTM"
        ]
        if stats is None or not candidates or candidates[-1].sqnr_db > FAITHFUL_DB:
            return {}
        progress("measuring what easing outliers gains")
        return easings(model, dynamic, stats.means, bench.samples)

    def is_spare() -> bool:
        """Whether the last candidate is known to be near to float, and is not far from the best."""
        last = candidates[-1] if candidates else None
        if last is None or last.fidelity is None or last.fidelity.sqnr_db is None or last.sqnr_db < FAITHFUL_DB:
            return False  # of outputs that are integers only agreement is known
        return last.worth > max(c.worth for c in candidates) - ONE_SCALE_GAIN

    refused = ModelError("there is no way to compute this model")
    for name, variant in variants(model, plan, eased, is_spare):
        keeping = candidates if contract is None else _keeping(candidates, contract, bench)
        if name in LAST_RESORTS and max((c.worth for c in keeping), default=0.0) > GOOD_ENOUGH:
            continue
        progress(f"trying {name}")
        try:
            candidates.append(bench.judge(build(model, variant, stats, name)))
        except ModelError as error:  # one way that does not load is no reason to give up the others
            refused = error
            trace.append({"candidate": name, "error": str(error)})
        else:
            trace.append(candidates[-1].trace())
        if name == STATIC and candidates and candidates[-1].sqnr_db < EXACT_DB and (evened := even()):
            candidate = build(evened[0], variant, evened[1], "static, channels evened out")
            candidate = replace(bench.judge(candidate, timed=False), cost=candidates[-1].cost)
            trace.append(candidate.trace())
            if (gained := candidate.sqnr_db - candidates[-1].sqnr_db) > EVEN_GAIN_DB:
                candidates[-1], (model, stats), even_db = candidate, evened, gained
    if not candidates:
        raise refused
    if plan.config.mode == "auto" and (cheaper := _cheaper(model, stats, bench, candidates, progress)) is not None:
        candidates.append(cheaper)
        trace.append(cheaper.trace())
    best = max(candidates, key=lambda c: c.worth)
    if contract is None and best.sqnr_db < FAITHFUL_DB:
        best = _polish(model, best, stats, bench, trace, progress)
    if contract is None:
        return found(at_rest(best))
    if keeping := _keeping(candidates, contract, bench):
        best = max(keeping, key=lambda c: c.worth)
    elif right := _keeping(candidates, replace(contract, min_speedup=None, max_size_ratio=None), bench):
        # only size or speed are missed, which restoring makes worse
        best = min(right, key=lambda c: c.size_bytes) if contract.max_size_ratio else max(right, key=lambda c: c.worth)
    else:
        best = _restore(model, best, stats, fit, bench, contract, trace, progress)
    best = at_rest(best)
    return found(best, *_verdict(best, contract, bench))


def variants(
    model: ir.Model, plan: QuantPlan, eased: Callable[[], Mapping[str, Easing]], is_spare: Callable[[], bool]
) -> Iterator[tuple[str, QuantPlan]]:
    """The ways in which the plan's weighted nodes can compute, without repetition.

    `eased` is asked, when its turn comes, how the outliers of which tensors are worth easing; `is_spare`, behind the
    dynamic candidates, whether there is fidelity to spare for one scale a weight, which kernels of few rows multiply
    with some 10 % sooner.
    """
    if plan.config.mode != "auto":
        yield plan.config.mode, plan
        return
    ways: dict[str, Callable[[str], str]] = {
        "static": lambda _: STATIC,
        "dynamic": lambda op: DYNAMIC if RULES[op].dynamic else STATIC,
        "dynamic, eased": lambda op: DYNAMIC if RULES[op].dynamic else STATIC,
        ONE_SCALE: lambda op: DYNAMIC if RULES[op].dynamic else STATIC,
        "blocks": lambda op: BLOCKS if RULES[op].dynamic and op != "LSTM" else STATIC,
        "dynamic, convolutions in float": lambda op: DYNAMIC if RULES[op].dynamic else FLOAT,
        "weight-only": lambda _: FLOAT,
    }
    weighted = [n for n in plan.nodes if n.weights]
    if sum(RULES[n.op_type].dynamic for n in weighted) < RARE * len(weighted):
        ways = {name: way for name, way in ways.items() if not name.startswith(("dynamic", "blocks"))}
    seen: list[Any] = []
    for name, way in ways.items():
        wanted = {n.node: DYNAMIC if n.op_type == "LSTM" and way(n.op_type) == STATIC else way(n.op_type)
                  for n in weighted}  # fmt: skip
        how = eased() if name == "dynamic, eased" else None
        coarse = name == ONE_SCALE and plan.config.per_channel and not plan.in_four_bits and is_spare()
        variant = make_plan(model, plan.config, TARGETS[plan.target], wanted, eased=how, one_scale=coarse)
        computes = [variant.one_scale, tuple(variant.eased), *((n.node, n.compute) for n in variant.nodes)]
        if computes not in seen:
            seen.append(computes)
            yield name, variant


def _cheaper(
    model: ir.Model, stats: Statistics | None, bench: Bench, candidates: Sequence[Candidate],
    progress: Callable[[str], None],
) -> Candidate | None:  # fmt: skip
    """The candidate of most worth with each product in the way that costs least by itself; None if that saves nothing.

    A way is open to single products if it does not spoil the outputs where all take it; float always is.
    """
    best = max(candidates, key=lambda c: c.worth)
    products = [n.node for n in best.plan.nodes if is_product(n)]
    if best.cost is None or len(products) < RARE * sum(bool(n.weights) for n in best.plan.nodes):
        return None
    spared = [c.name for c in candidates if c.sqnr_db >= min(FAITHFUL_DB, best.sqnr_db)]
    now = {n.node: n.compute for n in best.plan.nodes if n.weights}
    ways = [now | dict.fromkeys(products, way) for way in (FLOAT, STATIC, DYNAMIC, BLOCKS) if way in (FLOAT, *spared)]
    plans = [_varied(model, best.plan, best.plan.config, way) for way in (now, *ways)]
    progress("timing products by themselves")
    chosen, saved_ms = {}, 0.0
    for node, costs in product_costs(model, plans, stats, bench.samples[0], bench.costs).items():
        way, cost = max(costs.items(), key=lambda item: item[1].speedup)
        if cost.speedup * AS_FAST > costs[now[node]].speedup:
            chosen[node] = way
            saved_ms += cost.float_ms / costs[now[node]].speedup - cost.quantized_ms
    if saved_ms <= (1 - AS_FAST) * best.cost.quantized_ms:
        return None
    plan = _varied(model, best.plan, best.plan.config, now | chosen)
    return bench.judge(build(model, plan, stats, f"{best.name}, {len(chosen)} products by their own cost"))


def restored(model: ir.Model, plan: QuantPlan, nodes: Collection[str], bits: int = 16) -> QuantPlan:
    """The plan with the weights of these nodes in more bits: 8, or 16 (if those hold it) and then computed in float."""
    config = replace(plan.config, layer_bits={**plan.config.layer_bits, **{_literal(n): bits for n in sorted(nodes)}})
    wanted = {n.node: n.compute for n in plan.nodes}
    return _varied(model, plan, config, wanted)


def _varied(model: ir.Model, plan: QuantPlan, config: QuantConfig, wanted: Mapping[str, str]) -> QuantPlan:
    """The plan anew with another config, or where nodes compute in other ways; what a search found out stays."""
    return make_plan(model, config, TARGETS[plan.target], wanted, eased=plan.eased, one_scale=plan.one_scale)


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
    plan = _varied(model, start.plan, start.plan.config, wanted)
    return build(model, plan, stats, f"{start.name}, {len(nodes)} nodes in float")


def _restore(
    model: ir.Model, start: Candidate, stats: Statistics | None, fit: Callable[[QuantPlan], Statistics | None] | None,
    bench: Bench, contract: Contract, trace: list[dict[str, Any]], progress: Callable[[str], None],
) -> Candidate:  # fmt: skip
    """The candidate that keeps the contract with the fewest nodes restored, else the best one found.

    1. What is stored in 4 bits goes to 8 first; only where all of it is not enough do nodes return to float.
    2. Nodes in groups: how much less noise has the whole model with this group alone restored?
    3. The groups that help most per weight are restored first: 1, 2, 4, ... until the contract holds, then bisection.
       What stays in 4 bits is rounded anew each time: it made up for errors that are gone.
    4. While there are 4 bits to give, the contract must also hold by the agreement that a plan's noise leads one to
       expect: which of some near-equal plans agrees most often with float on these very samples is luck.
    """

    def raised(base: Candidate, nodes: list[str], bits: int, known: Statistics | None) -> Candidate:
        plan = restored(model, base.plan, nodes, bits)
        name = f"{base.name}, {len(nodes)} nodes in {bits} bits"
        return build(model, plan, anew(plan) if known is None else known, name)

    def anew(plan: QuantPlan) -> Statistics | None:
        return fit(plan) if fit is not None and stats is not None and stats.aims else stats

    tried = [start]
    for bits, storage in ((8, ("int4",)), (16, ("int4", "int8"))):
        nodes = [n.node for n in tried[-1].plan.nodes if n.weights and n.storage in storage]
        if not nodes:
            continue
        groups = [list(g) for g in np.array_split(np.array(nodes, object), min(len(nodes), MOST_GROUPS[bits]))]
        base, gain = tried[-1], []
        known = stats if base is start else anew(base.plan)
        for i, group in enumerate(groups):
            progress(f"what restoring {group[0]} gains")
            better = bench.judge(raised(base, group, bits, known), timed=False)
            elements = sum(n.elements for n in base.plan.nodes if n.node in group)
            gain.append((-(base.noise - better.noise) / elements, -_value(better, contract), i))
        order = [groups[i] for *_, i in sorted(gain)]
        low, high, step = 0, None, 1
        for _ in range(MAX_EVALUATIONS // 4):
            if low == len(order) or (high is not None and high - low <= 1):
                break
            count = min(low + step, len(order)) if high is None else (low + high) // 2
            harmful = [n for group in order[:count] for n in group]
            progress(f"{len(harmful)} of {len(nodes)} nodes in {bits} bits")
            tried.append(bench.judge(raised(base, harmful, bits, None)))
            trace.append(tried[-1].trace())
            if _keeping(tried[-1:], contract, bench, tried if bits == 8 else ()):
                high = count
            else:
                low, step = count, 2 * step
        if high is not None or _keeping(tried, contract, bench):
            break
    sure = _keeping(tried, contract, bench, tried)
    return (
        min(sure, key=lambda c: c.size_bytes)
        if sure
        else max(_keeping(tried, contract, bench) or tried, key=lambda c: _value(c, contract))
    )


def _value(candidate: Candidate, contract: Contract) -> float:
    """What the contract looks at, and fidelity where that says nothing new."""
    assert candidate.fidelity is not None
    try:
        return score(candidate.fidelity, contract.metric)[0] + 1e-6 * candidate.sqnr_db
    except DataError:  # a metric of the user's own that failed: _verdict tells
        return candidate.sqnr_db


def _keeping(
    candidates: Iterable[Candidate], contract: Contract, bench: Bench, seen: Sequence[Candidate] = ()
) -> list[Candidate]:
    """Those that keep the contract, also by the agreement to be expected of them after all that was seen."""
    keeping = [c for c in candidates if _verdict(c, contract, bench)[0] == "met"]
    if contract.metric != "agreement" or contract.min is None or not seen:
        return keeping
    # what differs from float is proportional to how far outputs are from float's
    differing = sum(1 - (c.fidelity.agreement or 0.0) for c in seen if c.fidelity is not None)
    rate = differing / max(sum(c.noise**0.5 for c in seen), 1e-30)
    return [c for c in keeping if 1 - rate * c.noise**0.5 >= contract.min]


def _verdict(candidate: Candidate, contract: Contract, bench: Bench) -> tuple[str, str]:
    if candidate.fidelity is None:
        raise ModelError(f"{candidate.name} was not judged")
    if bench.metric_failure is not None:
        return "not_met", str(bench.metric_failure)
    ratio = candidate.size_bytes / bench.float_size_bytes
    return judge(candidate.fidelity, contract, speedup=candidate.speedup, size_ratio=ratio)


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
