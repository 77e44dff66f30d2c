"""What is computed twice is computed once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model.normalize import normalize
from quant_core.optimize.run import optimize
from tests.models import sketch
from tests.unit.optimize.checked import optimized

W = np.random.default_rng(5).standard_normal((4, 4, 3, 3)).astype(np.float32)
RULE = "common_subexpressions"


def test_equal_nodes_and_all_that_follows_from_them_are_computed_once():
    found, operators = optimized(
        """(float[n, 4, 8, 8] x) => (float[n, 8, 6, 6] y)
           { a = Conv(x, w) s = Sigmoid(a) p = Mul(a, s)
             b = Conv(x, w) t = Sigmoid(b) q = Mul(t, b) y = Concat<axis = 1>(p, q) }""",
        {"w": W},
    )

    assert operators == ["Conv", "Sigmoid", "Mul", "Concat"]
    changes = [change for change in found.applied if change.rule == RULE]
    assert [(change.node, change.absorbed) for change in changes] == [
        ("a", ("b",)), ("s", ("t",)), ("p", ("q",))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Conv(x, w) b = Conv<pads = [1, 1, 1, 1]>(x, w)",
        "a = Sub(x, k) b = Sub(k, x)",
        "a = RandomNormalLike(x) b = RandomNormalLike(x)",
    ],
)
def test_other_attributes_another_order_or_chance_make_another_node(nodes):
    text = f"""(float[n, 4, 8, 8] x) => (float[n, 4, h, w] c, float[n, 4, u, v] d)
               {{ {nodes} c = Relu(a) d = Relu(b) }}"""
    model = ir.from_proto(sketch(text, {"w": W, "k": np.float32([2])}))
    normalize(model)

    assert RULE not in {change.rule for change in optimize(model).applied}


@pytest.mark.parametrize("outputs", ["a, float[n] c", "b, float[n] c"])
def test_an_output_of_the_graph_keeps_its_name(outputs):
    found, operators = optimized(
        f"""(float[n] x) => (float[n] {outputs})
            {{ a = Exp(x) b = Exp(x) d = Sqrt(a) c = Sub(d, b) }}""",
        {},
    )

    assert operators == ["Exp", "Sqrt", "Sub"]
    assert [v.name for v in found.model.graph.outputs] == [outputs[0], "c"]


def test_two_equal_outputs_have_a_node_each():
    _, operators = optimized(
        "(float[n] x) => (float[n] a, float[n] b) { a = Exp(x) b = Exp(x) }", {}
    )

    assert operators == ["Exp", "Exp"]


def test_nodes_that_hold_types_stay():
    optional = "Optional<type: type_proto = float[2]>()"
    text = f"""(bool c) => (optional(float[2]) y) {{ y = If(c) <
        then_branch = yes () => (optional(float[2]) a) {{ a = {optional} }},
        else_branch = no () => (optional(float[2]) b) {{ b = {optional} }}
    > }}"""

    assert not optimize(ir.from_proto(sketch(text, {}))).applied
