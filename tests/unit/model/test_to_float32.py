"""Models in float16, bfloat16 and double compute in float32 and keep what they take and give."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from quant_core.api import quantize
from quant_core.errors import ModelError
from quant_core.model.info import model_info
from quant_core.model.prepare import prepare
from quant_core.model.to_float32 import to_float32
from tests.models import sketch

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "double": np.float64}


def weight(*shape, dtype=np.float16, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) / 8).astype(dtype)


def saved(path, model: onnx.ModelProto):
    onnx.save(model, path / "m.onnx")
    return path / "m.onnx"


def run(path, x):
    return ort.InferenceSession(path).run(None, {"x": x})[0]


def assert_near(original, quantized, x, dtype):
    """Both give that type, and numbers within 5 % of the largest."""
    expected, got = run(original, x), run(quantized, x)
    assert got.dtype == expected.dtype == dtype
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["float16", "double"])
def test_a_quantized_model_takes_and_gives_the_type_of_its_original(tmp_path, name):
    dtype = TYPES[name]
    weights = {k: weight(64, 64, dtype=dtype, seed=i) for i, k in enumerate("uv")}
    text = f"""({name}[n, 64] x) => ({name}[n, 64] y)
        {{ a = MatMul(x, u) b = Relu(a) y = MatMul(b, v) }}"""
    original = saved(tmp_path, sketch(text, weights))
    x = weight(4, 64, dtype=dtype, seed=9) * 8

    result = quantize(original, tmp_path / "q.onnx")

    assert_near(original, tmp_path / "q.onnx", x, dtype)
    assert result.size_bytes < 0.65 * result.float_size_bytes


WAYS = {
    "a sum over indices": 'y = Einsum<equation = "ij,jk->ik">(x, w)',
    "a shape": "s = Constant<value_ints = [64, 64]>() v = Reshape(w, s) y = MatMul(x, v)",
    "a stack": "v = Concat<axis = 0>(w, u) z = Concat<axis = 1>(x, x) y = MatMul(z, v)",
}


@pytest.mark.parametrize("body", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("name", ["float16", "double"])
def test_weights_that_reach_a_product_on_a_way_are_quantized(tmp_path, name, body):
    dtype = TYPES[name]
    weights = {"w": weight(64, 64, dtype=dtype)}
    if "(w, u)" in body:
        weights["u"] = weight(64, 64, dtype=dtype, seed=1)
    model = sketch(f"({name}[n, 64] x) => ({name}[n, 64] y) {{ {body} }}", weights)
    x = weight(4, 64, dtype=dtype, seed=9) * 8
    original = saved(tmp_path, model)

    result = quantize(original, tmp_path / "q.onnx")

    assert_near(original, tmp_path / "q.onnx", x, dtype)
    assert result.size_bytes < 0.75 * result.float_size_bytes


def test_bfloat16_weights_between_casts_are_quantized(tmp_path):
    weights = {"w": weight(64, 64, dtype=ml_dtypes.bfloat16)}
    text = """(float[n, 64] x) => (float[n, 64] y)
        { a = Cast<to = 16>(x) b = MatMul(a, w) y = Cast<to = 1>(b) }"""
    original = saved(tmp_path, sketch(text, weights))
    x = weight(4, 64, dtype=np.float32)

    quantize(original, tmp_path / "q.onnx")

    expected = x @ weights["w"].astype(np.float32)
    assert np.abs(run(tmp_path / "q.onnx", x) - expected).max() < 0.05 * np.abs(expected).max()


def test_what_stays_float_stays_float16_in_the_file(tmp_path):
    weights = {"w": weight(64, 64), "kept": weight(64, 64, seed=1)}
    text = "(float16[n, 64] x) => (float16[n, 64] y) { a = MatMul(x, w) y = MatMul(a, kept) }"
    original = saved(tmp_path, sketch(text, weights))

    quantize(original, tmp_path / "q.onnx", exclude=["kept"])

    written = onnx.load(tmp_path / "q.onnx")
    kept = {t.name: t.data_type for t in written.graph.initializer if list(t.dims) == [64, 64]}
    assert onnx.TensorProto.FLOAT16 in kept.values()
    assert onnx.TensorProto.FLOAT not in kept.values()


def test_constants_attributes_and_inner_graphs_are_converted(tmp_path):
    text = """(float16[n, 64] x, bool c) => (float16[n, 64] y) {
        a = MatMul(x, w)
        shape = Shape(a)
        s = ConstantOfShape<value = float16[1] {15360}>(shape)
        b = Mul(a, s)
        y = If(c) <then_branch = t () => (float16[n, 64] o) { o = Relu(b) },
                   else_branch = e () => (float16[n, 64] o) { o = Neg(b) }>
    }"""
    model = ir.from_proto(sketch(text, {"w": weight(64, 64)}))

    converted = to_float32(model)

    assert converted == {ir.DataType.FLOAT16}
    x, condition = np.ones((1, 64), np.float16), np.array(False)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    got = session.run(None, {"x": x, "c": condition})[0]
    assert got.dtype == np.float16
    assert np.allclose(got, -(x @ weight(64, 64)), atol=1e-2)


WRITTEN_BY_A_FUNCTION = """
    <ir_version: 8, opset_import: ["": 18, "own": 1]>
    g (TYPE[n, 64] x) => (TYPE[n, 64] y) { h = own.Layer(x, u) y = own.Layer(h, v) }
    <domain: "own", opset_import: ["": 18]>
    Layer (a, w) => (o) { m = MatMul(a, w) o = Relu(m) }
"""


@pytest.mark.parametrize("name", ["float16", "double"])
def test_an_output_that_a_function_writes_keeps_its_type(tmp_path, name):
    model = onnx.parser.parse_model(WRITTEN_BY_A_FUNCTION.replace("TYPE", name))
    for seed, key in enumerate("uv"):
        array = weight(64, 64, dtype=TYPES[name], seed=seed)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    original = saved(tmp_path, model)
    x = weight(4, 64, dtype=TYPES[name], seed=9) * 8

    quantize(original, tmp_path / "q.onnx")

    assert_near(original, tmp_path / "q.onnx", x, TYPES[name])


HANDED_ON = """
    <ir_version: 8, opset_import: ["": 18, "own": 1]>
    g (TYPE[n, 64] x) => (TYPE[n, 64] y) { y = own.Outer(x) }
    <domain: "own", opset_import: ["": 18, "own": 1]>
    Outer <weight> (a) => (o) { h = own.Inner <weight: tensor = @weight> (a) o = Relu(h) }
    <domain: "own", opset_import: ["": 18]>
    Inner <weight> (a) => (o) { w = Constant <value: tensor = @weight> () o = MatMul(a, w) }
"""


@pytest.mark.parametrize("name", ["float", "float16"])
def test_a_weight_that_functions_hand_on_as_an_attribute_is_quantized(tmp_path, name):
    dtype = {"float": np.float32, **TYPES}[name]
    model = onnx.parser.parse_model(HANDED_ON.replace("TYPE", name))
    tensor = onnx.numpy_helper.from_array(weight(64, 64, dtype=dtype))
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("weight", tensor))
    original = saved(tmp_path, model)
    x = weight(4, 64, dtype=dtype, seed=9) * 8

    result = quantize(original, tmp_path / "q.onnx")

    assert_near(original, tmp_path / "q.onnx", x, dtype)
    assert result.size_bytes < 0.8 * result.float_size_bytes
    assert model_info(original).inputs == model_info(tmp_path / "q.onnx").inputs


def test_half_precision_without_weights_is_not_touched(tmp_path):
    text = "(float[n, 64] x) => (float16[n, 64] y) { a = MatMul(x, w) y = Cast<to = 10>(a) }"
    model = ir.from_proto(sketch(text, {"w": weight(64, 64, dtype=np.float32)}))

    assert not to_float32(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Cast"]


def test_a_model_that_needs_double_is_refused_with_that_reason(tmp_path):
    """The difference of two large numbers, of which float32 holds nothing."""
    big = np.full((4, 4), 1e9)
    text = """(double[n, 4] x) => (double[n, 4] y)
        { a = MatMul(x, eye) b = Add(a, big) y = Sub(b, big) }"""
    weights = {"eye": np.eye(4), "big": big[:1]}
    original = saved(tmp_path, sketch(text, weights))
    x = np.random.default_rng(0).normal(size=(3, 4))

    with pytest.raises(ModelError, match="needs double"):
        prepare(original, [{"x": x}])
