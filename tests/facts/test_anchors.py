"""Which patterns of Conv, MatMul and Gemm onnxruntime runs as integer kernels, and which not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model.session import open_session, run
from quant_core.plan.targets import TARGETS, host_kernels, host_target_name
from tests.facts.patterns import W_SCALE, kernels, pair, weight_of
from tests.models import sketch

CONV_WEIGHT = weight_of((4, 4, 3, 3), 0)
DEQUANTIZED = (
    "wd = DequantizeLinear<axis = 0>(w, ws, wz) bd = DequantizeLinear<axis = 0>(b, bs, bz)\n"
)
QUANTIZED_CONV = pair("x", "a") + DEQUANTIZED + "c = Conv(a, wd, bd)\n"


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 22, 23])
def test_conv_between_pairs_is_integer_at_every_opset_that_we_write(opset):
    assert kernels(QUANTIZED_CONV + pair("c", "y"), CONV_WEIGHT, opset=opset) == ["QLinearConv"]


@pytest.mark.parametrize(
    ("weight", "group", "x"),
    [
        ((4, 4, 3, 3), 1, "float[n,4,8,8] x"),
        ((4, 2, 3, 3), 2, "float[n,4,8,8] x"),
        ((4, 1, 3, 3), 4, "float[n,4,8,8] x"),
        ((4, 4, 1, 1), 1, "float[n,4,8,8] x"),
        ((4, 4, 3), 1, "float[n,4,8] x"),
        ((4, 4, 3, 3, 3), 1, "float[n,4,8,8,8] x"),
    ],
    ids=["plain", "grouped", "depthwise", "pointwise", "one-dimensional", "three-dimensional"],
)
def test_every_kind_of_conv_fuses(weight, group, x):
    body = pair("x", "a") + DEQUANTIZED + f"c = Conv<group = {group}>(a, wd, bd)\n" + pair("c", "y")

    assert kernels(body, weight_of(weight, 0), x) == ["QLinearConv"]


@pytest.mark.parametrize("outputs", [1, 2], ids=["one output", "several outputs"])
def test_a_depthwise_conv_adds_in_int32_unless_channels_have_several_outputs(outputs):
    text = f"""(float[1,2,4,4] x) => (float[1,{2 * outputs},2,2] y) {{
        {pair("x", "a", "one", "z0")} wd = DequantizeLinear<axis = 0>(w, ws, wz)
        c = Conv<group = 2>(a, wd) {pair("c", "y", "large", "z0")} }}"""
    constants = weight_of((2 * outputs, 1, 3, 3), 0) | {"z0": np.array(0, np.uint8)}
    constants |= {"one": np.float32(1), "large": np.float32(16)}
    constants["w"][:] = 127
    feed = {"x": np.full((1, 2, 4, 4), 255, np.float32)}

    [got] = run(open_session(ir.from_proto(sketch(text, constants))), feed)

    exact = np.allclose(got, 9 * 127 * 255 * W_SCALE, atol=8)
    assert exact == (outputs == 1 or host_kernels() != "x86-avx2")


@pytest.mark.parametrize(
    "inputs", ["a, wd", "a, wd, float_bias", "a, wd, bd"], ids=["none", "float", "int32"]
)
def test_a_conv_bias_may_be_absent_float_or_int32(inputs):
    body = pair("x", "a") + DEQUANTIZED + f"c = Conv({inputs})\n" + pair("c", "y")

    assert kernels(body, CONV_WEIGHT) == ["QLinearConv"]


def test_a_conv_weight_may_have_one_scale():
    constants = CONV_WEIGHT | {
        "ws": np.float32(0.01),
        "wz": np.int8(0),
        "bs": np.float32(0.05) * np.float32(0.01),
        "bz": np.int32(0),
    }
    body = QUANTIZED_CONV.replace("<axis = 0>", "") + pair("c", "y")

    assert kernels(body, constants) == ["QLinearConv"]


def test_an_int32_bias_needs_the_scale_of_the_products():
    constants = CONV_WEIGHT | {"bs": CONV_WEIGHT["bs"] * 2}

    assert "QLinearConv" not in kernels(QUANTIZED_CONV + pair("c", "y"), constants)


def test_conv_without_an_output_pair_is_float_and_dequantizes_its_weight_at_every_run():
    ran = kernels(pair("x", "a") + DEQUANTIZED + "y = Conv(a, wd, bd)\n", CONV_WEIGHT, borders=True)

    assert "Conv" in ran
    assert ran.count("DequantizeLinear") == 3  # x, w, b


def test_a_second_reader_of_the_float_output_keeps_conv_float():
    shared = QUANTIZED_CONV + pair("c", "d") + "t = Tanh(c) y = Add(d, t)\n"

    assert "Conv" in kernels(shared, CONV_WEIGHT)


def test_a_second_reader_of_the_quantized_output_does_not_matter():
    shared = QUANTIZED_CONV + pair("c", "d") + "t = Tanh(d) y = Add(d, t)\n"

    assert kernels(shared, CONV_WEIGHT) == ["QLinearConv", "Tanh", "Add"]


def test_a_weight_only_dequantize_of_conv_never_fuses():
    body = "wd = DequantizeLinear<axis = 0>(w, ws, wz) y = Conv(x, wd)"

    assert kernels(body, CONV_WEIGHT, borders=True) == ["DequantizeLinear", "Conv"]


@pytest.mark.parametrize("shared", ["w", "wd"])
def test_two_convs_may_share_a_weight_and_even_its_dequantize(shared):
    second = "vd = DequantizeLinear<axis = 0>(w, ws, wz)" if shared == "w" else "vd = Identity(wd)"
    body = QUANTIZED_CONV + pair("c", "d") + f"{second} e = Conv(d, vd)\n" + pair("e", "y")

    assert kernels(body, CONV_WEIGHT) == ["QLinearConv", "QLinearConv"]


@pytest.mark.parametrize(
    ("cap", "scale", "zero", "fused"),
    [
        ("Relu(c)", 0.05, np.uint8(0), True),
        ("Relu(c)", 0.05, np.int8(-128), True),
        ("Relu(c)", 0.05, np.uint8(128), False),
        ("Relu(c)", 0.05, np.int8(0), False),
        ("Clip(c, zero, six)", 6 / 255, np.uint8(0), True),
        ("Clip(c, zero, six)", 5 / 255, np.uint8(0), True),
        ("Clip(c, zero, six)", 7 / 255, np.uint8(0), False),
        ("Clip(c, zero, six)", 6 / 255, np.uint8(1), False),
        ("Clip(c, zero)", 0.05, np.uint8(0), True),
    ],
)
def test_relu_and_clip_vanish_where_the_quantized_range_does_their_work(cap, scale, zero, fused):
    below = np.nextafter(np.float32(scale), np.float32(0))  # 255 of it must not exceed the cap
    constants = CONV_WEIGHT | {"cs": below, "cz": zero, "zero": np.float32(0), "six": np.float32(6)}
    if zero.dtype == np.int8:
        constants |= {"z": np.int8(0)}

    ran = kernels(QUANTIZED_CONV + f"r = {cap}\n" + pair("r", "y", "cs", "cz"), constants)

    assert ran == (["QLinearConv"] if fused else ["FusedConv"])


MATMUL = pair("x", "a") + "wd = DequantizeLinear<axis = 1>(w, ws, wz)\n"


@pytest.mark.parametrize("x", ["float[n,4] x", "float[n,5,4] x"])
def test_matmul_with_an_output_pair_requantizes_and_without_one_it_does_not(x):
    constants = weight_of((4, 6), 1)

    assert kernels(MATMUL + "c = MatMul(a, wd)\n" + pair("c", "y"), constants, x) == [
        "QLinearMatMul"
    ]
    assert kernels(MATMUL + "y = MatMul(a, wd)\n", constants, x) == ["MatMulIntegerToFloat"]


@pytest.mark.parametrize("requantized", [True, False])
@pytest.mark.parametrize("bias", ["", ", bd", ", float_bias"], ids=["none", "int32", "float"])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_needs_an_output_pair_only_beside_a_float_bias(trans_b, bias, requantized):
    shape, axis = ((6, 4), 0) if trans_b else ((4, 6), 1)
    body = (
        pair("x", "a")
        + f"wd = DequantizeLinear<axis = {axis}>(w, ws, wz)\n"
        + "bd = DequantizeLinear<axis = 0>(b, bs, bz)\n"
        f"c = Gemm<transB = {trans_b}>(a, wd{bias})\n"
        + (pair("c", "y") if requantized else "y = Identity(c)")
    )

    fused = requantized or bias != ", float_bias"
    assert kernels(body, weight_of(shape, axis), "float[n,4] x") == ["QGemm" if fused else "Gemm"]


def test_dynamic_quantization_of_matmul_is_one_kernel():
    body = """
        q, qs, qz = DynamicQuantizeLinear(x)
        product = MatMulInteger(q, w, qz)
        cast = Cast<to = 1>(product)
        scale = Mul(qs, ws)
        y = Mul(cast, scale)
    """

    assert kernels(body, weight_of((4, 6), 1), "float[n,4] x") == ["DynamicQuantizeMatMul"]
    added = body.replace("y = Mul(cast, scale)", "m = Mul(cast, scale) y = Add(m, float_bias)")
    assert kernels(added, weight_of((4, 6), 1), "float[n,4] x") == ["DynamicQuantizeMatMul"]


@pytest.mark.skipif(
    TARGETS[host_target_name()].activation_signed, reason="int8 activations are right on ARM"
)
def test_a_residual_block_fuses_with_uint8_activations_and_not_with_int8_ones():
    same = "Conv<pads = [1, 1, 1, 1]>"
    body = (
        pair("x", "a")
        + DEQUANTIZED
        + f"u = {same}(a, wd, bd)\n"
        + pair("u", "c")
        + f"d = {same}(c, wd, bd)\n"
        + pair("d", "e")
        + "f = Add(c, e)\n"
        + pair("f", "y")
    )

    assert kernels(body, CONV_WEIGHT) == ["QLinearConv", "QLinearConv", "QLinearAdd"]
    assert "QLinearConv" not in kernels(body, CONV_WEIGHT | {"z": np.int8(0)})
