"""onnxruntime folds bfloat16 scales, 16-bit biases and products of scales, as it folds weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model.session import open_session, optimized_graph
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from quant_core.rewrite.static_nodes import SHORT_BIAS
from tests.models import normalized, random_feed, sketch

RNG = np.random.default_rng(0)
CONV = "(float[n,64,6,6] x) => (float[n,96,4,4] y) { y = Conv(x, w, b) }"
GEMM = "(float[n,64] x) => (float[n,96] y) { y = Gemm<transB = 1>(x, w, b) }"


def quantized(
    text: str, weight: np.ndarray, bias: np.ndarray
) -> tuple[onnx.ModelProto, onnx.ModelProto, dict]:
    """A model, what it becomes from 4 bits, and a feed."""
    proto = sketch(text, {"w": weight, "b": bias})
    config = QuantConfig(bits=4, mode="static", layer_bits={"*": 4})
    plan = make_plan(normalized(proto), config, TARGETS["x86"])
    feeds = [random_feed(proto, seed, 4) for seed in range(8)]
    stats = observe(proto.SerializeToString(), plan, feeds)
    return (
        proto,
        ir.to_proto(apply_plan(normalized(proto), plan, stats).model),
        feeds[0],
    )


@pytest.mark.parametrize(
    ("text", "shape", "kernel"), [(CONV, (96, 64, 3, 3), "QLinearConv"), (GEMM, (96, 64), "QGemm")]
)
def test_only_the_integer_kernel_is_left_once_loaded(text, shape, kernel):
    _, made, _ = quantized(
        text, RNG.standard_normal(shape, np.float32), RNG.standard_normal(96).astype(np.float32)
    )

    loaded = [n.op_type for n in optimized_graph(made.SerializeToString()).graph.node]

    stored = {t.data_type for t in made.graph.initializer}
    assert {onnx.TensorProto.INT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT4} <= stored
    assert kernel in loaded
    assert set(loaded) <= {
        kernel,
        "QuantizeLinear",
        "DequantizeLinear",
        "Transpose",
    }  # of the activations


def test_a_channel_of_tiny_weights_leaves_the_biases_of_others_alone():
    """Its bias is a huge integer on its own grid."""
    weight = RNG.standard_normal((96, 64), np.float32)
    weight[::7] *= 1e-9
    bias = RNG.uniform(-3, 3, 96).astype(np.float32)
    assert len(bias) >= SHORT_BIAS

    proto, made, feed = quantized(GEMM, weight, bias)

    exact, found = (open_session(p.SerializeToString()).run(None, feed)[0] for p in (proto, made))
    assert 10 * np.log10(np.sum(exact**2) / np.sum((exact - found) ** 2)) > 15
    np.testing.assert_allclose(found[:, ::7].mean(0), bias[::7], atol=np.ptp(exact) / 255)
