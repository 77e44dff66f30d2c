"""The saturation check finds exactly the nodes that can saturate, in models of any quantizer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.evaluate import saturation_check
from quant_core.evaluate.saturation_check import SaturatingNode, saturating_nodes
from quant_core.model.normalize import load_normalized
from tests.models import sketch

PAIR = "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"
CONSTANTS = {"s": np.float32(0.1), "z": np.uint8(128), "ws": np.float32(0.1)}
CONV = np.zeros((2, 3, 1, 3), np.int8)  # columns: (kw, C) = 00 01 02 10 11 12 20 21 22
CONV[1, 0, 0, 0], CONV[1, 1, 0, 0] = 65, 64  # neighbours, 129
CONV[0, 0, 0, 0], CONV[0, 0, 0, 1] = 100, 100  # not neighbours
CONV[0, 2, 0, 0], CONV[0, 0, 0, 1] = -100, -29  # neighbours over the kernel's edge: columns 2 and 3
FULLY = np.zeros((5, 3), np.int8)  # (K, N)
FULLY[2:4, 1] = 127
FULLY[1:3, 2] = 127  # columns 1 and 2 are no pair
FULLY[4, 0] = 127


def nodes_of(tmp_path, text, constants, opset=17):
    onnx.save(sketch(text, CONSTANTS | constants, opset, 10), tmp_path / "model.onnx")
    return saturating_nodes(load_normalized(tmp_path / "model.onnx"))


def row(op_type, first, node="c"):
    return SaturatingNode(node, op_type, len(first), first)


@pytest.fixture
def steps(monkeypatch):
    """One entry for each value that the check looks at."""
    seen = []
    constant = saturation_check.graph.constant

    def counted(value):
        seen.append(value)
        return constant(value)

    monkeypatch.setattr(saturation_check.graph, "constant", counted)
    return seen


def attention(blocks):
    """The text of residual self-attention blocks, the input of each being read four times."""
    lines = ["x0 = Identity(x)"]
    for k in range(blocks):
        lines += [
            f"q{k} = MatMul(x{k}, w) k{k} = MatMul(x{k}, w) v{k} = MatMul(x{k}, w)",
            f"t{k} = Transpose<perm = [1, 0]>(k{k}) s{k} = MatMul(q{k}, t{k})",
            f"p{k} = Softmax(s{k}) a{k} = MatMul(p{k}, v{k}) x{k + 1} = Add(x{k}, a{k})",
        ]
    return " ".join(lines)


def test_pairs_of_a_conv_are_neighbours_in_the_order_of_the_kernel(tmp_path):
    text = f"""(float[n,3,8,8] x) => (float[n,2,8,6] c) {{
        {PAIR} d = DequantizeLinear(w, ws) c = Conv(a, d)
    }}"""

    assert nodes_of(tmp_path, text, {"w": CONV}) == [row("Conv", [[0, 1], [1, 0]])]


@pytest.mark.parametrize(
    ("op", "attributes"), [("MatMul", ""), ("Gemm", ""), ("Gemm", "transB = 1")]
)
def test_pairs_of_a_matrix_are_neighbours_along_k(tmp_path, op, attributes):
    w = FULLY.T.copy() if attributes else FULLY
    text = f"""(float[n,5] x) => (float[n,3] c) {{
        {PAIR} d = DequantizeLinear(w, ws) c = {op}<{attributes}>(a, d)
    }}"""

    assert nodes_of(tmp_path, text.replace("<>", ""), {"w": w}) == [row(op, [[1, 1]])]


def test_dynamic_quantization_saturates_too(tmp_path):
    text = """(float[n,5] x) => (int32[n,3] c) {
        q, s1, z1 = DynamicQuantizeLinear(x) c = MatMulInteger(q, w, z1)
    }"""

    assert nodes_of(tmp_path, text, {"w": FULLY}) == [row("MatMulInteger", [[1, 1]])]


@pytest.mark.parametrize("shape", [(5, 3), (0, -1)])
def test_what_folds_when_the_session_loads_is_looked_through(tmp_path, shape):
    text = f"""(float[n,5] x) => (float[n,3] c) {{
        {PAIR} wide = Cast<to = 6>(w) twice = Mul(wide, two)
        t = Transpose<perm = [1, 0]>(twice) r = Reshape(t, shape)
        e = Cast<to = 3>(r) d = DequantizeLinear(e, ws) c = Gemm(a, d)
    }}"""
    constants = {"w": (FULLY // 2).T.copy(), "two": np.int32(2), "shape": np.array(shape)}

    assert nodes_of(tmp_path, text, constants) == [row("Gemm", [[1, 1]])]


@pytest.mark.parametrize(
    "text",
    [
        "d = DequantizeLinear(w, ws) c = MatMul(x, d)",  # activations are float
        f"{PAIR} f = Cast<to = 1>(w) c = MatMul(a, f)",  # weights are float
        # uint8 by uint8 is exact
        f"{PAIR} u = Cast<to = 2>(w) d = DequantizeLinear(u, ws) c = MatMul(a, d)",
    ],
    ids=["weight-only", "float weight", "uint8 weight"],
)
def test_what_does_not_multiply_uint8_by_int8_cannot_saturate(tmp_path, text):
    assert nodes_of(tmp_path, f"(float[n,5] x) => (float[n,3] c) {{ {text} }}", {"w": FULLY}) == []


def test_depthwise_convs_cannot_saturate(tmp_path):
    text = f"""(float[n,2,8,8] x) => (float[n,2,6,6] c) {{
        {PAIR} d = DequantizeLinear(w, ws) c = Conv<group = 2>(a, d)
    }}"""

    assert nodes_of(tmp_path, text, {"w": np.full((2, 1, 3, 3), 127, np.int8)}) == []


def test_convs_with_several_outputs_for_each_channel_can(tmp_path):
    text = f"""(float[n,2,8,8] x) => (float[n,4,6,6] c) {{
        {PAIR} d = DequantizeLinear(w, ws) c = Conv<group = 2>(a, d)
    }}"""

    [found] = nodes_of(tmp_path, text, {"w": np.full((4, 1, 3, 3), 127, np.int8)})

    assert found.pairs == 4 * 4  # of each output, but for the last of its nine weights


@pytest.mark.parametrize(
    ("text", "op"),
    [
        (
            "q = QuantizeLinear(x, s, z) c = QLinearMatMul(q, s, z, w, ws, wz, s, z)",
            "QLinearMatMul",
        ),
        (
            "q = QuantizeLinear(x, s, z) c = com.microsoft.QGemm(q, s, z, w, ws, wz, , s, z)",
            "QGemm",
        ),
    ],
)
def test_the_operators_that_fusion_would_make_are_seen_as_well(tmp_path, text, op):
    """onnxruntime's own quantizer writes them in its QOperator format."""
    full = f"(float[n,5] x) => (uint8[n,3] c) {{ {text} }}"

    assert nodes_of(tmp_path, full, {"w": FULLY, "wz": np.int8(0)}) == [row(op, [[1, 1]])]


def test_a_qlinearconv_is_seen_as_well(tmp_path):
    text = """(float[n,3,8,8] x) => (uint8[n,2,8,6] c) {
        q = QuantizeLinear(x, s, z) c = QLinearConv(q, s, z, w, ws, wz, s, z)
    }"""

    assert nodes_of(tmp_path, text, {"w": CONV, "wz": np.int8(0)}) == [
        row("QLinearConv", [[0, 1], [1, 0]])
    ]


def test_both_weights_of_a_dynamic_lstm_are_seen(tmp_path):
    w, r = np.zeros((1, 4, 8), np.int8), np.zeros((1, 2, 8), np.int8)
    w[0, 2:, 5] = r[0, :, 7] = -65
    more = {"w": w, "r": r, "scale": np.ones((1, 8), np.float32), "zero": np.zeros((1, 8), np.int8)}
    text = """(float[t,n,4] x) => (float[t,1,n,2] c) {
        c = com.microsoft.DynamicQuantizeLSTM<hidden_size = 2>(
            x, w, r, , , , , , scale, zero, scale, zero
        )
    }"""

    assert nodes_of(tmp_path, text, more) == [row("DynamicQuantizeLSTM", [[5, 1], [7, 0]])]


def test_the_steps_of_the_check_grow_as_the_graph_does(tmp_path, steps):
    """The paths through a residual graph are exponentially many."""
    counts = []
    for blocks in (10, 100):
        steps.clear()
        text = f"(float[4,4] x) => (float[4,4] c) {{ {attention(blocks)} c = Relu(x{blocks}) }}"
        assert nodes_of(tmp_path, text, {"w": np.eye(4, dtype=np.float32)}) == []
        counts.append(len(steps))

    assert counts[1] <= 10 * counts[0]


def test_a_constant_that_is_read_twice_is_folded_once(tmp_path, steps):
    squares = " ".join(f"w{k + 1} = Mul(w{k}, w{k})" for k in range(100))
    text = f"""(float[n,5] x) => (float[n,3] c) {{
        {PAIR} {squares} e = Cast<to = 3>(w100) d = DequantizeLinear(e, ws) c = MatMul(a, d)
    }}"""

    assert nodes_of(tmp_path, text, {"w0": (FULLY > 0).astype(np.int32)}) == []
    assert len(steps) < 10 * 100
