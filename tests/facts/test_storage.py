"""What onnxruntime folds when a session loads.

This is why a weight can be stored in 4 bits and computed in 8.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from quant_core.model.session import open_session, optimized_graph
from tests.facts.patterns import int4, kernels, pair, uint4, weight_of
from tests.models import sketch

RNG = np.random.default_rng(0)
BLOCKS, MULTIPLIERS = RNG.integers(-8, 8, (4, 3, 12)), RNG.integers(1, 16, (4, 3, 1))
STORED = {
    "blocks": int4(BLOCKS),
    "multipliers": uint4(MULTIPLIERS),
    "rows": np.array([4, 3, 3, 4]),  # (O, kh, kw, I)
    "scale": np.full((4, 1, 1, 1), 0.01, np.float32),
    "levels": RNG.integers(-127, 128, (16, 16)).astype(np.int8),
    "rows_of_levels": uint4(MULTIPLIERS[..., 0]),
}
TO_INT8 = """
    wide = Cast<to = 6>(blocks)
    factor = Cast<to = 6>(multipliers)
    product = Mul(wide, factor)
    placed = Reshape(product, rows)
    moved = Transpose<perm = [0, 3, 1, 2]>(placed)
    w8 = Cast<to = 3>(moved)
"""
LOOKED_UP = """
    wide = Cast<to = 6>(blocks)
    row = Cast<to = 6>(rows_of_levels)
    levels_of_blocks = Gather(levels, row)
    product = GatherElements<axis = 2>(levels_of_blocks, wide)
    placed = Reshape(product, rows)
    w8 = Transpose<perm = [0, 3, 1, 2]>(placed)
"""
DECODED = {
    TO_INT8: BLOCKS * MULTIPLIERS,
    LOOKED_UP: STORED["levels"][MULTIPLIERS, BLOCKS],  # -1 is the last
}


@pytest.mark.parametrize("to_int8", [TO_INT8, LOOKED_UP], ids=["products", "looked up"])
def test_int4_storage_loads_to_the_int8_graph(to_int8):
    body = (
        pair("x", "a") + to_int8 + "wd = DequantizeLinear<axis = 0>(w8, ws, wz)\n"
        "bd = DequantizeLinear<axis = 0>(b, bs, bz) c = Conv(a, wd, bd)\n" + pair("c", "y")
    )
    constants = weight_of((4, 4, 3, 3), 0) | STORED
    constants.pop("w")

    stored = kernels(body, constants, opset=21, borders=True)

    direct = body.replace(to_int8, "").replace("w8", "w")
    assert stored == kernels(direct, weight_of((4, 4, 3, 3), 0), opset=21, borders=True)
    assert "QLinearConv" in stored


@pytest.mark.parametrize("to_int8", [TO_INT8, LOOKED_UP], ids=["products", "looked up"])
def test_the_folded_weight_is_what_the_nodes_say(to_int8):
    model = sketch(
        "(float[n,4,8,8] x) => (float[n,4,6,6] y) "
        f"{{ {to_int8} w = Cast<to = 1>(w8) y = Conv(x, w) }}",
        STORED,
        21,
        10,
    )

    loaded = optimized_graph(model.SerializeToString(), optimize="basic").graph

    assert [node.op_type for node in loaded.node] == ["Conv"]
    expected = DECODED[to_int8].reshape(4, 3, 3, 4).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.initializer[0]), expected)


@pytest.mark.parametrize(
    ("op", "x", "rows"),
    [
        ("Conv", "float[n,4,8,8] x", [4, 3, 3, 4]),
        ("MatMul", "float[n,1,4] x", [4, 36]),
        ("Gemm", "float[n,4] x", [4, 36]),
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_that_is_cast_and_scaled_runs_as_plain_float(op, x, rows, bits):
    folding = TO_INT8 if bits == 4 else "w8 = Cast<to = 3>(w)\n"
    if op != "Conv":
        folding = folding.replace(
            "moved = Transpose<perm = [0, 3, 1, 2]>(placed)", "moved = Identity(placed)"
        )
    shape = (4, 4, 3, 3) if op == "Conv" else (4, 36)
    scale = np.full((4, *[1] * (len(shape) - 1)), 0.01, np.float32)
    constants = weight_of(shape, 0) | STORED | {"rows": np.array(rows), "scale": scale}

    body = f"{folding} f = Cast<to = 1>(w8) w_float = Mul(f, scale) y = {op}(x, w_float)"

    assert kernels(body, constants, x, 21, borders=True) == kernels(
        f"y = {op}(x, w)", {"w": np.ones(shape, np.float32)}, x, 21, borders=True
    )


def test_a_dequantize_of_a_constant_is_not_folded():
    ran = kernels(
        "wd = DequantizeLinear<axis = 0>(w, ws, wz) y = Add(x, wd)",
        weight_of((4, 8, 8), 0),
        borders=True,
    )

    assert ran == ["DequantizeLinear", "Add"]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_a_weight_only_dequantize_of_matmul_becomes_matmulnbits(dtype):
    body = "wd = DequantizeLinear<axis = 1>(w, ws, wz) y = MatMul(x, wd)"

    assert kernels(body, weight_of((64, 6), 1, dtype), "float[n,64] x", 21, borders=True) == [
        "MatMulNBits"
    ]


def test_matmulnbits_takes_4_bits_without_a_zero_point_and_scales_that_are_folded():
    """Without optimizers the scales stay nodes, and a constant weight is packed without them."""
    q, multipliers = RNG.integers(-8, 8, (6, 4, 32)), RNG.integers(1, 16, (6, 4))
    nibbles = (q + 8).astype(np.uint8)
    pairs = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    constants = {
        "b": pairs,
        "rows": pairs.reshape(6, -1),
        "blocks": np.array([6, 4, -1]),
        "m": uint4(multipliers),
        "scale": np.full((6, 1), 0.01, np.float32),
    }
    sizes = "K = 128, N = 6, bits = 4, block_size = 32, accuracy_level = 4"
    scales = "f = Cast<to = 1>(m) k = Mul(f, scale)"
    direct = f"{scales} y = com.microsoft.MatMulNBits<{sizes}>(x, b, k)"
    copied = f"{scales} c = Reshape(rows, blocks) y = com.microsoft.MatMulNBits<{sizes}>(x, c, k)"
    x = RNG.standard_normal((3, 128), np.float32)
    exact = x @ (q * multipliers[..., None] * 0.01).reshape(6, 128).T

    def error(body: str, optimize: bool) -> float:
        model = sketch(f"(float[n,128] x) => (float[n,6] y) {{ {body} }}", constants, 21, 10)
        options = ort.SessionOptions()
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options)
        [y] = session.run(None, {"x": x})
        return float(np.square(y - exact).sum() / np.square(exact).sum())

    assert kernels(copied, constants, "float[n,128] x", 21, borders=True) == ["MatMulNBits"]
    assert error(direct, True) < 1e-3
    assert error(direct, False) > 0.1
    assert error(copied, True) < 1e-3
    assert error(copied, False) < 1e-3


@pytest.mark.parametrize("block", [16, 32, 64])
def test_so_does_one_in_blocks_of_4_bits(block):
    shape = (128 // block, 6)
    constants = {
        "w": int4(RNG.integers(-8, 8, (128, 6))),
        "ws": np.ones(shape, np.float32),
        "wz": int4(np.zeros(shape)),
    }
    body = f"wd = DequantizeLinear<axis = 0, block_size = {block}>(w, ws, wz) y = MatMul(x, wd)"

    assert kernels(body, constants, "float[n,128] x", 21, borders=True) == ["MatMulNBits"]


def test_a_pad_is_merged_into_a_conv_without_auto_pad_only():
    """A float model whose pads are computed keeps its Pad; so must the quantized model.

    There the pads are constants.
    """
    constants = weight_of((4, 4, 3, 3), 0) | {
        "w": np.ones((4, 4, 3, 3), np.float32),
        "p": np.array([0, 0, 1, 1] * 2),
    }
    body = "a = Pad(x, p) y = Conv(a, w)"

    assert "Pad" not in kernels(body, constants)
    assert "Pad" in kernels(body.replace("Conv", 'Conv<auto_pad = "VALID">'), constants)


def test_rows_of_an_int8_table_are_scaled_after_they_are_picked():
    """DequantizeLinear of the table would dequantize all of it at every run."""
    table = {"w": np.ones((50, 4), np.int8), "scale": np.ones((50, 1), np.float32)}
    picking = """
        i = Gather<axis = 0>(w, x) r = Cast<to = 1>(i)
        f = Gather<axis = 0>(scale, x) y = Mul(r, f)"""

    assert sorted(kernels(picking, table, "int64[n] x", borders=True)) == [
        "Cast",
        "Gather",
        "Gather",
        "Mul",
    ]


@pytest.mark.parametrize("as_pairs", [False, True])
def test_rows_of_a_table_in_4_bits_have_a_kernel_of_their_own_whose_scales_are_folded(as_pairs):
    q, multipliers = RNG.integers(-8, 8, (50, 64)), RNG.integers(1, 16, (50, 2))
    nibbles = (q + 8).astype(np.uint8)
    table = nibbles[:, ::2] | nibbles[:, 1::2] << 4 if as_pairs else int4(q)
    constants = {"t": table, "m": uint4(multipliers), "scale": np.full((50, 1), 0.01, np.float32)}
    attributes = "bits = 4, gather_axis = 0, quantize_axis = 1, block_size = 32"
    picking = f"com.microsoft.GatherBlockQuantized<{attributes}>(t, x, k)"
    body = f"f = Cast<to = 1>(m) k = Mul(f, scale) y = {picking}"
    model = sketch(f"(int64[n] x) => (float[n,64] y) {{ {body} }}", constants, 21, 10)

    y = open_session(model.SerializeToString()).run(None, {"x": np.array([3, 49, 3])})[0]

    assert kernels(body, constants, "int64[n] x", 21, borders=True) == ["GatherBlockQuantized"]
    table = q * np.repeat(multipliers, 32, axis=1) * np.float32(0.01)
    np.testing.assert_allclose(y, table[[3, 49, 3]], rtol=1e-6)


def test_the_lstm_kernel_takes_int8_weights_with_a_scale_per_gate_and_unit():
    hidden, inputs = 3, 4
    constants = {
        "w": np.ones((1, inputs, 4 * hidden), np.int8),
        "r": np.ones((1, hidden, 4 * hidden), np.int8),
        "scale": np.full((1, 4 * hidden), 0.01, np.float32),
        "zero": np.zeros((1, 4 * hidden), np.int8),
        "b": np.zeros((1, 8 * hidden), np.float32),
    }
    inputs = "x, w, r, b, , , , , scale, zero, scale, zero"
    body = f"y = com.microsoft.DynamicQuantizeLSTM<hidden_size = {hidden}>({inputs})"

    assert kernels(body, constants, "float[t,n,4] x") == ["DynamicQuantizeLSTM"]
