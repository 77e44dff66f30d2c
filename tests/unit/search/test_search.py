"""A search satisfies its contract with the fewest promotions, or reports why not, and ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import observe
from quant_core.config import Contract, QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.deadline import Deadline
from quant_core.errors import ModelError
from quant_core.evaluate.custom_metric import code_allowed
from quant_core.evaluate.kernels import Arithmetic, Kernel
from quant_core.evaluate.layer_report import layer_reports
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.model import graph
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.make import make_plan, with_choice
from quant_core.plan.targets import TARGETS, Runtime
from quant_core.plan.types import IN_FLOAT, IN_FLOAT16, Compute, NodeChoice
from quant_core.search import possible_gain
from quant_core.search.assignments import coarse_weights, float_groups
from quant_core.search.bench import Bench, Reference
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import is_expected_to_satisfy, satisfying
from quant_core.search.front import on_front
from quant_core.search.matmul_costs import matmul_costs
from quant_core.search.node_costs import LEAST_MS, node_costs
from quant_core.search.promotion import PROMOTIONS
from quant_core.search.search import follow_plan, search
from quant_core.search.variants import (
    VARIANTS,
    Trial,
    Variant,
    may_be_worth_trying,
    worth_trying,
)
from tests.models import normalized, sketch
from tests.oracle.cases import weights


def harmful(first: str = "a") -> onnx.ModelProto:
    """Three layers; in one weight a channel that nothing reads makes the scale too coarse."""
    arrays = weights(u=(32, 32), v=(32, 32), w=(32, 8))
    name, reader = {"a": ("u", "v"), "b": ("v", "w")}[first]
    arrays[name][:, 0] *= 3000
    arrays[reader][0] = 0
    text = "a = Gemm(x, u) r = Relu(a) b = Gemm(r, v) s = Relu(b) y = Gemm(s, w)"
    return sketch(f"(float[n,32] x) => (float[n,8] y) {{ {text} }}", arrays)


def deep(layers: int) -> onnx.ModelProto:
    """That many layers, every one a little wrong in 4 bits."""
    arrays = weights(**{f"w{i}": (32, 32) for i in range(layers)})
    chain = " ".join(f"l{i + 1} = MatMul(l{i}, w{i})" for i in range(layers)).replace(
        f"l{layers} =", "y ="
    )
    return sketch(
        f"(float[n,32] x) => (float[n,32] y) {{ {chain.replace('MatMul(l0,', 'MatMul(x,')} }}",
        arrays,
    )


def loud() -> onnx.ModelProto:
    """Three convolutions; one input channel, which nothing reads, is too large for 8 bits."""
    arrays = weights(l=(1, 32, 1, 1), u=(32, 32, 1, 1), v=(32, 32, 1, 1), w=(8, 32, 1, 1))
    arrays["l"] = np.where(np.arange(32) == 0, 3000, 1).astype(np.float32).reshape(1, 32, 1, 1)
    arrays["u"][:, 0] = 0
    text = "{ m = Mul(x, l) a = Conv(m, u) r = Relu(a) b = Conv(r, v) s = Relu(b) y = Conv(s, w) }"
    return sketch(f"(float[n,32,1,1] x) => (float[n,8,1,1] y) {text}", arrays)


class Problem:
    """A calibrated model, its plan, and a bench to judge by.

    timed_in  the runtime; None: speed is estimated by the share of integers
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        *,
        timed_in: Runtime | None = Runtime.ONNXRUNTIME,
        metric: str | None = None,
        **options: object,
    ) -> None:
        source = proto.SerializeToString()
        self.model = normalized(proto)
        self.plan = make_plan(self.model, QuantConfig.from_dict(options), TARGETS["x86"])
        specs = input_specs(source)
        x = np.random.default_rng(0).standard_normal((64, *specs[0].shape[1:]), dtype=np.float32)
        samples = open_samples(SampleSpec({"x": x}), specs)
        self.samples = samples
        self.calibrated = CalibratedModel(self.model, stats=observe(source, self.plan, samples))
        reference = Reference.run(source, samples)
        self.bench = Bench(reference, len(source), metric, seconds=0.005, timed_in=timed_in)

    def search(self, contract: Contract | None = None):
        return search(self.calibrated, self.plan, self.bench, contract)


def in_float(candidate) -> set[str]:
    return {n.node for n in candidate.plan.nodes if n.weights and not n.is_rounded}


@pytest.fixture
def judged(monkeypatch) -> list[str]:
    """Labels of the candidates that were judged."""
    labels: list[str] = []

    def counted(method):
        judge = getattr(Bench, method)

        def counting(bench, candidate):
            labels.append(candidate.label)
            return judge(bench, candidate)

        return counting

    for method in ("judge", "judge_fidelity"):
        monkeypatch.setattr(Bench, method, counted(method))
    return labels


HARD = {"mode": "weight_only", "per_channel": False, "bias_correction": False}


@pytest.mark.parametrize("node", ["a", "b"])
def test_the_node_that_costs_accuracy_is_promoted_and_no_other(node):
    problem = Problem(harmful(node), timed_in=None, **HARD)

    free, kept = problem.search(), problem.search(Contract("sqnr", min=25.0))

    assert free.trace[0]["sqnr_db"] < 20
    assert (free.best.is_above(free.best.aim), in_float(free.best)) == (True, {node})
    assert (kept.verdict, in_float(kept.best)) == ("met", {node})
    assert kept.best.sqnr_db >= 25


def test_a_contract_that_is_satisfied_promotes_nothing(judged):
    found = Problem(deep(3), mode="static").search(Contract("sqnr", min=15.0))

    assert (found.verdict, in_float(found.best)) == ("met", set())
    assert judged == ["static"]


@pytest.mark.parametrize("mode", ["static", "auto"])
def test_a_node_that_integers_spoil_computes_in_float_and_stays_small(mode):
    """Though storing weights alone would satisfy the contract too, at the speed of float."""
    problem = Problem(loud(), timed_in=None, mode=mode)

    found = problem.search(Contract("sqnr", min=25.0))

    assert found.verdict == "met"
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

    assert found.verdict == "met"
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

    assert found.verdict == "not_met"
    assert told in found.reason
    onnx.checker.check_model(ir.to_proto(found.best.model))


def test_a_contract_without_anything_quantized_still_ends():
    found = Problem(harmful(), mode="static", exclude=["*"]).search(
        Contract("agreement", min=0.0, min_speedup=1e6)
    )

    assert found.verdict == "not_met"


def test_what_float_itself_does_not_reach_promotes_nothing(tmp_path):
    value = "def value(outputs, labels): return float((outputs['y'] > 0).mean())"
    (tmp_path / "share_above_zero.py").write_text(value)
    metric = "share_above_zero:value"
    problem = Problem(deep(4), metric=metric, mode="weight_only")

    with code_allowed(tmp_path):
        free = problem.search()
        found = problem.search(Contract(metric, min=2.0))

    assert (found.verdict, in_float(found.best)) == ("not_met", in_float(free.best))
    assert "which float misses too" in found.reason
    assert found.best.size_bytes == free.best.size_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_evaluations_are_bounded_however_deep_the_model(judged, bits):
    problem = Problem(deep(45), mode="weight_only", bits=bits)

    found = problem.search(Contract("sqnr", min=500.0))

    assert found.verdict == "not_met"
    of_promotions = [
        1 + p.max_groups + 2 * p.max_groups.bit_length() for p in PROMOTIONS
    ]  # all groups, each group, bisection and what follows it
    assert len(judged) <= sum(of_promotions) + 1


def test_what_is_stored_in_4_bits_goes_to_8_before_it_goes_to_float():
    found = Problem(deep(4), mode="weight_only", bits=4).search(Contract("sqnr", min=20.0))

    assert found.verdict == "met"
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
    assert (kept.best.speedup, kept.verdict) == (1.0, "met")


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


def test_without_a_contract_a_fast_and_faithful_candidate_wins_and_the_trace_has_all_trials():
    problem = Problem(harmful(), mode="auto")

    found = problem.search()

    assert found.verdict == "none"
    assert found.best.label in {row["candidate"] for row in found.trace}
    assert found.trace[0]["candidate"] == "static"


def test_without_samples_the_plan_is_applied_as_it_is():
    problem = Problem(harmful(), mode="static")

    found = follow_plan(problem.calibrated, problem.plan, None)

    assert (found.best.plan, found.verdict, found.trace) == (problem.plan, "none", [])


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


def test_what_misses_its_size_alone_is_not_made_larger():
    problem = Problem(harmful(), mode="static")

    found = problem.search(Contract("sqnr", min=-50.0, max_size_ratio=0.01))

    assert found.verdict == "not_met"
    assert "size" in found.reason
    assert all(n.storage == "int8" for n in found.best.plan.nodes if n.weights)


def test_a_metric_that_fails_costs_the_verdict_not_the_model(tmp_path):
    (tmp_path / "failing_metric.py").write_text("def value(outputs, labels): return 1 / 0")
    problem = Problem(harmful(), metric="failing_metric:value", mode="static")

    with code_allowed(tmp_path):
        found = problem.search(Contract("failing_metric:value", min=0.5))

    assert found.verdict == "not_met"
    assert "failing_metric:value" in found.reason
    assert found.best.size_bytes > 0


def worth_a_trial(problem: Problem, trials: list[Trial]) -> list[Variant]:
    """The rows of VARIANTS that are worth a trial after these."""
    return [
        variant
        for variant in VARIANTS
        if may_be_worth_trying(variant, problem.plan, trials, None)
        and worth_trying(variant, variant.plan(problem.model, problem.plan), trials)
    ]


@pytest.mark.parametrize(("bits", "is_worth_it"), [(4, True), (8, False)])
def test_blocks_are_tried_if_there_are_4_bit_weights(bits, is_worth_it):
    problem = Problem(deep(3), bits=bits, layer_bits={"*": bits})
    dynamic = next(v for v in VARIANTS if v.matmul is Compute.DYNAMIC)
    plan = dynamic.plan(problem.model, problem.plan)
    trials = [Trial(dynamic.label, plan, ModelError("does not load"), dynamic)]

    variants = worth_a_trial(problem, trials)

    assert (Compute.BLOCKS in {v.matmul for v in variants}) == is_worth_it


@pytest.mark.parametrize(
    ("options", "sqnr_db", "is_worth_it"),
    [
        ({}, 40.0, True),
        ({}, 20.0, False),
        ({}, None, False),
        ({"per_channel": False}, 40.0, False),
        ({"bits": 4}, 40.0, False),
    ],
)
def test_one_scale_per_weight_is_tried_if_fidelity_is_to_spare(options, sqnr_db, is_worth_it):
    problem = Problem(deep(3), **options, layer_bits={"*": options.get("bits", 8)})
    dynamic = next(v for v in VARIANTS if v.matmul is Compute.DYNAMIC)
    plan = dynamic.plan(problem.model, problem.plan)
    judged = problem.bench.judge_fidelity(problem.calibrated.build(plan, dynamic.label))
    outputs = tuple(replace(o, sqnr_db=sqnr_db) for o in judged.fidelity.per_output)
    fidelity = replace(judged.fidelity, sqnr_db=sqnr_db, per_output=outputs)
    trials = [Trial(dynamic.label, plan, replace(judged, fidelity=fidelity), dynamic)]

    variants = worth_a_trial(problem, trials)

    assert any(v.granularity == PerTensor() for v in variants) == is_worth_it


@pytest.mark.parametrize(("speedup", "is_worth_it"), [(0.85, True), (0.75, False)])
def test_one_scale_per_weight_is_tried_where_it_could_make_up_for_what_integers_lose(
    speedup, is_worth_it
):
    problem = Problem(deep(3))
    trials = []
    for compute, speed in ((Compute.FLOAT, 1.0), (Compute.DYNAMIC, speedup)):
        choice = NodeChoice(compute)
        plan = with_choice(problem.model, problem.plan, ("l1", "l2", "y"), choice)
        judged = problem.bench.judge_fidelity(problem.calibrated.build(plan, str(compute)))
        trials.append(Trial(str(compute), plan, replace(judged, cost=Cost(1.0, speed))))

    variants = worth_a_trial(problem, trials)

    assert any(v.granularity == PerTensor() for v in variants) == is_worth_it


@pytest.mark.parametrize(("float_nodes", "is_worth_it"), [(0, False), (1, False), (2, True)])
def test_weights_that_are_only_stored_are_tried_where_most_nodes_compute_in_float(
    float_nodes, is_worth_it
):
    problem = Problem(convs())
    nodes = [n.node for n in problem.plan.nodes if n.weights][:float_nodes]
    plan = with_choice(problem.model, problem.plan, nodes, IN_FLOAT)
    judged = problem.bench.judge_fidelity(problem.calibrated.build(plan, "fast and faithful"))
    trials = [Trial("fast and faithful", plan, replace(judged, cost=Cost(1.0, 1.5)))]

    assert trials[0].candidate.reaches_aim
    assert (VARIANTS[-1] in worth_a_trial(problem, trials)) == is_worth_it


@pytest.mark.parametrize(
    ("speedup", "is_above", "is_worth_it"),
    [(0.8, True, True), (1.3, True, True), (2.0, True, False), (2.0, False, True)],
)
def test_dynamic_convs_are_tried_where_static_ones_are_slow_or_inexact(
    speedup, is_above, is_worth_it
):
    problem = Problem(convs())
    judged = problem.bench.judge_fidelity(problem.calibrated.build(problem.plan, "static"))
    outputs = judged.fidelity.per_output
    if not is_above:
        outputs = tuple(replace(o, centred_db=15.0, lower_db=14.0) for o in outputs)
    judged = replace(judged, fidelity=replace(judged.fidelity, per_output=outputs))
    trials = [Trial("static", problem.plan, replace(judged, cost=Cost(1.0, speedup)), VARIANTS[0])]

    tried = [v for v in worth_a_trial(problem, trials) if v.pointwise is not None]

    assert bool(tried) == is_worth_it
    if tried:
        plan = tried[0].plan(problem.model, problem.plan)
        assert {str(n.compute) for n in plan.nodes if n.weights} == {"dynamic"}


def test_coarse_weights_are_stored_in_16_bits_where_their_node_goes_into_float():
    problem = Problem(convs())
    candidate = problem.calibrated.build(problem.plan, "static")
    noisy = replace(candidate.quantized, weight_sqnr_db={"a": 30.0, "b": 44.0, "y": 30.0})
    candidate = replace(candidate, quantized=noisy)

    assert coarse_weights(candidate, ["a", "b"]) == ["a"]


def test_weights_with_one_scale_are_not_coarse_in_float_where_each_channel_has_its_own():
    problem = Problem(deep(2), mode="dynamic")
    one_scale = NodeChoice(granularity=PerTensor())
    plan = with_choice(problem.model, problem.plan, ["l1", "y"], one_scale)
    candidate = problem.calibrated.build(plan, "one scale")
    noisy = replace(candidate.quantized, weight_sqnr_db={"l1": 30.0, "y": 30.0})

    assert coarse_weights(replace(candidate, quantized=noisy), ["l1", "y"]) == []


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


@pytest.mark.parametrize(
    ("output", "is_worth_it"),
    [
        (("int64", "", "y = ArgMax<axis = 1, keepdims = 0>(b)"), False),
        (("float", ",32", "y = Identity(b)"), True),
    ],
    ids=["integer", "float"],
)
def test_fidelity_that_is_unknown_is_not_spent(output, is_worth_it):
    """Of integer outputs only the agreement is known."""
    text = "(float[n,32] x) => ({0}[n{1}] y) {{ a = MatMul(x, u) b = MatMul(a, v) {2} }}"
    model = sketch(text.format(*output), weights(u=(32, 32), v=(32, 32)))

    found = Problem(model, timed_in=None).search()  # so that no candidate is faster by luck

    one_scale = next(v for v in VARIANTS if v.granularity == PerTensor())
    assert (one_scale.label in {row["candidate"] for row in found.trace}) == is_worth_it


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


@pytest.mark.parametrize(("others_ms", "can_gain"), [(99.0, False), (1.0, True)])
def test_where_integers_cannot_gain_weights_are_only_stored(monkeypatch, others_ms, can_gain):
    products = Kernel("l1", "MatMul", Arithmetic.FLOAT32, 1.0, covers=("l1", "y"))
    others = Kernel("f", "STFT", Arithmetic.FLOAT32, others_ms, covers=("f",))
    monkeypatch.setattr(possible_gain, "profile_kernels", lambda *_, **__: [products, others])
    monkeypatch.setattr(possible_gain, "QUICK_S", 0.0)

    found = Problem(deep(2)).search()

    tried = [row["candidate"] for row in found.trace]
    assert (tried != ["weight-only"]) is can_gain


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
    assert found.verdict == "met"
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

    groups = float_groups(problem.calibrated, start, problem.bench, lambda _: None)

    assert groups == [["b"], ["a"]]


def test_of_a_single_node_that_computes_in_integers_nothing_is_measured():
    problem = Problem(
        sketch("(float[n,32] x) => (float[n,32] y) { y = MatMul(x, u) }", weights(u=(32, 32)))
    )
    start = problem.bench.judge(problem.calibrated.build(problem.plan, "static"))

    groups = float_groups(problem.calibrated, start, problem.bench, pytest.fail)

    assert groups == [["y"]]


def test_a_sum_that_a_convolution_adds_itself_costs_float_nothing():
    arrays = weights(u=(16, 16, 1, 1), v=(16, 16, 1, 1), w=(16, 16, 1, 1))
    text = "{ a = Conv(x, u) b = Conv(a, v) s = Add(b, a) y = Conv(s, w) }"
    proto = sketch(f"(float[n,16,8,8] x) => (float[n,16,8,8] y) {text}", arrays)
    problem = Problem(proto, mode="static")
    candidate = problem.calibrated.build(problem.plan, "static")

    costs, _ = node_costs(problem.model, candidate, problem.bench)

    assert [node for node, cost in costs.items() if cost.float_ms == LEAST_MS] == ["s"]


def convs() -> onnx.ModelProto:
    """Three convolutions that 8 bits hardly harm."""
    arrays = weights(u=(32, 32, 1, 1), v=(32, 32, 1, 1), w=(32, 32, 1, 1))
    text = "{ a = Conv(x, u) r = Relu(a) b = Conv(r, v) s = Relu(b) y = Conv(s, w) }"
    return sketch(f"(float[n,32,1,1] x) => (float[n,32,1,1] y) {text}", arrays)


def openvino_with(
    monkeypatch, slow: str, cannot_run: str = "", conversion_ms: float | None = None
) -> None:
    """From now on this Conv takes ten times as long in integers in OpenVINO, the others half.

    cannot_run     which models do not run there: "float", or "integers" for the slow Conv in
                   integers
    conversion_ms  of the kernel that a QuantizeLinear becomes; None: it is merged into another
    """

    def is_rounded(node: ir.Node) -> bool:
        return node.op_type == "Conv" and graph.is_dequantized(node.inputs[0])

    def kernels(model: ir.Model) -> list[Kernel]:
        convs = [n for n in model.graph if n.op_type in ("Conv", "FusedConv")]
        ms = {n: (10.0 if n.name == slow else 0.5) if is_rounded(n) else 1.0 for n in convs}
        if conversion_ms is not None:
            conversions = [n for n in model.graph if n.op_type == "QuantizeLinear"]
            ms |= dict.fromkeys(conversions, conversion_ms)
        return [Kernel(n.name, n.op_type, Arithmetic.INT8, t, (n.name,)) for n, t in ms.items()]

    def race(original: object, model: ir.Model, *_: object) -> Cost:
        if cannot_run == "float":
            raise ModelError("OpenVINO cannot run it", str(original))
        if cannot_run and any(is_rounded(n) for n in model.graph if n.name == slow):
            raise ModelError("OpenVINO cannot run it", "model.onnx")
        return Cost(3.0, 3.0 / sum(kernel.ms for kernel in kernels(model)))

    def profile(models: Sequence[ir.Model], *_: object) -> list[list[Kernel]]:
        return [kernels(model) for model in models]

    monkeypatch.setattr("quant_core.search.bench.race_in_openvino", race)
    monkeypatch.setattr("quant_core.search.node_costs.profile_in_openvino", profile)


def test_a_node_that_integers_slow_in_openvino_computes_in_float_there(monkeypatch):
    problem = Problem(convs(), timed_in=Runtime.OPENVINO, mode="static")
    slow = problem.plan.nodes[1].node
    openvino_with(monkeypatch, slow)

    best = problem.search().best

    assert [n.node for n in best.plan.nodes if n.compute is Compute.FLOAT] == [slow]
    assert best.speedup == pytest.approx(3.0 / 2.0)


def test_a_conversion_takes_in_openvino_what_its_own_kernel_takes(monkeypatch):
    """And nothing where it is merged into the kernel that writes the tensor."""
    problem = Problem(convs(), timed_in=Runtime.OPENVINO, mode="static")
    candidate = problem.calibrated.build(problem.plan, "static")

    def of_inputs(conversion_ms: float | None) -> list[float]:
        openvino_with(monkeypatch, "", conversion_ms=conversion_ms)
        tensors = node_costs(problem.model, candidate, replace(problem.bench, costs=TimingCache()))[
            1
        ]
        return [tensor.conversion_ms for tensor in tensors if tensor.writer is None]

    assert of_inputs(0.6) == [0.6]
    assert of_inputs(None) == [LEAST_MS]


def test_what_openvino_cannot_run_is_not_chosen(monkeypatch):
    problem = Problem(convs(), timed_in=Runtime.OPENVINO)
    slow = problem.plan.nodes[1].node
    openvino_with(monkeypatch, slow, cannot_run="integers")

    found = problem.search()

    assert "OpenVINO cannot run it" in found.trace[0]["error"]
    assert slow in {n.node for n in found.best.plan.nodes if n.compute is Compute.FLOAT}


def test_where_openvino_cannot_run_the_float_model_nothing_is_timed(monkeypatch):
    problem = Problem(convs(), timed_in=Runtime.OPENVINO, mode="static")
    openvino_with(monkeypatch, "", cannot_run="float")

    best = problem.search().best

    assert best.speedup is None
    assert all(n.compute.is_integer for n in best.plan.nodes)
