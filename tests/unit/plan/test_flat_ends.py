"""Where the values of a tensor cease to matter."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model import graph
from quant_core.plan.flat_ends import flat_ends
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from tests.models import normalized, random_feed, sketch
from tests.oracle.cases import weights

INF = math.inf


@pytest.mark.parametrize(
    ("body", "ends"),
    [
        ("y = Relu(x)", (0, INF)),
        ("y = HardSwish(x)", (-3, INF)),
        ("y = HardSigmoid<alpha = 0.25, beta = 0.5>(x)", (-2, 2)),
        ("h = HardSigmoid<alpha = 0.25, beta = 0.5>(x) y = Mul(x, h)", (-2, INF)),
        ("h = HardSigmoid<alpha = 0.25, beta = 0.5>(x) y = Mul(h, x)", (-2, INF)),
        ("y = Clip(x, low, high)", (-1, 6)),
        ("y = Clip(x, , high)", (-INF, 6)),
        ("y = Clip(x, high)", (0, INF)),
        ("a = Relu(x) b = HardSwish(x) y = Add(a, b)", (-3, INF)),
        ("h = HardSigmoid(x) y = Add(x, h)", (-INF, INF)),
        ("h = HardSigmoid(x) y = Mul(h, h)", (-2.5, 2.5)),
        ("h = HardSigmoid<alpha = -0.2>(x) y = Mul(x, h)", (-INF, INF)),
        ("r = Relu(x) h = HardSigmoid(r) y = Mul(x, h)", (-INF, INF)),
        ("y = LeakyRelu(x)", (-INF, INF)),
    ],
)
def test_ends_are_where_all_readers_become_flat(body, ends):
    low, high = np.float32(-1), np.float32(6)
    text = f"(float[2, 3] i) => (float[2, 3] y) {{ x = Sin(i) {body} }}"
    model = ir.from_proto(sketch(text, {"low": low, "high": high}))

    assert flat_ends(model.graph[0].outputs[0]) == pytest.approx(ends)


def test_no_integer_stands_for_what_a_hard_swish_cannot_tell_apart(tmp_path):
    text = """(float[n,8,6,6] x) => (float[n,8,6,6] y) {
        c = Conv<pads = [1, 1, 1, 1]>(x, w, b) h = HardSigmoid<alpha = 0.16666667>(c) s = Mul(c, h)
        y = Conv<pads = [1, 1, 1, 1]>(s, w, b)
    }"""
    tensors = weights(w=(8, 8, 3, 3)) | {"b": np.full(8, -5, np.float32)}
    proto = sketch(text, tensors)
    samples = [random_feed(proto, seed) for seed in range(4)]
    model = normalized(proto)
    plan = make_plan(model, QuantConfig(mode="static"), TARGETS["x86"])

    made = apply_plan(model, plan, observe(model, plan, samples)).model

    pairs = [node for node in made.graph if node.op_type == "QuantizeLinear"]
    written = next(node for node in pairs if node.inputs[0].producer() is not None)
    scale, zero = (graph.constant(value) for value in written.inputs[1:3])
    assert -3 - scale <= -float(scale) * int(zero) <= -3 + scale
