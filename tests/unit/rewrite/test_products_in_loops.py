"""Products in loops compute dynamically, where that was chosen: their ranges are not measured."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.config import QuantConfig
from quant_core.model.session import open_session
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodeChoice, QuantPlan
from quant_core.rewrite.apply import apply_plan
from tests.models import normalized, sketch

LOOP = """(float[n, 40] xs) => (float[n, 40] y) {
    y = Loop <body = body (int64 i, bool go_on, float[n, 40] before)
        => (bool go_on_, float[n, 40] after) {
        go_on_ = Identity(go_on)
        one = MatMul(before, w)
        other = Gemm(before, u, b)
        outside = MatMul(xs, w)
        some = Sum(one, other, outside)
        after = Tanh(some)
    }> (steps, , xs)
}"""
RNG = np.random.default_rng(0)
CONSTANTS = {
    "steps": np.array(3),
    "w": RNG.standard_normal((40, 40)).astype(np.float32) / 8,
    "u": RNG.standard_normal((40, 40)).astype(np.float32) / 8,
    "b": RNG.standard_normal(40).astype(np.float32),
}


def planned(**choices: Compute) -> tuple[ir.Model, QuantPlan]:
    model = normalized(sketch(LOOP, CONSTANTS))
    config, target = QuantConfig(mode="dynamic", min_elements=0), TARGETS["x86"]
    names = [n.node for n in make_plan(model, config, target).nodes]
    chosen = {name: NodeChoice(compute) for name in names for compute in choices.values()}
    return model, make_plan(model, config, target, chosen)


def operators(model: ir.Model) -> list[str]:
    """Those in the loop."""
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    return [node.op_type for node in loop.attributes["body"].as_graph()]


@pytest.mark.parametrize("choices", [{}, {"all": Compute.DYNAMIC}])
def test_products_in_a_loop_compute_dynamically_and_share_what_quantizes_their_input(choices):
    model, plan = planned(**choices)

    quantized = apply_plan(model, plan, None).model

    inside = operators(quantized)
    assert inside.count("MatMulInteger") == 3
    assert inside.count("DynamicQuantizeLinear") == 2
    x = RNG.standard_normal((4, 40)).astype(np.float32)
    (exact,), (found,) = (open_session(m).run(None, {"xs": x}) for m in (model, quantized))
    assert np.square(found - exact).sum() < np.square(exact).sum() / 1000


@pytest.mark.parametrize("compute", [Compute.STATIC, Compute.BLOCKS, Compute.FLOAT])
def test_products_in_a_loop_compute_in_no_other_integers(compute):
    model, plan = planned(all=compute)

    assert not any(op.endswith("Integer") or "NBits" in op for op in operators(model))
    assert {n.compute for n in plan.nodes} <= {Compute.FLOAT, Compute.DYNAMIC}
    assert apply_plan(model, plan, None).model
