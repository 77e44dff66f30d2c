"""What rounding a weight does to each channel's mean output is given back to the bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.plan.operators import layout_of
from quant_core.rewrite.bias_correction import corrected_bias


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3)])
def test_a_conv_gets_back_what_brute_force_finds(groups, kernel):
    rng = np.random.default_rng(0)
    weight, rounded = rng.standard_normal((2, 8, 4 // groups, *kernel))
    means, bias = rng.standard_normal(4), rng.standard_normal(8)
    node = ir.Node("", "Conv", [], [ir.AttrInt64("group", groups)])
    matrix = layout_of(node, 4).matrix

    found = corrected_bias(bias, matrix(weight), matrix(rounded), means, node)

    for o in range(8):
        first = o // (8 // groups) * (4 // groups)
        shift = sum(((weight - rounded)[o, i] * means[first + i]).sum() for i in range(4 // groups))
        assert found[o] == pytest.approx(bias[o] + shift)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_does_too(transposed):
    rng = np.random.default_rng(0)
    weight, rounded = rng.standard_normal((2, 6, 4))
    means = rng.standard_normal(4 if transposed else 6)
    node = ir.Node("", "Gemm", [], [ir.AttrInt64("transB", transposed)])
    matrix = layout_of(node, 2).matrix
    error = (weight - rounded).T if transposed else weight - rounded

    found = corrected_bias(np.zeros(error.shape[1]), matrix(weight), matrix(rounded), means, node)

    np.testing.assert_allclose(found, means @ error)


def test_a_weight_that_rounds_exactly_changes_nothing():
    rows = np.ones((3, 4))

    assert corrected_bias(
        np.arange(3.0), rows, rows, np.ones(4), ir.Node("", "Gemm", [])
    ).tolist() == [0, 1, 2]
