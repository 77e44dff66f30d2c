"""Integers and back: what the arithmetic promises, with onnxruntime as the judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from quant_core.errors import DataError, ModelError
from quant_core.numerics.affine import (
    Grid,
    QuantParams,
    choose_params,
    dequantize,
    quantize,
    range_of,
)

INT8, UINT8 = Grid(8, signed=True, symmetric=False), Grid(8, signed=False, symmetric=False)
INT4, UINT4 = Grid(4, signed=True, symmetric=False), Grid(4, signed=False, symmetric=False)
GRIDS = [
    Grid(bits, signed, symmetric)
    for bits in (4, 8, 16)
    for signed in (True, False)
    for symmetric in (True, False)
]
ONNX_TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}

floats = st.floats(-(2.0**100), 2.0**100, width=32)


def in_onnxruntime(
    x: np.ndarray[Any, Any], params: QuantParams
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What QuantizeLinear (as float) and DequantizeLinear after it give in onnxruntime."""
    kind = ONNX_TYPES[params.grid.dtype.name]
    where = {} if params.axis is None else {"axis": params.axis, "block_size": params.block or 0}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **where),
        helper.make_node("Cast", ["q"], ["integers"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **where),
    ]
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, params.scale.shape, params.scale.ravel()),
        helper.make_tensor(
            "zero", kind, params.scale.shape, params.zero_point.astype(np.int32).ravel()
        ),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape)
        for name in ("integers", "y")
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    integers, y = session.run(None, {"x": x})
    return integers, y


@pytest.mark.parametrize("grid", [INT8, UINT8, INT4, UINT4], ids=lambda g: g.dtype.name)
@pytest.mark.parametrize(
    ("axis", "block"), [(None, None), (0, None), (2, None), (1, 4), (0, 2), (1, 16)]
)
def test_onnxruntime_computes_the_same_integers_and_floats(
    grid: Grid, axis: int | None, block: int | None
) -> None:
    x = np.random.default_rng(0).normal(0.3, 2, (4, 16, 6)).astype(np.float32)
    lo, hi = range_of(x, axis, block)
    params = choose_params(0.8 * lo, 0.8 * hi, grid, axis, block)  # so that some values are clipped

    q = quantize(x, params)

    integers, y = in_onnxruntime(x, params)
    np.testing.assert_array_equal(q.astype(np.float32), integers)
    np.testing.assert_array_equal(dequantize(q, params), y)


def test_halves_round_to_even_as_in_onnxruntime() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    params = QuantParams(np.float32(1).reshape(()), np.array(0, np.int8), None, INT8)

    q = quantize(x, params)

    assert q.tolist() == [0, 2, 2, 0, -2, -2]
    np.testing.assert_array_equal(q.astype(np.float32), in_onnxruntime(x, params)[0])


@given(st.sampled_from(GRIDS), floats, floats, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_value_in_the_range_comes_back_within_half_a_step(
    grid: Grid, a: float, b: float, parts: list[float]
) -> None:
    lo, hi = min(a, b), max(a, b)
    params = choose_params(lo, hi, grid)
    x = np.clip(lo + (hi - lo) * np.array(parts), lo, hi).astype(np.float32)

    error = np.abs(dequantize(quantize(x, params), params).astype(np.float64) - x)

    # the scale, the quotient and the product are each rounded to float32: one part in 2**23 of
    # at most `steps` steps
    steps = grid.qmax - grid.qmin
    assert np.all(error <= float(params.scale) * (0.5 + 4 * steps * 2.0**-23))


@given(st.sampled_from(GRIDS), floats, floats)
def test_zero_is_exact(grid: Grid, a: float, b: float) -> None:
    params = choose_params(min(a, b), max(a, b), grid)

    assert dequantize(quantize(np.zeros(1, np.float32), params), params)[0] == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_a_dead_channel_round_trips_to_zeros(grid: Grid) -> None:
    x = np.array([[0, 0, 0], [1, -2, 3]], np.float32)
    params = choose_params(*range_of(x, 0), grid, 0)

    assert params.scale[0] == 1
    assert not dequantize(quantize(x, params), params)[0].any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e38, 3.4028235e38])
def test_the_smallest_and_the_largest_floats_stay_finite_and_do_not_grow(
    grid: Grid, size: float
) -> None:
    x = np.array([-size, 0, size], np.float32)
    params = choose_params(x.min(), x.max(), grid)

    y = dequantize(quantize(x, params), params)

    assert params.scale >= np.finfo(np.float32).tiny
    assert np.all(np.isfinite(y))
    assert np.all(
        np.abs(y.astype(np.float64) - x) <= params.scale * 1.01
    )  # a whole step: the last would be inf


@pytest.mark.parametrize("cap", [6.0, 1.0, 2.5, 20.0, 0.1, 3.3])
def test_a_range_never_sticks_out_of_the_clip_that_made_it(cap: float) -> None:
    params = choose_params(0.0, np.float32(cap), UINT8)

    assert dequantize(np.array([255], np.uint8), params)[0] <= np.float32(cap)


@pytest.mark.parametrize(
    ("grid", "integers"),
    [
        (Grid(8, True, True), (-127, 0, 127)),
        (Grid(4, True, True), (-7, 0, 7)),
        (Grid(8, False, True), (1, 128, 255)),
        (Grid(8, True, False), (-128, 0, 127)),
        (Grid(4, False, False), (0, 8, 15)),
    ],
)
def test_a_symmetric_grid_is_narrow(grid: Grid, integers: tuple[int, int, int]) -> None:
    assert (grid.qmin, grid.middle, grid.qmax) == integers


def test_a_range_without_zero_is_widened_to_zero() -> None:
    params = choose_params(10.0, 25.5, UINT8)

    assert params.zero_point == 0
    assert params.scale == pytest.approx(0.1)


def test_the_last_block_may_be_short() -> None:
    x = np.arange(10, dtype=np.float32).reshape(1, 10)
    params = choose_params(*range_of(x, 1, 4), UINT8, 1, 4)

    assert params.scale.shape == (1, 3)
    np.testing.assert_allclose(dequantize(quantize(x, params), params), x, atol=9 / 255 / 2)


def test_an_int32_bias_keeps_more_digits_than_float32_has() -> None:
    bias = np.array([1.0, -0.123456789], np.float32)
    params = QuantParams(
        np.array([1e-9, 1e-9], np.float32), np.zeros(2, np.int32), 0, Grid(32, True, True)
    )

    expected = np.rint(bias.astype(np.float64) / params.scale)
    np.testing.assert_array_equal(quantize(bias, params), expected)


@pytest.mark.parametrize(("lo", "hi"), [(np.nan, 1.0), (0.0, np.inf), (2.0, 1.0)])
def test_a_range_that_is_none_is_refused(lo: float, hi: float) -> None:
    with pytest.raises(DataError, match="no range"):
        choose_params(lo, hi, UINT8)


def test_a_grid_that_onnx_does_not_have_is_refused() -> None:
    with pytest.raises(ModelError, match="5 bits"):
        Grid(5, True, True)
