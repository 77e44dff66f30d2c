"""The proof of safety finds exactly what can saturate, in models of any maker."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.evaluate.saturation_check import saturating_nodes
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


def proof_of(tmp_path, text, constants, opset=17):
    onnx.save(sketch(text, CONSTANTS | constants, opset, 10), tmp_path / "model.onnx")
    return saturating_nodes(tmp_path / "model.onnx")


def row(op, first, node="c"):
    return {"node": node, "op_type": op, "pairs": len(first), "first": first}


def test_pairs_of_a_conv_are_neighbours_in_the_order_of_the_kernel(tmp_path):
    text = f"(float[n,3,8,8] x) => (float[n,2,8,6] c) {{ {PAIR} d = DequantizeLinear(w, ws) c = Conv(a, d) }}"

    assert proof_of(tmp_path, text, {"w": CONV}) == [row("Conv", [[0, 1], [1, 0]])]


@pytest.mark.parametrize(
    ("op", "attributes"), [("MatMul", ""), ("Gemm", ""), ("Gemm", "transB = 1")]
)
def test_pairs_of_a_matrix_are_neighbours_along_k(tmp_path, op, attributes):
    w = FULLY.T.copy() if attributes else FULLY
    text = f"(float[n,5] x) => (float[n,3] c) {{ {PAIR} d = DequantizeLinear(w, ws) c = {op}<{attributes}>(a, d) }}"

    assert proof_of(tmp_path, text.replace("<>", ""), {"w": w}) == [row(op, [[1, 1]])]


def test_dynamic_quantization_saturates_too(tmp_path):
    text = "(float[n,5] x) => (int32[n,3] c) { q, s1, z1 = DynamicQuantizeLinear(x) c = MatMulInteger(q, w, z1) }"

    assert proof_of(tmp_path, text, {"w": FULLY}) == [row("MatMulInteger", [[1, 1]])]


def test_what_folds_when_the_session_loads_is_looked_through(tmp_path):
    text = f"""(float[n,5] x) => (float[n,3] c) {{
        {PAIR} wide = Cast<to = 6>(w) twice = Mul(wide, two) t = Transpose<perm = [1, 0]>(twice) r = Reshape(t, shape)
        e = Cast<to = 3>(r) d = DequantizeLinear(e, ws) c = Gemm(a, d)
    }}"""
    constants = {"w": (FULLY // 2).T.copy(), "two": np.int32(2), "shape": np.array([5, 3])}

    assert proof_of(tmp_path, text, constants) == [row("Gemm", [[1, 1]])]


@pytest.mark.parametrize(
    "text",
    [
        "d = DequantizeLinear(w, ws) c = MatMul(x, d)",  # activations are float
        f"{PAIR} f = Cast<to = 1>(w) c = MatMul(a, f)",  # weights are float
        f"{PAIR} u = Cast<to = 2>(w) d = DequantizeLinear(u, ws) c = MatMul(a, d)",  # uint8 by uint8 is exact
    ],
    ids=["weight-only", "float weight", "uint8 weight"],
)
def test_what_does_not_multiply_uint8_by_int8_cannot_saturate(tmp_path, text):
    assert proof_of(tmp_path, f"(float[n,5] x) => (float[n,3] c) {{ {text} }}", {"w": FULLY}) == []


def test_depthwise_convs_cannot_saturate(tmp_path):
    text = f"(float[n,2,8,8] x) => (float[n,2,6,6] c) {{ {PAIR} d = DequantizeLinear(w, ws) c = Conv<group = 2>(a, d) }}"

    assert proof_of(tmp_path, text, {"w": np.full((2, 1, 3, 3), 127, np.int8)}) == []


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

    assert proof_of(tmp_path, full, {"w": FULLY, "wz": np.int8(0)}) == [row(op, [[1, 1]])]


def test_so_is_qlinearconv(tmp_path):
    text = """(float[n,3,8,8] x) => (uint8[n,2,8,6] c) {
        q = QuantizeLinear(x, s, z) c = QLinearConv(q, s, z, w, ws, wz, s, z)
    }"""

    assert proof_of(tmp_path, text, {"w": CONV, "wz": np.int8(0)}) == [
        row("QLinearConv", [[0, 1], [1, 0]])
    ]


def test_so_are_both_weights_of_a_dynamic_lstm(tmp_path):
    w, r = np.zeros((1, 4, 8), np.int8), np.zeros((1, 2, 8), np.int8)
    w[0, 2:, 5] = r[0, :, 7] = -65
    more = {"w": w, "r": r, "scale": np.ones((1, 8), np.float32), "zero": np.zeros((1, 8), np.int8)}
    text = """(float[t,n,4] x) => (float[t,1,n,2] c) {
        c = com.microsoft.DynamicQuantizeLSTM<hidden_size = 2>(x, w, r, , , , , , scale, zero, scale, zero)
    }"""

    assert proof_of(tmp_path, text, more) == [row("DynamicQuantizeLSTM", [[5, 1], [7, 0]])]
