"""Sizes that a user fixes: the file states them, and what follows from them is computed once."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import quant_core
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError, RequestError
from quant_core.model.fix_shape import fixed_shapes
from quant_core.model.info import model_info
from quant_core.worker import stages
from tests.models import sketch

RNG = np.random.default_rng(0)
CONSTANTS = {
    "w": RNG.normal(size=(6, 16)).astype(np.float32),
    "v": RNG.normal(size=(16, 16)).astype(np.float32),
    "zero": np.array(0),
    "one": np.array(1),
    "axis": np.array([0]),
    "inner": np.array([1]),
    "minus": np.array([-1]),
    "sixteen": np.array([16]),
}
# One step of a sequence is treated as a vector; more are summed.
TEXT = """(float[batch, steps, 6] x, float[batch, 16] state)
          => (float[batch, 16] y, float[rows, 16] z) {
    h = MatMul(x, w) s = Shape(x) t = Gather(s, one) q = Equal(t, one)
    k = If (q) <then_branch = single () => (float[n, d] a) { a = Squeeze(h, inner) },
                else_branch = several () => (float[n, d] a) { a = ReduceSum<keepdims = 0>(h, inner) }>
    r = Relu(k) p = MatMul(r, v) y = Add(p, state)
    b = Gather(s, zero) m = Mul(b, t) u = Unsqueeze(m, axis) c = Concat<axis = 0>(u, sixteen)
    z = Reshape(h, c) }"""  # noqa: E501


@pytest.fixture
def model(tmp_path) -> Path:
    onnx.save(sketch(TEXT, CONSTANTS), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def data(tmp_path) -> Path:
    x = RNG.normal(size=(8, 1, 6)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, state=RNG.normal(size=(8, 16)).astype(np.float32))
    return tmp_path / "d.npz"


def shapes(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("sizes", [{"batch": 1, "steps": 1}, {"state:0": 1, "x:1": 1}])
def test_the_file_states_fixed_sizes_and_what_follows_from_them(model, data, tmp_path, sizes):
    output = tmp_path / "o.onnx"

    quant_core.optimize_model(model, output, data, fix_shape=sizes)

    assert shapes(output) == {"x": [1, 1, 6], "state": [1, 16], "y": [1, 16], "z": [1, 16]}
    assert operators(output).isdisjoint({"If", "Shape", "Gather", "Concat", "Equal"})
    found = quant_core.validate_model(model, output, data)
    assert found.fidelity.sqnr_db > 100


def test_a_size_alone_decides_what_depends_on_it_alone(model, tmp_path):
    output = tmp_path / "o.onnx"

    quant_core.optimize_model(model, output, fix_shape={"steps": 1})

    assert shapes(output)["x"] == ["batch", 1, 6]
    assert operators(output).isdisjoint({"If", "Equal"})


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
def test_a_quantized_file_has_the_fixed_sizes_and_its_plan_makes_it_again(
    model, data, tmp_path, mode
):
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    config = quant_core.QuantConfig(mode=mode, fix_shape={"batch": 2, "steps": 1})

    made = quant_core.quantize_model(model, first, config, calibration=data)
    quant_core.quantize_model(model, second, plan=made.plan, calibration=data)

    assert shapes(first)["x"] == [2, 1, 6]
    assert first.read_bytes() == second.read_bytes()
    assert quant_core.benchmark_model(model, first, data, seconds=0.01).speedup > 0
    found = quant_core.validate_model(model, first, data, detailed=True)
    assert found.fidelity.sqnr_db > 20


def test_a_worker_makes_it_stage_by_stage(model, data, tmp_path):
    config = quant_core.QuantConfig(fix_shape={"batch": 1, "steps": 1}).to_dict()
    samples, output = SampleSpec(str(data)).to_dict(), str(tmp_path / "q.onnx")

    made = stages.prepare(str(model), str(tmp_path), config, samples)
    plan, stats = str(tmp_path / "plan.json"), str(tmp_path / "stats")
    stages.calibrate(made["prepared"], plan, samples, (0, 1), stats)
    stages.quantize(str(model), made["prepared"], plan, [stats], samples, None, samples, output)
    found = stages.validate(str(model), output, samples, None, made["prepared"])

    assert shapes(tmp_path / "q.onnx")["state"] == [1, 16]
    assert found["fidelity"]["samples"] == 8
    assert stages.benchmark(str(model), output, samples, 1, 0.01)["timing"]["rounds"] > 0


def test_samples_of_another_size_are_refused(model, data, tmp_path):
    with pytest.raises(DataError, match=r"x float32\[1, 2, 6\]"):
        quant_core.optimize_model(
            model, tmp_path / "o.onnx", data, fix_shape={"batch": 1, "steps": 2}
        )

    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"bacth": 1}, r"fix_shape.bacth: is no open size of the model.*Did you mean batch\?"),
        ({"x:3": 1}, r"fix_shape.x:3: is no open size.*x\[batch, steps, 6\]"),
        ({"stat:0": 1}, r"Did you mean state:0\?"),
        ({"x:2": 4}, r"fix_shape.x:2: is 4, but the model fixes it to 6"),
        ({"batch": 1, "state:0": 2}, r"fix_shape.state:0: is 2, but the model fixes it to 1"),
    ],
)
def test_a_wrong_size_is_an_error_that_names_the_right_ones(model, tmp_path, sizes, problem):
    with pytest.raises(RequestError) as caught:
        quant_core.optimize_model(model, tmp_path / "o.onnx", fix_shape=sizes)

    assert re.search(problem, str(caught.value))


def test_a_size_without_a_name_and_a_name_with_a_colon_are_found():
    inputs = {"image:0": (None, 3, "h", "w"), "scale": ()}

    assert fixed_shapes(inputs, {"image:0:0": 2, "h": 8})["image:0"] == (2, 3, 8, "w")


def test_info_of_an_optimized_file_shows_the_sizes(model, tmp_path):
    quant_core.optimize_model(model, tmp_path / "o.onnx", fix_shape={"batch": 4})

    found = model_info(tmp_path / "o.onnx").to_dict()
    assert found["inputs"][0]["shape"] == (4, "steps", 6)
