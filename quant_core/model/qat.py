"""Models of quantization-aware training: float weights that are quantized at run time."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.model.constants import is_given
from quant_core.model.unused import drop_unused

QAT = "quantmill.qat"  # key of what was done with the pairs, in the model's metadata
RESPECT, REPLACE = "respect", "replace"


def handle_pairs(model: ir.Model, qat: str) -> bool:
    """Edit the model in place, if it comes from quantization-aware training; returns whether it
    does.

    respect  pairs stay, with the scales that were learned; weights become integers when onnxruntime
             folds their QuantizeLinear
    replace  pairs go, and the model is quantized from its float weights as any other is
    """
    if not any(_quantizes_weight(node) for node in graph.nodes_of(model)):
        return False
    if qat == REPLACE:
        for node in graph.nodes_of(model):
            if node.op_type == "DequantizeLinear":
                _remove_pair(node)
        drop_unused(model)
    model.metadata_props[QAT] = qat
    return True


def respects_pairs(model: ir.Model) -> bool:
    """Whether the model has pairs of quantization-aware training that stay."""
    return model.metadata_props.get(QAT) == RESPECT


def _quantizes_weight(node: ir.Node) -> bool:
    """Whether the node quantizes a float constant: a quantizer would have stored the integers."""
    return node.op_type == "QuantizeLinear" and is_given(node.inputs[0])


def _remove_pair(dequantize: ir.Node) -> None:
    """Edit in place: what reads the pair reads its float input, if the pair is one."""
    quantize = graph.value(dequantize.inputs[0]).producer()
    output = dequantize.outputs[0]
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return
    source = graph.value(quantize.inputs[0])
    if output.is_graph_output():
        identity = ir.Node("", "Identity", [source], name=dequantize.name)
        graph.home(dequantize).insert_before(dequantize, identity)
        graph.replace_value(output, identity.outputs[0])
    else:
        output.replace_all_uses_with(source)
    graph.home(dequantize).remove(dequantize, safe=True)
