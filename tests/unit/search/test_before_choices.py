"""A model that ends in a choice among close results is judged by these."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core import api
from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.judging import validate_model
from quant_core.model.session import open_session, run
from quant_core.plan.types import Storage
from tests.models import sketch
from tests.oracle.cases import weights

BOXES = 256


@pytest.fixture
def detector(tmp_path) -> Path:
    """One that finds nothing: all of its scores are alike."""
    path = tmp_path / "m.onnx"
    text = """(float[1,3,32,32] x) => (float[1,20] best, float[1,20,4] boxes) {
        a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, u) r = Relu(a)
        b = Conv<pads = [1, 1, 1, 1]>(r, v) s = Relu(b)
        p = Conv(s, w) rows = Reshape(p, to) all = Transpose<perm = [0, 2, 1]>(rows)
        c = ReduceMax<axes = [2], keepdims = 0>(all) d = Mul(c, tenth) score = Sigmoid(d)
        best, which = TopK(score, k) one = Unsqueeze(which, last)
        four = Expand(one, shape) boxes = GatherElements<axis = 1>(all, four)
    }"""
    tensors = weights(u=(32, 3, 3, 3), v=(64, 32, 3, 3), w=(4, 64, 1, 1)) | {
        "to": np.array([1, 4, BOXES]),
        "last": np.array([2]),
        "tenth": np.array(1e-3, np.float32),
        "k": np.array([20]),
        "shape": np.array([1, 20, 4]),
    }
    onnx.save(sketch(text, tensors), path)
    return path


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((12, 1, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_comes_first_of_close_results_keeps_no_weight_in_float(
    detector, images, tmp_path, bits
):
    made = api.quantize_model(
        detector, tmp_path / "q.onnx", QuantConfig(bits=bits), calibration=images
    )

    assert not made.shortfall
    assert {n.storage for n in made.plan.nodes if n.weights} <= {Storage.INT8, Storage.INT4}
    assert "judged by what the model chooses from" in made.note
    found = run(open_session(tmp_path / "q.onnx"), {"x": images[0]})
    assert [x.shape for x in found] == [(1, 20), (1, 20, 4)]


def test_validate_says_what_the_results_before_the_choice_have(detector, images, tmp_path):
    made = api.quantize_model(detector, tmp_path / "q.onnx", calibration=images)

    found = validate_model(detector, tmp_path / "q.onnx", images).fidelity

    assert made.worst_db is not None
    shown = re.search(r"ends in a choice among results, which have ([\d.]+) dB", found.note)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(made.worst_db, abs=3)


def test_validate_says_nothing_of_choices_where_there_are_none(tmp_path, images):
    text = "(float[1,3,32,32] x) => (float[1,8,30,30] y) { y = Conv(x, w) }"
    onnx.save(sketch(text, weights(w=(8, 3, 3, 3))), tmp_path / "m.onnx")

    assert not validate_model(tmp_path / "m.onnx", tmp_path / "m.onnx", images).fidelity.note


def test_a_plan_that_was_found_before_the_choice_makes_the_same_file(detector, images, tmp_path):
    made = api.quantize_model(detector, tmp_path / "a.onnx", calibration=images)

    again = api.quantize_model(detector, tmp_path / "b.onnx", plan=made.plan, calibration=images)

    assert again.plan == made.plan
    assert not again.shortfall
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_contract_is_on_what_comes_out(detector, images, tmp_path):
    contract = Contract("sqnr", min=60.0)

    made = api.quantize_model(
        detector, tmp_path / "q.onnx", calibration=images, evaluation=images, contract=contract
    )

    assert "judged by what the model chooses from" not in made.note


def test_layers_behind_a_choice_are_part_of_the_search(tmp_path, images):
    text = """(float[1,3,32,32] x) => (float[1,4] y) {
        rows = Reshape(x, to) a = MatMul(rows, u) s = ReduceMax<axes = [2], keepdims = 0>(a)
        best, which = TopK(s, k) one = Unsqueeze(which, last) many = Expand(one, shape)
        few = GatherElements<axis = 1>(a, many) flat = Reshape(few, row) y = MatMul(flat, w)
    }"""
    tensors = weights(u=(64, 64), w=(256, 4)) | {
        "to": np.array([1, 48, 64]),
        "last": np.array([2]),
        "k": np.array([4]),
        "shape": np.array([1, 4, 64]),
        "row": np.array([1, 256]),
    }
    onnx.save(sketch(text, tensors), tmp_path / "m.onnx")

    made = api.quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", calibration=images)

    assert "judged by what the model chooses from" not in made.note


@pytest.mark.parametrize(
    "experts",
    [
        "w = GatherND(u, one)",
        """w = If(b) <then_branch = yes () => (float[2,64,64] t) { t = GatherND(u, one) },
                else_branch = no () => (float[2,64,64] f) { f = GatherND(v, one) }>""",
    ],
    ids=["through an Identity", "inside branches"],
)
def test_experts_that_a_choice_gathers_are_part_of_the_search(tmp_path, experts):
    text = f"""(float[1,64] x, bool b) => (float[2,64] y) {{
        a = MatMul(x, r) p = Softmax(a) best, which = TopK(p, k) row = Squeeze(which, first)
        one = Unsqueeze(row, mid) {experts}
        h = Unsqueeze(x, mid) e = MatMul(h, w) y = ReduceSum<keepdims = 0>(e, mid)
    }}"""
    tensors = weights(r=(64, 8), u=(8, 64, 64), v=(8, 64, 64)) | {
        "k": np.array([2]),
        "first": np.array([0]),
        "mid": np.array([1]),
    }
    onnx.save(sketch(text, tensors), tmp_path / "m.onnx")

    made = api.quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", QuantConfig(bits=4))
    found = validate_model(tmp_path / "m.onnx", tmp_path / "q.onnx", SampleSpec(count=4)).fidelity

    assert "judged by what the model chooses from" not in made.note
    assert "ends in a choice" not in found.note
