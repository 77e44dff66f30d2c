"""Sizes that are equal whatever the input have one name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model.session import optimized_graph
from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(11)
W3 = RNG.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12
W1 = RNG.standard_normal((16, 16, 1, 1)).astype(np.float32) / 4

EXCITED = """(float[n, 16, h, w] x) => (float[n, 16, u, v] y)
             { t = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w3)
               c = Conv<pads = [1, 1, 1, 1]>(t, w3) r = Relu(c)
               p = GlobalAveragePool(r) g = Conv(p, w1) s = Sigmoid(g) e = Mul(r, s)
               z = Conv(e, w1) a = Add(t, z) y = Conv<pads = [1, 1, 1, 1]>(a, w3) }"""


def shape_of(model: ir.Model, name: str) -> list[object]:
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    return [n if isinstance(n, int) else n.value for n in value.shape or ()]


def test_the_sizes_of_a_branch_are_those_of_the_trunk():
    found, _ = optimized(EXCITED, {"w3": W3, "w1": W1}, n=8)

    assert [(change.rule, change.node) for change in found.applied] == [("named_sizes", "a")]
    assert shape_of(found.model, "t") == shape_of(found.model, "z")
    assert all(isinstance(size, str) for size in shape_of(found.model, "z")[2:])


def test_onnxruntime_adds_inside_the_conv_what_it_knows_to_be_of_one_size():
    found, _ = optimized(EXCITED, {"w3": W3, "w1": W1}, n=8)

    operators = [node.op_type for node in optimized_graph(found.model).graph.node]

    assert "Add" not in operators


def test_sizes_that_only_may_be_equal_get_no_common_name():
    found, _ = optimized(
        """(float[n, 16, h, w] x) => (float[n, 16, u, v] y)
           { a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w3)
             b = Conv<strides = [2, 2]>(x, w1) y = Add(a, b) }""",
        {"w3": W3[:, :, :2, :2], "w1": W1},
        n=7,
    )

    assert not found.applied


def test_known_sizes_need_no_name():
    found, _ = optimized(EXCITED.replace("n, 16, h, w", "1, 16, 8, 8"), {"w3": W3, "w1": W1})

    assert not found.applied


def test_only_operands_of_the_sum_are_named():
    found, _ = optimized(EXCITED, {"w3": W3, "w1": W1}, n=8)

    named = {v.name for node in found.model.graph for v in node.outputs if v.shape is not None}
    assert named - {"y"} == {"t", "z"}
