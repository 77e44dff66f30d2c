"""Which nodes are best put into float, and what that costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from quant_core.config import Contract, QuantConfig
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.make import make_plan, with_choice
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import IN_FLOAT, NodeChoice
from quant_core.search.assignments import coarse_weights, float_groups
from quant_core.search.matmul_costs import matmul_costs
from quant_core.search.node_costs import LEAST_MS, node_costs
from quant_core.search.search import search
from quant_core.search.trace import on_front
from tests.models import normalized, sketch
from tests.oracle.cases import weights
from tests.unit.search.problems import Problem, convs, deep, harmful


def test_coarse_weights_are_stored_in_16_bits_where_their_node_goes_into_float():
    problem = Problem(convs())
    candidate = problem.calibrated.build(problem.plan, "static")
    noisy = replace(candidate.quantized, weight_sqnr_db={"a": 30.0, "b": 44.0, "y": 30.0})
    candidate = replace(candidate, quantized=noisy)

    assert coarse_weights(candidate) == {"a", "y"}


def test_weights_with_one_scale_have_one_for_each_channel_where_their_node_goes_into_float():
    problem = Problem(deep(2), mode="dynamic")
    one_scale = NodeChoice(granularity=PerTensor())
    plan = with_choice(problem.model, problem.plan, ["l1", "y"], one_scale)

    in_float = with_choice(problem.model, plan, ["l1", "y"], IN_FLOAT)

    assert {n.granularity for n in plan.nodes if n.node in ("l1", "y")} == {PerTensor()}
    assert PerTensor() not in {n.granularity for n in in_float.nodes if n.node in ("l1", "y")}


def test_the_whole_front_has_assignments_between_integers_and_float():
    problem = Problem(harmful(), mode="static")

    found = search(problem.calibrated, problem.plan, problem.bench, whole_front=True)

    assignments = [row for row in found.trace if "nodes in float" in row["candidate"]]
    assert assignments
    assert {row["candidate"] for row in on_front(found.trace)} <= {
        row["candidate"] for row in found.trace
    }
    assert max(row["sqnr_db"] for row in assignments) > found.trace[0]["sqnr_db"]


def test_a_table_of_costs_gives_the_same_front_again(tmp_path):
    table = tmp_path / "costs"

    def front() -> list[object]:
        problem = Problem(harmful(), mode="static")
        reference = replace(problem.bench.reference, path=written)
        bench = replace(problem.bench, costs=TimingCache(table), reference=reference)
        found = search(problem.calibrated, problem.plan, bench, whole_front=True)
        return [(row["candidate"], row["speedup"], row["sqnr_db"]) for row in found.trace]

    written = tmp_path / "model.onnx"
    onnx.save(harmful(), written)

    assert front() == front()


def test_a_contract_that_is_satisfied_may_be_so_by_a_faster_assignment():
    found = Problem(harmful(), mode="static").search(Contract("sqnr", min=1.0))

    labels = [row["candidate"] for row in found.trace]
    assert found.ruling.verdict == "met"
    assert len([label for label in labels if "nodes in float" in label]) == 1


def test_a_gemm_with_a_computed_bias_is_not_timed_alone():
    """onnxruntime makes one of two products that are added."""
    arrays = weights(u=(32, 32), v=(32, 32))
    text = "a = MatMul(x, u) r = Relu(a) b = MatMul(r, u) y = Gemm(x, v, b)"
    model = normalized(sketch(f"(float[n,32] x) => (float[n,32] y) {{ {text} }}", arrays))
    configs = [QuantConfig(mode=mode) for mode in ("dynamic", "weight_only")]
    plans = [make_plan(model, config, TARGETS["x86"]) for config in configs]

    costs = matmul_costs(model, plans, None, {"x": arrays["u"]}, TimingCache())

    assert [len(ways) for ways in costs.values()] == [2, 2]


def test_before_a_logarithm_the_node_that_spoils_small_values_goes_into_float_first():
    """The other one adds more noise to its own output: a channel that nothing reads is loud."""
    arrays = weights(l=(32,), u=(32, 32), v=(32, 32), e=())
    arrays["l"] = np.where(np.arange(32) == 0, 10, 1).astype(np.float32)
    arrays["u"][0], arrays["u"][1:] = 0, 2 * arrays["u"][1:]
    arrays["v"], arrays["e"] = np.eye(32, dtype=np.float32), np.array(1e-3, np.float32)
    text = "m = Mul(x, l) a = MatMul(m, u) p = Exp(a) b = MatMul(p, v) c = Clip(b, e) y = Log(c)"
    proto = sketch(f"(float[n,32] x) => (float[n,32] y) {{ {text} }}", arrays)
    problem = Problem(proto, timed_in=None)
    start = problem.bench.judge(problem.calibrated.build(problem.plan, "static"))

    groups = float_groups(problem.calibrated, start, problem.bench)

    assert groups == [["b"], ["a"]]


def test_of_a_single_node_that_computes_in_integers_nothing_is_measured():
    problem = Problem(
        sketch("(float[n,32] x) => (float[n,32] y) { y = MatMul(x, u) }", weights(u=(32, 32)))
    )
    start = problem.bench.judge(problem.calibrated.build(problem.plan, "static"))

    groups = float_groups(problem.calibrated, start, replace(problem.bench, progress=pytest.fail))

    assert groups == [["y"]]


def test_a_sum_that_a_convolution_adds_itself_costs_float_nothing():
    arrays = weights(u=(16, 16, 1, 1), v=(16, 16, 1, 1), w=(16, 16, 1, 1))
    text = "{ a = Conv(x, u) b = Conv(a, v) s = Add(b, a) y = Conv(s, w) }"
    proto = sketch(f"(float[n,16,8,8] x) => (float[n,16,8,8] y) {text}", arrays)
    problem = Problem(proto, mode="static")
    candidate = problem.calibrated.build(problem.plan, "static")

    costs, _ = node_costs(problem.model, candidate, problem.bench)

    assert [node for node, cost in costs.items() if cost.float_ms == LEAST_MS] == ["s"]
