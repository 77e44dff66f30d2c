"""Models of opsets for which onnxruntime has no quantizing kernels are quantized all the same."""

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_with_calibration
from quant_core.errors import ModelError
from quant_core.model.opset import OPSET_KERNELS, raise_opset
from quant_core.model.prepare import prepare
from quant_core.model.proto import from_proto, to_proto
from quant_core.model.session import open_session, run
from tests.models import sketch, tiny_cnn

NEWEST = onnx.defs.onnx_opset_version()


def test_an_opset_that_changed_none_of_the_operators_is_lowered(tmp_path):
    model = tiny_cnn(NEWEST)
    model.ir_version = onnx.IR_VERSION
    onnx.save(model, tmp_path / "m.onnx")

    made = quantize_with_calibration(
        tmp_path / "m.onnx", tmp_path / "q.onnx", mode="static", num_samples=8
    )

    assert made.worst_db > 20
    assert "static" in {str(node.compute) for node in made.plan.nodes}


def test_an_opset_that_changed_one_stays(tmp_path):
    text = "(float[n, 4] x, int64[1] b) => (float[n, 4] y) { m = MatMul(x, w) y = CumProd(m, b) }"
    model = sketch(text, {"w": np.ones((4, 4), np.float32)}, opset=26, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")

    assert prepare(tmp_path / "m.onnx").opset_imports[""] == 26


def test_operators_that_only_onnxruntime_knows_are_kept_at_another_opset():
    text = """(float[n, 4] x) => (float[n, 4] y) {
        a = SimplifiedLayerNormalization<axis = -1, stash_type = 1>(x, s) y = Relu(a)
    }"""
    model = sketch(text, {"s": np.float32([1, 2, 3, 4])}, opset=17)

    raised = raise_opset(from_proto(model), 21)

    assert raised.opset_imports == {"": 21}
    feed = {"x": np.ones((1, 4), np.float32)}
    (y,) = open_session(raised).run(None, feed)
    np.testing.assert_allclose(y, [[1, 2, 3, 4]], rtol=1e-4)


@pytest.mark.parametrize("is_stated", [True, False])
def test_a_raised_model_states_the_types_that_it_stated_before(is_stated):
    model = sketch("(float[n, 4] x) => (float[n, 4] y) { a = Neg(x) y = Abs(a) }", {}, opset=13)
    if is_stated:
        model = onnx.shape_inference.infer_shapes(model)

    raised = to_proto(raise_opset(from_proto(model), 21))

    assert [info.name for info in raised.graph.value_info] == ["a"] * is_stated


@pytest.mark.skipif(
    onnx.defs.get_schema("QuantizeLinear").since_version <= OPSET_KERNELS,
    reason="this onnx defines no later QuantizeLinear",
)
def test_onnxruntime_has_no_kernels_for_later_ones():
    """If this fails, `OPSET_KERNELS` may be larger."""
    text = """(float[n] x) => (float[n] y) { q = QuantizeLinear(x, s, z)
                                             y = DequantizeLinear(q, s, z) }"""
    constants = {"s": np.float32(1), "z": np.uint8(0)}

    open_session(sketch(text, constants, OPSET_KERNELS, 10).SerializeToString())
    with pytest.raises(ModelError, match="QuantizeLinear"):
        open_session(sketch(text, constants, NEWEST, 10).SerializeToString())


def test_a_batch_norm_in_training_stays_in_training_at_a_newer_opset():
    text = """(float[n, 2] x) => (float[n, 2] y)
        { p = MatMul(x, w) y, m, v, saved_m, saved_v = BatchNormalization(p, one, zero, zero, one) }
    """
    constants = {"w": np.eye(2), "one": np.ones(2), "zero": np.zeros(2)}
    constants = {name: array.astype(np.float32) for name, array in constants.items()}
    model = from_proto(sketch(text, constants, opset=13))
    feed = {"x": np.float32([[1, 2], [3, 5]])}

    raised = raise_opset(model, 21)

    expected, found = (run(open_session(m), feed) for m in (model, raised))
    assert np.abs(expected[0]).max() > 0.9  # normalized by the batch, and not by (0, 1)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


UPSCALED = [(2, 2), (1.7, 1.3)]
SHRUNK = [(0.7, 0.4), (1.5, 0.3), (0.4, 2)]  # some of them along one axis alone


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("opset", "scales"),
    [*((o, s) for o in (7, 9, 10) for s in UPSCALED), *((10, s) for s in SHRUNK)],
)
def test_a_raised_resize_reads_the_same_pixels(opset, scales, mode):
    attributes, inputs = f'mode = "{mode}"', "x, s"
    if opset < 9:
        attributes += ", scales = [1.0, 1.0, {:.1f}, {:.1f}]".format(*scales)
        inputs = "x"
    text = f"""(float[1, 2, 8, 8] x) => (float[1, 2, a, b] y)
        {{ y = {"Upsample" if opset < 10 else "Resize"}<{attributes}>({inputs}) }}"""
    model = from_proto(sketch(text, {"s": np.float32([1, 1, *scales])}, opset))
    feed = {"x": np.random.default_rng(0).normal(size=(1, 2, 8, 8)).astype(np.float32)}

    raised = raise_opset(model, 17)

    expected, found = (run(open_session(m), feed) for m in (model, raised))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
