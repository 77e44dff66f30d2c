"""Nodes that draw random numbers give the same ones whenever a model is run, and in no file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.api import optimize_model, quantize_model
from quant_core.model import files
from quant_core.model.fixed_noise import with_fixed_noise
from quant_core.model.session import open_session, run
from tests.models import sketch
from tests.oracle.cases import weights

X = np.zeros((50, 40), np.float32)
MANY = "(float[50,40] x) => (float[50,40] y) {{ y = {} }}"


def drawn(model: onnx.ModelProto, x: np.ndarray = X) -> np.ndarray:
    return run(open_session(model.SerializeToString()), {"x": x})[0]


@pytest.mark.parametrize(
    ("node", "mean", "deviation"),
    [
        ("RandomNormalLike(x)", 0.0, 1.0),
        ("RandomNormalLike<mean = 3.0, scale = 0.5>(x)", 3.0, 0.5),
        ("RandomNormal<shape = [50, 40], mean = -1.0>()", -1.0, 1.0),
        ("RandomUniformLike<low = 2.0, high = 4.0>(x)", 3.0, 2 / 12**0.5),
        ("RandomUniform<shape = [50, 40]>()", 0.5, 1 / 12**0.5),
    ],
)
def test_numbers_are_the_same_in_each_run_and_distributed_as_the_node_says(node, mean, deviation):
    model = sketch(MANY.format(node))

    y = drawn(model)

    assert np.array_equal(y, drawn(model))
    assert y.shape == (50, 40)
    assert y.dtype == np.float32
    assert y.mean() == pytest.approx(mean, abs=0.1)
    assert y.std() == pytest.approx(deviation, rel=0.1)


def test_more_numbers_than_a_table_has_begin_anew():
    text = "(float[n,m] x) => (float[n,m] y) { y = RandomNormalLike(x) }"

    y = drawn(sketch(text), np.zeros((600, 500), np.float32)).ravel()

    assert np.array_equal(y[: len(y) - (1 << 18)], y[1 << 18 :])


def test_numbers_have_the_type_that_the_node_says_or_that_it_reads(tmp_path):
    text = "(double[4] x) => (double[4] y, float16[4] z)"
    text += " { y = RandomNormalLike(x) z = RandomNormalLike<dtype = 10>(x) }"
    onnx.save(sketch(text), tmp_path / "m.onnx")

    y, z = run(open_session(tmp_path / "m.onnx"), {"x": np.zeros(4)})

    assert (y.dtype, z.dtype) == (np.float64, np.float16)
    assert np.allclose(y, z, atol=1e-2)


def test_nodes_inside_a_branch_draw_the_same_and_inner_tensors_can_be_read(tmp_path):
    text = """(bool b, float[4] x) => (float[4] y)
        { y = If(b) <then_branch = g () => (float[4] t) { r = RandomNormalLike(x) t = Add(r, x) },
                     else_branch = h () => (float[4] e) { e = Identity(x) }> }"""
    onnx.save(sketch(text), tmp_path / "m.onnx")
    feed = {"b": np.array(True), "x": np.ones(4, np.float32)}

    first, second = (run(open_session(tmp_path / "m.onnx"), feed) for _ in range(2))

    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], feed["x"])
    assert with_fixed_noise(files.load(tmp_path / "m.onnx")) is not None


def test_a_model_without_such_nodes_stays_as_it_is(tmp_path):
    onnx.save(sketch(MANY.format("Identity(x)")), tmp_path / "Random.onnx")

    assert with_fixed_noise(files.load(tmp_path / "Random.onnx")) is None


def test_a_model_that_adds_noise_is_checked_and_its_files_still_draw(tmp_path):
    text = """(float[n,32] x) => (float[n,16] z)
        { y = MatMul(x, w) t = Mul(y, a) s = Add(t, b) r = RandomNormalLike(s) z = Add(s, r) }"""
    constants = weights(w=(32, 16), a=(16,), b=(16,))
    onnx.save(sketch(text, constants), tmp_path / "m.onnx")

    optimized = optimize_model(tmp_path / "m.onnx", tmp_path / "o.onnx")
    quantized = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx")

    assert optimized.rewrites
    assert not optimized.undone
    assert quantized.worst_db > 20
    assert "not checked" not in quantized.note
    for name in ("o.onnx", "q.onnx"):
        types = [node.op_type for node in onnx.load(tmp_path / name).graph.node]
        assert "RandomNormalLike" in types
        assert "Range" not in types
