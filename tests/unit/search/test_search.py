"""What a search tries, in which order, and when it ends."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import onnx
import pytest

from quant_core.config import Contract, QuantConfig
from quant_core.deadline import Deadline
from quant_core.evaluate.layer_report import layer_reports
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute
from quant_core.search.bench import Bench
from quant_core.search.search import follow_plan, search
from tests.models import sketch
from tests.oracle.cases import weights
from tests.unit.search.problems import Problem, deep, harmful, loud


def test_without_a_contract_a_fast_and_faithful_candidate_wins_and_the_trace_has_all_trials():
    problem = Problem(harmful(), mode="auto")

    found = problem.search()

    assert found.ruling.verdict == "none"
    assert found.best.label in {row["candidate"] for row in found.trace}
    assert found.trace[0]["candidate"] == "static"


def test_without_samples_the_plan_is_applied_as_it_is():
    problem = Problem(harmful(), mode="static")

    found = follow_plan(problem.calibrated, problem.plan, None)

    assert (found.best.plan, found.ruling.verdict, found.trace) == (problem.plan, "none", [])


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_layers_are_proven_safe_or_said_not_to_be(mode):
    problem = Problem(harmful(), mode=mode)
    unsafe = make_plan(problem.model, QuantConfig(mode=mode), TARGETS["x86-vnni"])

    rows, risky = (
        layer_reports(plan, problem.calibrated.build(plan, mode).quantized)
        for plan in (problem.plan, unsafe)
    )

    assert all(row.saturation_safe for row in rows)
    assert not any(row.saturation_safe for row in risky if row.weight)


def unbalanced() -> onnx.ModelProto:
    """Two convolutions between which the channels differ by far in size, and two MatMuls."""
    arrays = weights(u=(16, 8, 1, 1), v=(8, 16, 1, 1), w=(8, 32), z=(32, 32))
    sizes = (2.0 ** np.linspace(-2, 2, 16)).astype(np.float32)
    arrays["u"] *= sizes[:, None, None, None]
    arrays["v"] /= sizes[:, None, None]
    text = "a = Conv(x, u) r = Relu(a) b = Conv(r, v) f = Flatten(b) m = MatMul(f, w)"
    return sketch(f"(float[n,8,1,1] x) => (float[n,32] y) {{ {text} y = MatMul(m, z) }}", arrays)


def test_a_matmul_may_become_static_also_if_static_was_equalized(monkeypatch):
    """What a candidate is called does not close its way of computing to single MatMuls."""
    problem = Problem(unbalanced())
    calibrated = replace(problem.calibrated, samples=problem.samples)
    calibrated = calibrated.with_gram_matrices(problem.plan)

    def cost_of_model(bench, candidate, session, feed, which=""):
        computes = {n.compute for n in candidate.plan.nodes if n.op_type == "MatMul"}
        return Cost(1.0, 1.0 + sum({"static": 1.0, "dynamic": 2.0}.get(c, 0.0) for c in computes))

    def cost_of_matmul(costs, what, measure):
        fastest = "static" if "32x32" in what.split() else "dynamic"
        return Cost(0.5, 4.0 if fastest in what.split() else 1.0)

    monkeypatch.setattr(Bench, "_cost", cost_of_model)
    monkeypatch.setattr(TimingCache, "of", cost_of_matmul)

    found = search(calibrated, problem.plan, problem.bench)

    assert found.best.plan.equalized_db > 0
    assert {n.node: n.compute for n in found.best.plan.nodes if n.op_type == "MatMul"} == {
        "m": Compute.DYNAMIC,
        "y": Compute.STATIC,
    }


@pytest.mark.parametrize(
    ("in_integers", "in_float", "is_equalized"),
    [(0.5, 2.0, False), (0.5, 0.9, True), (1.5, 2.0, True)],
)
def test_what_float_beats_however_exact_it_becomes_is_not_equalized(
    monkeypatch, in_integers, in_float, is_equalized
):
    problem = Problem(unbalanced())
    calibrated = replace(problem.calibrated, samples=problem.samples)

    def cost(bench, candidate, session, feed, which=""):
        computes_in_integers = any(n.compute.is_integer for n in candidate.plan.nodes)
        return Cost(1.0, in_integers if computes_in_integers else in_float)

    monkeypatch.setattr(Bench, "_cost", cost)

    found = search(calibrated, problem.plan, problem.bench)

    assert ("static, equalized" in {row["candidate"] for row in found.trace}) == is_equalized


@pytest.mark.parametrize(("speedup", "is_fitted"), [(1.2, False), (3.0, True)])
def test_blocks_too_slow_to_win_are_not_fitted(monkeypatch, speedup, is_fitted):
    problem = Problem(deep(3), bits=4)
    calibrated = replace(problem.calibrated, samples=problem.samples)
    calibrated = calibrated.with_gram_matrices(problem.plan)

    def cost(bench, candidate, session, feed, which=""):
        in_blocks = any(n.compute is Compute.BLOCKS for n in candidate.plan.nodes)
        return Cost(1.0, speedup if in_blocks else 2.0)

    monkeypatch.setattr(Bench, "_cost", cost)

    found = search(calibrated, problem.plan, problem.bench)

    assert ("blocks" in {row["candidate"] for row in found.trace}) == is_fitted


@pytest.mark.parametrize("contract", [None, Contract("sqnr", min=90.0)])
def test_no_step_begins_after_the_time_is_over(monkeypatch, judged, contract):
    """Each judgement moves the clock by ten seconds: what remains is to find one that is sound."""
    problem = Problem(loud(), mode="auto")
    now = 0.0
    monkeypatch.setattr("quant_core.deadline.time.monotonic", lambda: now)
    for method in ("judge", "judge_fidelity"):
        judge = getattr(Bench, method)

        def slow(bench, candidate, judge=judge):
            nonlocal now
            now += 10
            return judge(bench, candidate)

        monkeypatch.setattr(Bench, method, slow)

    bench = replace(problem.bench, deadline=Deadline(0.0, 5.0))
    found = search(problem.calibrated, problem.plan, bench, contract)

    assert judged == ["static", "weight-only"]
    assert found.best.is_sound


def test_a_search_that_begins_late_begins_with_weights_that_are_only_stored(judged):
    problem = Problem(loud(), mode="auto")
    began_at = time.monotonic() - 1000

    bench = replace(problem.bench, deadline=Deadline(began_at, began_at + 1500))
    search(problem.calibrated, problem.plan, bench)

    assert judged[:2] == ["weight-only", "static"]
