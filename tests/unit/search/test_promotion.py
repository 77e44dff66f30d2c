"""A contract is satisfied with the fewest promotions, or the reason is reported, and it ends."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.evaluate.custom_metric import code_allowed
from quant_core.evaluate.timing_cache import Cost
from quant_core.plan.make import with_choice
from quant_core.plan.types import IN_FLOAT16
from quant_core.search.bench import Bench
from quant_core.search.candidate import is_expected_to_satisfy, satisfying
from quant_core.search.promotion import PROMOTIONS
from tests.models import sketch
from tests.oracle.cases import weights
from tests.unit.search.problems import HARD, Problem, deep, harmful, in_float, loud


@pytest.mark.parametrize("node", ["a", "b"])
def test_the_node_that_costs_accuracy_is_promoted_and_no_other(node):
    problem = Problem(harmful(node), timed_in=None, **HARD)

    free, kept = problem.search(), problem.search(Contract("sqnr", min=25.0))

    assert free.trace[0]["sqnr_db"] < 20
    assert (free.best.is_above(free.best.aim), in_float(free.best)) == (True, {node})
    assert (kept.ruling.verdict, in_float(kept.best)) == ("met", {node})
    assert kept.best.sqnr_db >= 25


def test_a_contract_that_is_satisfied_promotes_nothing(judged):
    found = Problem(deep(3), mode="static").search(Contract("sqnr", min=15.0))

    assert (found.ruling.verdict, in_float(found.best)) == ("met", set())
    assert judged == ["static"]


@pytest.mark.parametrize("mode", ["static", "auto"])
def test_a_node_that_integers_spoil_computes_in_float_and_stays_small(mode):
    """Though storing weights alone would satisfy the contract too, at the speed of float."""
    problem = Problem(loud(), timed_in=None, mode=mode)

    found = problem.search(Contract("sqnr", min=25.0))

    assert found.ruling.verdict == "met"
    assert {n.node: (n.compute, n.storage) for n in found.best.plan.nodes if n.weights} == {
        "a": ("float", "int8"), "b": ("static", "int8"), "y": ("static", "int8")
    }  # fmt: skip


def test_a_weight_that_takes_16_bits_keeps_no_other_node_from_integers():
    """All in float is not enough, as a weight is too coarse; with that in 16 bits, b alone must be,
    as it reads a loud channel.
    """
    problem = Problem(
        harmful(), timed_in=None, mode="static", per_channel=False, bias_correction=False
    )

    found = problem.search(Contract("sqnr", min=25.0))

    assert found.ruling.verdict == "met"
    assert {n.node: (n.compute, n.storage) for n in found.best.plan.nodes if n.weights} == {
        "a": ("float", "float16"), "b": ("float", "int8"), "y": ("static", "int8")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("contract", "told"),
    [
        (Contract("sqnr", min=500.0), "sqnr"),
        (Contract("agreement", min=0.0, min_speedup=1e6), "speed"),
        (Contract("cosine", max_drop=1.0, max_size_ratio=1e-3), "size"),
    ],
    ids=["fidelity", "speed", "size"],
)
def test_a_contract_that_nothing_keeps_gives_a_model_and_the_reason(contract, told):
    found = Problem(harmful(), **HARD).search(contract)

    assert found.ruling.verdict == "not_met"
    assert told in found.ruling.reason
    onnx.checker.check_model(ir.to_proto(found.best.model))


def test_a_contract_without_anything_quantized_still_ends():
    found = Problem(harmful(), mode="static", exclude=["*"]).search(
        Contract("agreement", min=0.0, min_speedup=1e6)
    )

    assert found.ruling.verdict == "not_met"


def test_what_float_itself_does_not_reach_promotes_nothing(tmp_path):
    value = "def value(outputs, labels): return float((outputs['y'] > 0).mean())"
    (tmp_path / "share_above_zero.py").write_text(value)
    metric = "share_above_zero:value"
    problem = Problem(deep(4), metric=metric, mode="weight_only")

    with code_allowed(tmp_path):
        free = problem.search()
        found = problem.search(Contract(metric, min=2.0))

    assert (found.ruling.verdict, in_float(found.best)) == ("not_met", in_float(free.best))
    assert "which float misses too" in found.ruling.reason
    assert found.best.size_bytes == free.best.size_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_evaluations_are_bounded_however_deep_the_model(judged, bits):
    problem = Problem(deep(45), mode="weight_only", bits=bits)

    found = problem.search(Contract("sqnr", min=500.0))

    assert found.ruling.verdict == "not_met"
    of_promotions = [
        1 + p.max_groups + 2 * p.max_groups.bit_length() for p in PROMOTIONS
    ]  # all groups, each group, bisection and what follows it
    assert len(judged) <= sum(of_promotions) + 1


def test_what_is_stored_in_4_bits_goes_to_8_before_it_goes_to_float():
    found = Problem(deep(4), mode="weight_only", bits=4).search(Contract("sqnr", min=20.0))

    assert found.ruling.verdict == "met"
    assert {n.storage for n in found.best.plan.nodes} == {"int4", "int8"}


@pytest.mark.parametrize(
    ("contract", "options"),
    [(Contract("sqnr", min=500.0), {"mode": "weight_only", "bits": 4}), (None, {"mode": "static"})],
)
def test_a_promoted_model_that_does_not_load_loses_none_of_the_others(
    monkeypatch, contract, options
):
    problem = Problem(loud(), **options)
    start = {n.node: (n.compute, n.storage) for n in problem.plan.nodes}
    judge = Bench.judge

    def refusing(bench, candidate):
        if {n.node: (n.compute, n.storage) for n in candidate.plan.nodes} != start:
            raise ModelError("does not load")
        return judge(bench, candidate)

    monkeypatch.setattr(Bench, "judge", refusing)

    found = problem.search(contract)

    assert {n.node: (n.compute, n.storage) for n in found.best.plan.nodes} == start
    assert {row["error"] for row in found.trace if "error" in row} == {"does not load"}


def test_more_nodes_are_promoted_where_the_fewest_make_a_model_slower_than_float(monkeypatch):
    """Mixed storage may cost a kernel that all in float keep."""

    def cost(bench, candidate, session, feed, which=""):
        return Cost(1.0, 0.5 if len(in_float(candidate)) == 1 else 1.0)

    monkeypatch.setattr(Bench, "_cost", cost)
    problem = Problem(harmful(), **HARD)

    free, kept = problem.search(), problem.search(Contract("sqnr", min=25.0))

    assert {row["speedup"] for row in kept.trace} == {0.5, 1.0}
    assert (free.best.speedup, free.best.is_above(free.best.aim)) == (1.0, True)
    assert (kept.best.speedup, kept.ruling.verdict) == (1.0, "met")


def test_agreement_by_luck_does_not_satisfy_a_contract_but_agreement_that_the_noise_explains():
    problem = Problem(deep(2), mode="static")
    judged = problem.bench.judge_fidelity(problem.calibrated.build(problem.plan, "static"))
    contract = Contract("agreement", min=0.85)

    def like(sqnr_db: float, agreement: float):
        outputs = tuple(replace(o, sqnr_db=sqnr_db) for o in judged.fidelity.per_output)
        return replace(
            judged, fidelity=replace(judged.fidelity, agreement=agreement, per_output=outputs)
        )

    seen = [like(10, 0.6), like(10, 0.64), like(16, 0.8)]
    lucky, sure = like(10, 0.9), like(22, 0.9)

    assert satisfying([lucky, sure], contract) == [lucky, sure]
    expected = [is_expected_to_satisfy(c, contract, [*seen, lucky, sure]) for c in (lucky, sure)]
    assert expected == [False, True]


def test_nodes_are_promoted_by_their_names_not_by_globs():
    model = sketch(
        "(float[n,32] x) => (float[n,8] y) { a = Gemm(x, u) y = Gemm(a, w) }",
        weights(u=(32, 32), w=(32, 8)),
    )
    model.graph.node[0].name, model.graph.node[1].name = "block[1]/*?", "block1/ab"
    problem = Problem(model, mode="static")

    plan = with_choice(problem.model, problem.plan, {"block[1]/*?"}, IN_FLOAT16)

    assert {n.node: n.storage for n in plan.nodes if n.compute == "float"} == {
        "block[1]/*?": "float16"
    }


def test_what_misses_its_size_alone_is_not_made_larger():
    problem = Problem(harmful(), mode="static")

    found = problem.search(Contract("sqnr", min=-50.0, max_size_ratio=0.01))

    assert found.ruling.verdict == "not_met"
    assert "size" in found.ruling.reason
    assert all(n.storage == "int8" for n in found.best.plan.nodes if n.weights)


def test_a_metric_that_fails_costs_the_verdict_not_the_model(tmp_path):
    (tmp_path / "failing_metric.py").write_text("def value(outputs, labels): return 1 / 0")
    problem = Problem(harmful(), metric="failing_metric:value", mode="static")

    with code_allowed(tmp_path):
        found = problem.search(Contract("failing_metric:value", min=0.5))

    assert found.ruling.verdict == "not_met"
    assert "failing_metric:value" in found.ruling.reason
    assert found.best.size_bytes > 0
