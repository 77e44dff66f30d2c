"""Which of several plans is best: a bounded loop over plan, rewrite and compare that always ends in a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx_ir as ir

from quant_core.calibrate.outliers import choose_treatments
from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.evaluate.contract import Verdict
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.make import replan
from quant_core.plan.operators import RULES
from quant_core.plan.types import Compute, NodeChoice, OutlierTreatment, QuantPlan
from quant_core.search.calibrated import Material
from quant_core.search.candidate import AS_FAST, FAITHFUL_DB, Bench, Candidate
from quant_core.search.keeping import keeping, verdict
from quant_core.search.matmul_costs import is_product, product_costs
from quant_core.search.mixed_precision import polish, restore

EXACT_DB = 50.0  # outputs this close to float's need no other channels
EVEN_GAIN_DB = 0.5  # less is luck
ONE_SCALE, ONE_SCALE_GAIN = "dynamic, one scale a weight", 0.3  # doublings that it can gain at most
CHEAPER = "products by their own cost"
RARE = 0.1  # below this share of the weighted nodes, those that could be dynamic are not worth variants of their own
LAST_RESORTS = ("dynamic, convolutions in float", "weight-only")
GOOD_ENOUGH = 0.2  # doublings: of worth at which last resorts are not tried, of speed that restoring must promise


@dataclass(frozen=True, slots=True)
class Found:
    """The best candidate, what it was made of, whether it keeps the contract, and all that was tried."""

    best: Candidate
    material: Material
    verdict: Verdict
    reason: str
    trace: list[dict[str, Any]]


def search(
    material: Material,
    plan: QuantPlan,
    bench: Bench | None,
    contract: Contract | None = None,
    *,
    exact: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """The best model that can be made of a prepared one.

    1. `mode: auto` races the ways in which weighted nodes can compute; any other mode is one way.
    2. Without a contract the candidate of most worth wins: speed, less what lost fidelity must buy.
    3. With one, the candidate of most worth that keeps it wins. Where a faster one misses it, or none keeps it, the
       nodes that hurt most are given more bits, or computed in float (restore.py); the best file found is returned
       all the same, with verdict `not_met`.

    Channels are evened out where static outputs are not exact, if that brings them nearer to float's; from there on all
    is made of that model. The biases of what wins settle.
    Without a bench (no samples), or if the plan is to be done exactly, nothing is measured and the plan is applied.
    """
    trace: list[dict[str, Any]] = []
    if exact or bench is None:
        best = material.build(plan, "the plan")
        best = replace(best, quantized=material.settled(best) or best.quantized)
        if bench is None or contract is None:
            return Found(best, material, Verdict.NONE, "no contract", trace)
        best = bench.judge(best)
        return Found(best, material, *verdict(best, contract, bench), [best.trace()])
    candidates: list[Candidate] = []
    even_db = 0.0

    def found(
        best: Candidate, verdict: Verdict = Verdict.NONE, reason: str = "no contract"
    ) -> Found:
        return Found(
            replace(best, plan=replace(best.plan, equalized_db=even_db)),
            material,
            verdict,
            reason,
            trace,
        )

    def at_rest(best: Candidate) -> Candidate:
        progress("settling biases")
        if (made := material.settled(best)) is None:
            return best
        rested = bench.judge(
            replace(best, name=f"{best.name}, biases settled", quantized=made), timed=False
        )
        trace.append(rested.trace())
        broken = (
            contract is not None
            and keeping([best], contract, bench)
            and not keeping([rested], contract, bench)
        )
        return best if broken else rested

    def eased() -> Mapping[str, OutlierTreatment]:
        dynamic = [
            n.node
            for n in plan.nodes
            if n.compute != Compute.FLOAT and RULES[n.op_type].dynamic and n.op_type != "LSTM"
        ]
        if material.stats is None or not candidates or candidates[-1].sqnr_db > FAITHFUL_DB:
            return {}
        progress("measuring what easing outliers gains")
        return choose_treatments(material.model, dynamic, material.stats.means, bench.samples)

    def is_spare() -> bool:
        """Whether the last candidate is known to be near to float, and is not far from the best."""
        last = candidates[-1] if candidates else None
        if (
            last is None
            or last.fidelity is None
            or last.fidelity.sqnr_db is None
            or last.sqnr_db < FAITHFUL_DB
        ):
            return False  # of outputs that are integers only agreement is known
        return last.worth > max(c.worth for c in candidates) - ONE_SCALE_GAIN

    def attempt(name: str, make: Callable[[], Candidate | None]) -> None:
        """A candidate more, if there is one; a way that does not load is no reason to give up the others."""
        try:
            made = make()
        except ModelError as error:
            refused.append(error)
            trace.append({"candidate": name, "error": str(error)})
            return
        if made is not None:
            candidates.append(made)
            trace.append(made.trace())

    refused: list[ModelError] = []
    for name, variant in variants(material.model, plan, eased, is_spare):
        usable = candidates if contract is None else keeping(candidates, contract, bench)
        if name in LAST_RESORTS and max((c.worth for c in usable), default=0.0) > GOOD_ENOUGH:
            continue
        progress(f"trying {name}")
        attempt(name, partial(_judged, material, bench, variant, name))
        if name == "static" and candidates and candidates[-1].sqnr_db < EXACT_DB:
            progress("evening out channels")
            if (evened := material.evened(plan)) is None:
                continue
            candidate = evened.build(variant, "static, channels evened out")
            candidate = replace(bench.judge(candidate, timed=False), cost=candidates[-1].cost)
            trace.append(candidate.trace())
            if (gained := candidate.sqnr_db - candidates[-1].sqnr_db) > EVEN_GAIN_DB:
                candidates[-1], material, even_db = candidate, evened, gained
    if not candidates:
        raise refused[-1]
    if plan.config.mode == "auto":
        progress("timing products by themselves")
        attempt(CHEAPER, partial(_cheaper, material, bench, candidates))
    best = max(candidates, key=lambda c: c.worth)
    if contract is None and best.sqnr_db < FAITHFUL_DB:
        try:
            best = polish(material, best, bench, trace, progress)
        except ModelError as error:
            trace.append({"candidate": f"more than {best.name}", "error": str(error)})
    if contract is None:
        return found(at_rest(best))
    options = keeping(candidates, contract, bench)
    right = keeping(candidates, replace(contract, min_speedup=None, max_size_ratio=None), bench)
    if right and not options:  # only size or speed are missed, which restoring makes worse
        options = [min(right, key=lambda c: c.size_bytes)] if contract.max_size_ratio else right
    least = max((c.gain for c in options), default=-math.inf) + GOOD_ENOUGH
    faster = [c for c in candidates if c not in right and c.gain > least]
    if faster and bench.metric_failure is None:
        start = max(faster, key=lambda c: c.worth)
        options.append(restore(material, start, bench, contract, trace, progress))
    best = max(keeping(options, contract, bench) or options or candidates, key=lambda c: c.worth)
    best = at_rest(best)
    return found(best, *verdict(best, contract, bench))


def variants(
    model: ir.Model,
    plan: QuantPlan,
    eased: Callable[[], Mapping[str, OutlierTreatment]],
    is_spare: Callable[[], bool],
) -> Iterator[tuple[str, QuantPlan]]:
    """The ways in which the plan's weighted nodes can compute, without repetition.

    `eased` is asked, when its turn comes, how the outliers of which tensors are worth easing; `is_spare`, behind the
    dynamic candidates, whether there is fidelity to spare for one scale a weight, which kernels of few rows multiply
    with some 10 % sooner.
    """
    if plan.config.mode != "auto":
        yield plan.config.mode, plan
        return
    ways: dict[str, Callable[[str], Compute]] = {
        "static": lambda _: Compute.STATIC,
        "dynamic": lambda op: Compute.DYNAMIC if RULES[op].dynamic else Compute.STATIC,
        "dynamic, eased": lambda op: Compute.DYNAMIC if RULES[op].dynamic else Compute.STATIC,
        ONE_SCALE: lambda op: Compute.DYNAMIC if RULES[op].dynamic else Compute.STATIC,
        "blocks": lambda op: (
            Compute.BLOCKS if RULES[op].dynamic and op != "LSTM" else Compute.STATIC
        ),
        "dynamic, convolutions in float": lambda op: (
            Compute.DYNAMIC if RULES[op].dynamic else Compute.FLOAT
        ),
        "weight-only": lambda _: Compute.FLOAT,
    }
    weighted = [n for n in plan.nodes if n.weights]
    if sum(RULES[n.op_type].dynamic for n in weighted) < RARE * len(weighted):
        ways = {
            name: way for name, way in ways.items() if not name.startswith(("dynamic", "blocks"))
        }
    seen: list[Any] = []
    for name, way in ways.items():
        wanted = {n.node: Compute.DYNAMIC if n.op_type == "LSTM" and way(n.op_type) == Compute.STATIC else way(n.op_type)
                  for n in weighted}  # fmt: skip
        how = eased() if name == "dynamic, eased" else None
        coarse = (
            name == ONE_SCALE and plan.config.per_channel and not plan.in_four_bits and is_spare()
        )
        granularity = PerTensor() if coarse else None
        changes = {
            node: NodeChoice(compute, granularity=granularity) for node, compute in wanted.items()
        }
        variant = replan(model, replace(plan, outliers=how or {}), changes)
        computes = [
            coarse and any(n.compute is Compute.DYNAMIC for n in variant.nodes),
            tuple(variant.outliers),
            *((n.node, n.compute) for n in variant.nodes),
        ]
        if computes not in seen:
            seen.append(computes)
            yield name, variant


def _judged(material: Material, bench: Bench, plan: QuantPlan, name: str) -> Candidate:
    return bench.judge(material.build(plan, name))


def _cheaper(material: Material, bench: Bench, candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate of most worth with each product in the way that costs least by itself; None if that saves nothing.

    A way is open to single products if it does not spoil the outputs where all take it; float always is.
    """
    best = max(candidates, key=lambda c: c.worth)
    products = [n.node for n in best.plan.nodes if is_product(n)]
    if best.cost is None or len(products) < RARE * sum(bool(n.weights) for n in best.plan.nodes):
        return None
    spared = [c.name for c in candidates if c.sqnr_db >= min(FAITHFUL_DB, best.sqnr_db)]
    now = {n.node: n.compute for n in best.plan.nodes if n.weights}
    ways = [
        now | dict.fromkeys(products, way)
        for way in (Compute.FLOAT, Compute.STATIC, Compute.DYNAMIC, Compute.BLOCKS)
        if way in (Compute.FLOAT, *spared)
    ]
    plans = [_computing(material.model, best.plan, way) for way in (now, *ways)]
    chosen, saved_ms = {}, 0.0
    for node, costs in product_costs(
        material.model, plans, material.stats, bench.samples[0], bench.costs
    ).items():
        way, cost = max(costs.items(), key=lambda item: item[1].speedup)
        if cost.speedup * AS_FAST > costs[now[node]].speedup:
            chosen[node] = way
            saved_ms += cost.float_ms / costs[now[node]].speedup - cost.quantized_ms
    if saved_ms <= (1 - AS_FAST) * best.cost.quantized_ms:
        return None
    plan = _computing(material.model, best.plan, now | chosen)
    return _judged(material, bench, plan, f"{best.name}, {len(chosen)} {CHEAPER}")


def _computing(model: ir.Model, plan: QuantPlan, ways: Mapping[str, Compute]) -> QuantPlan:
    """The plan with these nodes computing in these ways."""
    return replan(model, plan, {node: NodeChoice(way) for node, way in ways.items()})
