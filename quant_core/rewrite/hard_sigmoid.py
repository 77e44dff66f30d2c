"""Hard sigmoids spelled out, for runtimes that merge only that form into the operator before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.edit import constant


def spell_out_hard_sigmoid(model: ir.Model) -> None:
    """Edit the model in place: every HardSigmoid becomes what fuse_hard_sigmoid.py made it of.

        x -> HardSigmoid(alpha, beta) -> y
     =  x -> Add(beta / alpha) -> Clip(0, 1 / alpha) -> Mul(alpha) -> y

    One whose alpha is not positive stays.
    """
    for node in graph.nodes_of(model, "HardSigmoid"):
        _spell_out(graph.home(node), node)


def _spell_out(inside: ir.Graph, node: ir.Node) -> None:
    alpha, beta = graph.attribute(node, "alpha", 0.2), graph.attribute(node, "beta", 0.5)
    output = node.outputs[0]
    if alpha <= 0:
        return
    numbers = beta / alpha, 0.0, 1 / alpha, alpha
    shift, low, high, factor = (
        constant(inside, f"{output.name}_part", np.array(number)) for number in numbers
    )
    add = ir.Node("", "Add", [node.inputs[0], shift], name=f"{node.name}_shifted")
    clip = ir.Node("", "Clip", [add.outputs[0], low, high], name=f"{node.name}_clipped")
    product = ir.Node("", "Mul", [clip.outputs[0], factor], name=f"{node.name}_scaled")
    for made in (add, clip, product):
        made.outputs[0].name, made.outputs[0].type = f"{made.name}_output", output.type
    inside.insert_before(node, [add, clip, product])
    graph.replace_value(output, product.outputs[0])
    inside.remove(node, safe=True)
