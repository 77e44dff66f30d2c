"""Quantized files with products that no kernel adds in 16 bits: what every CPU should compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from quant_core.model.session import open_session

# Operator -> the positions of its int8 weights, and of their zero points.
WEIGHTS = {
    "MatMulInteger": ((1, 3),),
    "ConvInteger": ((1, 3),),
    "DynamicQuantizeLSTM": ((1, 9), (2, 11)),
}


def open_exact(path: Path) -> ort.InferenceSession:
    """A session in which products of uint8 activations and int8 weights never saturate.

    1. Nodes between DequantizeLinear and QuantizeLinear run as they stand, in float: none is fused.
    2. Weights of operators on integers, and their zero points, are 128 more, in uint8: the products
       are the same, and kernels of two uint8 factors add in 32 bits.
    """
    model = onnx.load(path)
    _shift_weights(model.graph)
    return open_session(model.SerializeToString(), optimize=False)  # 1


def _shift_weights(graph: onnx.GraphProto) -> None:
    """Rule 2, in subgraphs too."""
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _shift_weights(attribute.g)
        for positions in WEIGHTS.get(node.op_type, ()):
            for position in positions:
                nodes += _shifted(node, position)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _shifted(node: onnx.NodeProto, position: int) -> Iterator[onnx.NodeProto]:
    """What makes 128 more of an input, which the node then reads; 128 of a zero point left out."""
    node.input.extend([""] * (position + 1 - len(node.input)))
    given, name = node.input[position], f"{node.output[0]}/exact/{position}"
    shift = numpy_helper.from_array(np.array(128, np.int32))
    yield helper.make_node("Constant", [], [f"{name}/128"], value=shift)
    wide = f"{name}/128"
    if given:
        yield helper.make_node("Cast", [given], [f"{name}/wide"], to=TensorProto.INT32)
        yield helper.make_node("Add", [f"{name}/wide", f"{name}/128"], [f"{name}/sum"])
        wide = f"{name}/sum"
    yield helper.make_node("Cast", [wide], [name], to=TensorProto.UINT8)
    node.input[position] = name
