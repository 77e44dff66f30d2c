"""A weight becomes rows of output channels, in the order of the kernel, and comes back."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_ir import AttrInt64, Node

from quant_core.numerics.layout import Layout
from quant_core.plan.operators import layout_of


@pytest.mark.parametrize(
    ("op", "attributes", "shape", "rows"),
    [
        ("Conv", {}, (4, 3, 2, 5), (4, 30)),
        ("Conv", {}, (4, 3, 5), (4, 15)),
        ("ConvTranspose", {}, (4, 3, 2, 5), (3, 40)),
        ("Gemm", {}, (4, 3), (3, 4)),
        ("Gemm", {"transB": 1}, (4, 3), (4, 3)),
        ("MatMul", {}, (4, 3), (3, 4)),
        ("MatMul", {}, (2, 4, 3), (6, 4)),
        ("ConvTranspose", {"group": 2}, (4, 3, 2, 5), (6, 20)),
        ("LSTM", {}, (2, 8, 3), (16, 3)),
        ("Gather", {}, (4, 3), (4, 3)),
    ],
)
def test_a_layout_and_its_inverse_give_the_weight_back(op, attributes, shape, rows):
    node = Node("", op, [], [AttrInt64(k, v) for k, v in attributes.items()])
    weight = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    layout = layout_of(node, len(shape))

    assert layout.matrix(weight).shape == rows
    split = weight.reshape(layout.split(shape))
    np.testing.assert_array_equal(layout.tensor(layout.matrix(weight), shape), split)
    per_row = np.arange(1, rows[0] + 1, dtype=np.float32)
    scaled = layout.tensor(layout.matrix(weight) * per_row[:, None], shape)
    np.testing.assert_array_equal(split * layout.beside(per_row, shape), scaled)


def test_conv_columns_are_in_the_order_of_the_kernel_channels_last():
    weight = np.arange(8).reshape(1, 2, 2, 2)

    assert Layout((0, 2, 3, 1)).matrix(weight).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
