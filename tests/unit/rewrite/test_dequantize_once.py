"""Float nodes that read what a node in integers writes dequantize it once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model import graph
from quant_core.model.session import open_session, optimized_graph, run
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from tests.models import normalized, random_feed, sketch
from tests.oracle.cases import weights

SWISH = "h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(a) s = Mul(a, h)"


def quantized(body: str, target: str = "x86", opset: int = 17) -> ir.Model:
    """A small net of Convs in integers and what is written for it; the outputs are alike."""
    text = f"(float[n,8,6,6] x) => (float[n,8,6,6] y) {{ a = Conv(x, u) {body} }}"
    constants = weights(u=(8, 8, 1, 1), v=(8, 8, 1, 1))
    proto = sketch(text, constants if "v)" in body else {"u": constants["u"]}, opset)
    model = normalized(proto)
    feed = random_feed(proto)
    plan = make_plan(model, QuantConfig(), TARGETS[target])
    made = apply_plan(model, plan, observe(model, plan, [feed])).model
    there, here = (run(open_session(m), feed)[0] for m in (model, made))
    assert np.abs(there - here).max() < 0.1 * np.abs(there).max()
    return made


def readers_of(model: ir.Model, op_type: str) -> list[list[str]]:
    """The operators that read each node of this kind that reads what another node computes."""
    found = [n for n in model.graph if n.op_type == op_type and n.inputs[0].producer()]
    return [sorted(r.op_type for r in graph.consumers(n.outputs[0])) for n in found]


def test_a_hard_swish_dequantizes_its_input_once():
    made = quantized(f"{SWISH} y = Conv(s, v)")

    assert readers_of(made, "CastLike") == [["HardSigmoid", "Mul"]]
    ran = [n.op_type for n in optimized_graph(ir.to_proto(made).SerializeToString()).graph.node]
    assert ran.count("DequantizeLinear") == 2  # of the hard swish, and of the output


def test_nodes_in_integers_read_the_dequantize_itself():
    made = quantized(f"{SWISH} b = Conv(a, v) y = Add(s, b)")

    assert readers_of(made, "CastLike") == [["HardSigmoid", "Mul"]]
    assert ["CastLike", "Conv"] in readers_of(made, "DequantizeLinear")


@pytest.mark.parametrize(
    ("body", "target", "opset"),
    [
        ("h = HardSigmoid(a) y = Conv(h, v)", "x86", 17),
        (f"{SWISH} y = Conv(s, v)", "x86", 14),
        (f"{SWISH} y = Conv(s, v)", "openvino", 17),
    ],
    ids=["one reader", "no such operator", "another runtime"],
)
def test_nothing_is_written_where_nothing_is_gained(body, target, opset):
    made = quantized(body, target, opset)

    assert not readers_of(made, "CastLike")
