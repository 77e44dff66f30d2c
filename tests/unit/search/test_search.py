"""The search keeps the contract with what must be restored and no more, says so if it cannot, and always ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import observe
from quant_core.config import Contract, QuantConfig
from quant_core.data.samples import input_specs, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import ModelError
from quant_core.evaluate.layer_report import layer_reports
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.search.calibrated import Material
from quant_core.search.candidate import Bench
from quant_core.search.keeping import is_expected_to_keep, keeping
from quant_core.search.mixed_precision import MAX_EVALUATIONS, restored
from quant_core.search.search import ONE_SCALE, search, variants
from tests.models import normalized, sketch
from tests.oracle.cases import weights


def harmful(first: str = "a") -> onnx.ModelProto:
    """Three layers; in the weight of one, a channel that nothing reads makes the scale too coarse for all others."""
    arrays = weights(u=(32, 32), v=(32, 32), w=(32, 8))
    name, reader = {"a": ("u", "v"), "b": ("v", "w")}[first]
    arrays[name][:, 0] *= 3000
    arrays[reader][0] = 0
    text = "(float[n,32] x) => (float[n,8] y) { a = Gemm(x, u) r = Relu(a) b = Gemm(r, v) s = Relu(b) y = Gemm(s, w) }"
    return sketch(text, arrays)


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
    """Three convolutions; of the input a channel is so loud that 8 bits spoil the others, and nobody reads it."""
    arrays = weights(l=(1, 32, 1, 1), u=(32, 32, 1, 1), v=(32, 32, 1, 1), w=(8, 32, 1, 1))
    arrays["l"] = np.where(np.arange(32) == 0, 3000, 1).astype(np.float32).reshape(1, 32, 1, 1)
    arrays["u"][:, 0] = 0
    text = "{ m = Mul(x, l) a = Conv(m, u) r = Relu(a) b = Conv(r, v) s = Relu(b) y = Conv(s, w) }"
    return sketch(f"(float[n,32,1,1] x) => (float[n,8,1,1] y) {text}", arrays)


class Problem:
    """A model, what is asked of it, and a bench that counts."""

    def __init__(self, proto: onnx.ModelProto, **options: object) -> None:
        source = proto.SerializeToString()
        self.model = normalized(proto)
        self.plan = make_plan(self.model, QuantConfig.from_dict(options), TARGETS["x86"])
        specs = input_specs(source)
        x = np.random.default_rng(0).standard_normal((64, *specs[0].shape[1:]), dtype=np.float32)
        samples = open_samples(SampleSpec({"x": x}), specs)
        self.material = Material(self.model, stats=observe(source, self.plan, samples))
        self.bench = Bench(source, samples, len(source), seconds=0.005)

    def search(self, contract: Contract | None = None):
        return search(self.material, self.plan, self.bench, contract)


def in_float(candidate) -> set[str]:
    return {n.node for n in candidate.plan.nodes if n.weights and not n.is_rounded}


@pytest.fixture
def judged(monkeypatch) -> list[str]:
    """Names of the candidates that were evaluated."""
    names: list[str] = []
    judge = Bench.judge

    def counting(bench, candidate, **options):
        names.append(candidate.name)
        return judge(bench, candidate, **options)

    monkeypatch.setattr(Bench, "judge", counting)
    return names


HARD = {"mode": "weight_only", "per_channel": False, "bias_correction": False}


@pytest.mark.parametrize("node", ["a", "b"])
def test_the_node_that_hurts_is_restored_and_no_other(node):
    problem = Problem(harmful(node), **HARD)

    without, kept = problem.search(), problem.search(Contract("sqnr", min=25.0))

    assert without.best.sqnr_db < 25
    assert (kept.verdict, in_float(kept.best)) == ("met", {node})
    assert kept.best.sqnr_db >= 25


def test_a_contract_that_holds_restores_nothing(judged):
    found = Problem(deep(3), mode="static").search(Contract("sqnr", min=15.0))

    assert (found.verdict, in_float(found.best)) == ("met", set())
    assert judged == ["static"]


@pytest.mark.parametrize("mode", ["static", "auto"])
def test_a_node_that_integers_spoil_computes_in_float_and_stays_small(mode):
    """Though storing weights alone would keep the contract too, at the speed of float."""
    problem = Problem(loud(), mode=mode)
    problem.bench.is_host = False  # speed by the share of integers
    found = problem.search(Contract("sqnr", min=25.0))

    assert found.verdict == "met"
    assert {n.node: (n.compute, n.storage) for n in found.best.plan.nodes if n.weights} == {
        "a": ("float", "int8"), "b": ("static", "int8"), "y": ("static", "int8")
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


@pytest.mark.parametrize("bits", [8, 4])
def test_evaluations_are_bounded_however_deep_the_model(judged, bits):
    problem = Problem(deep(45), mode="weight_only", bits=bits)

    found = problem.search(Contract("sqnr", min=500.0))

    assert found.verdict == "not_met"
    assert len(judged) <= MAX_EVALUATIONS + 1


def test_what_is_stored_in_4_bits_goes_to_8_before_it_goes_to_float():
    found = Problem(deep(4), mode="weight_only", bits=4).search(Contract("sqnr", min=20.0))

    assert found.verdict == "met"
    assert {n.storage for n in found.best.plan.nodes} == {"int4", "int8"}


@pytest.mark.parametrize(
    ("contract", "options"),
    [(Contract("sqnr", min=500.0), {"mode": "weight_only", "bits": 4}), (None, {"mode": "static"})],
)
def test_a_restored_model_that_does_not_load_loses_none_of_the_others(
    monkeypatch, contract, options
):
    judge = Bench.judge

    def refusing(bench, candidate, **asked):
        if "nodes in" in candidate.name:
            raise ModelError("does not load")
        return judge(bench, candidate, **asked)

    monkeypatch.setattr(Bench, "judge", refusing)

    found = Problem(loud(), **options).search(contract)

    assert "nodes in" not in found.best.name
    assert [row["error"] for row in found.trace if "error" in row] == ["does not load"]


def test_agreement_that_is_luck_does_not_keep_a_contract_but_what_noise_leads_one_to_expect():
    problem = Problem(deep(2), mode="static")
    judged = problem.bench.judge(problem.material.build(problem.plan, "static"), timed=False)
    contract = Contract("agreement", min=0.85)

    def like(sqnr_db: float, agreement: float):
        outputs = tuple(replace(o, sqnr_db=sqnr_db) for o in judged.fidelity.per_output)
        return replace(
            judged, fidelity=replace(judged.fidelity, agreement=agreement, per_output=outputs)
        )

    seen = [like(10, 0.6), like(10, 0.64), like(16, 0.8)]
    lucky, sure = like(10, 0.9), like(22, 0.9)

    assert keeping([lucky, sure], contract, problem.bench) == [lucky, sure]
    expected = [
        is_expected_to_keep(c, contract, problem.bench, [*seen, lucky, sure]) for c in (lucky, sure)
    ]
    assert expected == [False, True]


def test_without_a_contract_what_is_fast_and_faithful_wins_and_all_that_was_tried_is_told():
    problem = Problem(harmful(), mode="auto")

    found = problem.search()

    assert found.verdict == "none"
    assert found.best.name in {row["candidate"] for row in found.trace}
    assert found.trace[0]["candidate"] == "static"


def test_without_samples_the_plan_is_applied_as_it_is():
    problem = Problem(harmful(), mode="static")

    found = search(problem.material, problem.plan, None)

    assert (found.best.plan, found.verdict, found.trace) == (problem.plan, "none", [])


def test_restoring_takes_names_as_they_are_not_as_globs():
    model = sketch(
        "(float[n,32] x) => (float[n,8] y) { a = Gemm(x, u) y = Gemm(a, w) }",
        weights(u=(32, 32), w=(32, 8)),
    )
    model.graph.node[0].name, model.graph.node[1].name = "block[1]/*?", "block1/ab"
    problem = Problem(model, mode="static")

    plan = restored(problem.model, problem.plan, {"block[1]/*?"})

    assert {n.node: n.storage for n in plan.nodes if n.compute == "float"} == {
        "block[1]/*?": "float16"
    }


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_layers_are_proven_safe_or_said_not_to_be(mode):
    problem = Problem(harmful(), mode=mode)
    unsafe = make_plan(problem.model, QuantConfig(mode=mode), TARGETS["x86-vnni"])

    rows, risky = (
        layer_reports(plan, problem.material.build(plan, mode).quantized)
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


def test_a_metric_that_fails_costs_the_verdict_not_the_model():
    problem = Problem(harmful(), mode="static")
    problem.bench.metric = "math:prod"

    found = problem.search(Contract("math:prod", min=0.5))

    assert found.verdict == "not_met"
    assert "math:prod" in found.reason
    assert found.best.size_bytes > 0


@pytest.mark.parametrize(("bits", "raced"), [(4, True), (8, False)])
def test_blocks_are_raced_where_there_are_4_bit_weights(bits, raced):
    problem = Problem(deep(3), bits=bits, layer_bits={"*": bits})

    assert ("blocks" in dict(variants(problem.model, problem.plan, dict, bool))) == raced


@pytest.mark.parametrize(("asked", "spare", "raced"), [
    ({}, True, True), ({}, False, False), ({"per_channel": False}, True, False), ({"bits": 4}, True, False)
])  # fmt: skip
def test_one_scale_a_weight_is_raced_where_fidelity_is_to_spare(asked, spare, raced):
    problem = Problem(deep(3), **asked, layer_bits={"*": asked.get("bits", 8)})

    ways = dict(variants(problem.model, problem.plan, dict, lambda: spare))

    coarse = {
        name for name, plan in ways.items() for n in plan.nodes if n.granularity == PerTensor()
    }
    expected = {ONE_SCALE} if raced else set()
    assert coarse == (expected if asked.get("per_channel", True) else set(ways))


def test_fidelity_that_is_unknown_is_not_spent(judged):
    """Of integer outputs only agreement is known."""
    text = "(float[n,32] x) => ({0}[n{1}] y) {{ a = MatMul(x, u) b = MatMul(a, v) {2} }}"
    arrays = weights(u=(32, 32), v=(32, 32))
    for output in (
        ("int64", "", "y = ArgMax<axis = 1, keepdims = 0>(b)"),
        ("float", ",32", "y = Identity(b)"),
    ):
        problem = Problem(sketch(text.format(*output), arrays))
        problem.bench.is_host = False  # so that no candidate is faster by luck
        problem.search()

    half = judged.index("static", 1)
    assert not any("one scale" in name for name in judged[:half])
    assert any("one scale" in name for name in judged[half:])
