"""AveragePools that count their padding, for runtimes that pad integers with 0, not with their zero
point.

Source: OpenVINO 2026.4.1, whose AveragePool reads the integers behind a DequantizeLinear, also
through MaxPool, Reshape and others, and counts 0 for each pixel of the padding, whatever integer
stands for 0. A Pad in front is merged into it, and no better.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph


def leave_out_padding(model: ir.Model) -> None:
    """Edit the model in place: no AveragePool of what is computed counts its padding.

        x -> AveragePool(count_include_pad = 1) -> y
     =  x -> AveragePool(count_include_pad = 0) -> Mul -> y
        x -> Shape -> ConstantOfShape(1) -> AveragePool(count_include_pad = 1) -> (of the Mul)

    The factor is the share of the window that lies inside. A pool that rounds its size up stays:
    runtimes do not agree on what it counts.
    """
    for node in graph.nodes_of(model, "AveragePool"):
        if _counts_padding(node):
            _leave_out(graph.home(node), node)


def _counts_padding(node: ir.Node) -> bool:
    is_padded = any(graph.attribute(node, "pads", ()))
    is_padded |= str(graph.attribute(node, "auto_pad", "NOTSET")).startswith("SAME")
    counts = graph.attribute(node, "count_include_pad", 0)
    return bool(is_padded and counts and not graph.attribute(node, "ceil_mode", 0))


def _leave_out(inside: ir.Graph, node: ir.Node) -> None:
    output = node.outputs[0]
    one = ir.AttrTensor("value", ir.tensor(np.ones(1, np.float32)))
    shape = ir.Node("", "Shape", [node.inputs[0]], name=f"{node.name}_shape")
    ones = ir.Node("", "ConstantOfShape", shape.outputs, [one], name=f"{node.name}_ones")
    share = ir.Node(
        "", "AveragePool", ones.outputs, node.attributes.values(), name=f"{node.name}_share"
    )
    kept = [a for name, a in node.attributes.items() if name != "count_include_pad"]
    mean = ir.Node("", "AveragePool", [node.inputs[0]], kept, name=f"{node.name}_inside")
    product = ir.Node("", "Mul", [*mean.outputs, *share.outputs], name=f"{node.name}_counted")
    made = (shape, ones, share, mean, product)
    for new in made:
        new.outputs[0].name = f"{new.name}_output"
    inside.insert_before(node, made)
    graph.replace_value(output, product.outputs[0])
    inside.remove(node, safe=True)
