"""Tuned biases absorb the mean error of a quantized model, where outputs come nearer by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core import api
from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import Samples, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.outputs import run_all
from quant_core.model.session import open_session
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import QuantPlan
from quant_core.rewrite.apply import apply_plan
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.tune_biases import tune_biases
from tests.models import normalized, sketch

NETWORKS = {
    "convolutions": "(float[n,6,8,8] x) => (float[n,6,8,8] y) { "
    "a = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(a)"
    " c = Conv<pads = [1, 1, 1, 1]>(r, v, b) s = Relu(c) y = Conv<pads = [1, 1, 1, 1]>(s, u, b) }",
    "matrices": "(float[n,6] x) => (float[n,6] y) { a = Gemm(x, w, b) r = Relu(a) "
    "c = Gemm(r, v, b) s = Relu(c)"
    " y = Gemm(s, u, b) }",
}


def network(name: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shape = (6, 6, 3, 3) if name == "convolutions" else (6, 6)
    arrays = {k: rng.standard_normal(shape).astype(np.float32) / 3 for k in "wvu"}
    return sketch(NETWORKS[name], arrays | {"b": rng.standard_normal(6).astype(np.float32)})


def problem(name: str) -> tuple[ir.Model, ir.Model, object, Samples]:
    """A float model, a quantized one whose biases are all a little wrong, its plan, and samples."""
    proto = network(name)
    model = normalized(proto)
    plan = make_plan(model, QuantConfig(mode="static"), TARGETS["x86"])
    x = np.random.default_rng(1).standard_normal(
        (24, 6, *[8] * (name == "convolutions") * 2), dtype=np.float32
    )
    samples = open_samples(SampleSpec({"x": x}), input_specs(proto.SerializeToString()))
    quantized = apply_plan(model, plan, observe(model, plan, samples))
    spoil_biases(quantized.model)
    return model, quantized, plan, samples


def spoil_biases(model: ir.Model) -> None:
    """Edit in place: every integer bias becomes a little wrong."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.INT32:
            value.const_value = ir.tensor(value.const_value.numpy() * 9 // 10, name=value.name)


def means(model: ir.Model, samples: Samples) -> np.ndarray:
    session = open_session(model)
    y = np.concatenate([session.run(None, feed)[0] for feed in samples])
    return y.mean((0, *range(2, y.ndim)))


@pytest.mark.parametrize("name", NETWORKS)
def test_mean_outputs_come_back_to_those_of_float_and_both_models_stay_as_they_are(name):
    model, quantized, plan, samples = problem(name)
    before = [ir.to_proto(m).SerializeToString() for m in (model, quantized.model)]

    found = tune_biases(model, quantized, plan, samples)

    exact, wrong, right = (means(m, samples) for m in (model, quantized.model, found.model))
    assert np.abs(right - exact).max() < np.abs(wrong - exact).max() / 5
    assert [ir.to_proto(m).SerializeToString() for m in (model, quantized.model)] == before


def test_tuned_biases_hardly_move_when_they_are_tuned_again():
    model, quantized, plan, samples = problem("convolutions")

    once = tune_biases(model, quantized, plan, samples)
    twice = tune_biases(model, once, plan, samples)

    assert (
        twice is None
        or np.abs(means(twice.model, samples) - means(once.model, samples)).max() < 0.01
    )


def test_what_is_chance_in_the_means_of_a_few_samples_is_left_out():
    """Right biases, tuned on few samples, cost others hardly any of their outputs' SQNR."""
    proto = network("matrices")
    model = normalized(proto)
    plan = make_plan(
        model, QuantConfig(mode="static", min_elements=0, method="mse"), TARGETS["x86"]
    )
    x = np.random.default_rng(1).standard_normal((204, 6), dtype=np.float32)
    few, others = (
        open_samples(SampleSpec({"x": part}), input_specs(proto.SerializeToString()))
        for part in (x[:4], x[4:])
    )
    quantized = apply_plan(model, plan, observe(model, plan, others))

    tuned = tune_biases(model, quantized, plan, few)

    exact, before, after = (
        run_all(open_session(m), others) for m in (model, quantized.model, tuned.model)
    )
    db = [compare(exact, found, ["y"]).sqnr_db for found in (before, after)]
    assert db[1] > db[0] - 0.2


def test_a_model_without_integer_biases_has_none_to_tune():
    model, _, _, samples = problem("matrices")
    plan = make_plan(model, QuantConfig(mode="weight_only"), TARGETS["x86"])

    assert tune_biases(model, apply_plan(model, plan, None), plan, samples) is None


@pytest.fixture
def wrong_biases(monkeypatch):
    """All that is built has biases that are a little wrong."""
    build = CalibratedModel.build

    def with_wrong_biases(*args):
        candidate = build(*args)
        spoil_biases(candidate.model)
        return candidate

    monkeypatch.setattr(CalibratedModel, "build", with_wrong_biases)


def quantized(folder: Path, name: str = "q", samples: int = 24, **how: object) -> api.QuantResult:
    """The convolutions with static integers."""
    onnx.save(network("convolutions"), folder / "float.onnx")
    x = np.random.default_rng(1).standard_normal((samples, 6, 8, 8), dtype=np.float32)
    how = how or {"config": QuantConfig(mode="static")}
    return api.quantize_model(folder / "float.onnx", folder / f"{name}.onnx", calibration=x, **how)


def test_a_plan_says_what_tuned_biases_gained_and_tunes_them_in_the_same_way(
    tmp_path, wrong_biases
):
    made = quantized(tmp_path)
    again = quantized(tmp_path, "again", plan=QuantPlan.from_json(made.plan.to_json()))

    *_, tuned = made.trace
    untuned = str(tuned["candidate"]).removesuffix(", biases tuned")
    before = next(row for row in made.trace if row["candidate"] == untuned)
    assert made.chosen == tuned["candidate"] != untuned
    assert made.plan.tuned_biases_db == tuned["sqnr_db"] - before["sqnr_db"] > 1
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()


def test_biases_are_tuned_once_with_the_ranges_of_all_samples(tmp_path, monkeypatch, wrong_biases):
    tuned = []
    tune = CalibratedModel.tune_biases
    monkeypatch.setattr(
        CalibratedModel, "tune_biases", lambda self, best: tuned.append(best) or tune(self, best)
    )

    made = quantized(tmp_path, samples=40)
    assert [best.plan.holdout for best in tuned] == [made.plan.holdout] == [4]

    again = quantized(tmp_path, "again", 40, plan=QuantPlan.from_json(made.plan.to_json()))
    assert made.plan.tuned_biases_db > 1
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()


def test_biases_that_the_judges_rate_lower_are_not_taken(tmp_path, monkeypatch):
    def wrongly_tuned(_, candidate):
        model = candidate.model.clone()
        spoil_biases(model)
        return replace(candidate.quantized, model=model)

    monkeypatch.setattr(CalibratedModel, "tune_biases", wrongly_tuned)

    made = quantized(tmp_path)

    *_, before, tuned = made.trace
    assert tuned["sqnr_db"] < before["sqnr_db"]
    assert made.chosen == before["candidate"]
    assert made.plan.tuned_biases_db == 0
