"""What onnxruntime leaves undone in a float graph, and what it then does with the rewritten one.

Every rule of quant_core/optimize that is worth its lines stands on one of these. If a test fails
with a new onnxruntime, the rule may have become superfluous.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from quant_core.model.session import optimized_graph
from tests.models import sketch

RNG = np.random.default_rng(9)
C = 32
CONSTANTS = {
    "w": RNG.standard_normal((C, C, 3, 3)).astype(np.float32),
    "d": np.ones((C, 1, 1, 1), np.float32),
    "s": np.float32([2]),
    "slope": RNG.uniform(0.1, 0.5, (C, 1, 1)).astype(np.float32),
    "norm": RNG.uniform(0.5, 2, C).astype(np.float32),
}
CONV = "Conv<pads = [1, 1, 1, 1]>"


def operators(body: str, extra: Mapping[str, np.ndarray] | None = None) -> list[str]:
    """The operators that onnxruntime really runs for a graph from x to y with C channels."""
    text = f"(float[n, {C}, 16, 16] x) => (float[n, {C}, 16, 16] y) {{ {body} }}"
    proto = sketch(text, {**CONSTANTS, **(extra or {})})
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return [node.op_type for node in optimized_graph(proto.SerializeToString()).graph.node]


def test_a_scale_of_one_number_stays_behind_its_conv():
    assert "Mul" in operators(f"c = {CONV}(x, w) y = Mul(c, s)")


def test_x_times_hard_sigmoid_of_x_becomes_the_activation_of_the_conv():
    sigmoid = "HardSigmoid<alpha = 0.16666667, beta = 0.5>(c)"

    found = operators(f"c = {CONV}(x, w) h = {sigmoid} m = Mul(c, h) y = {CONV}(m, w)")

    assert found == ["ReorderInput", "Conv", "Conv", "ReorderOutput"]


@pytest.mark.parametrize(
    ("between", "leaves"),
    [
        ("a = Add(r, s)", True),
        ("a = Conv<group = 32>(r, d)", False),
        ("a = BatchNormalization(r, norm, norm, norm, norm)", False),
        ("a = PRelu(r, slope)", True),
        ("p = Conv<group = 32>(r, d) q = Relu(p) t = Conv<group = 32>(r, d) a = Add(t, q)", False),
        ("q = Relu(r) p = Conv<group = 32>(q, d) t = Conv<group = 32>(r, d) a = Add(t, p)", False),
        ("q = Pad(r, nothing) a = Add(q, r)", True),
    ],
)
def test_which_operators_leave_the_blocked_layout(between, leaves):
    body = f"c = {CONV}(x, w) r = Relu(c) {between} y = {CONV}(a, w)"

    found = operators(body, {"nothing": np.zeros(8, np.int64)})

    assert (found.count("ReorderInput") > 1) is leaves


@pytest.mark.parametrize(("row", "is_blocked"), [("", False), ("1, ", True)])
def test_convs_over_one_axis_have_no_blocked_kernel(row, is_blocked):
    text = f"(float[n, {C}, {row}16] x) => (float[n, {C}, {row}14] y) {{ y = Conv(x, w) }}"
    weight = CONSTANTS["w"][:, :, :1] if row else CONSTANTS["w"][:, :, 0]

    graph = optimized_graph(sketch(text, {"w": weight}).SerializeToString()).graph

    assert ("ReorderOutput" in {node.op_type for node in graph.node}) is is_blocked
