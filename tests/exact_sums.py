"""Quantized files whose products no kernel adds in 16 bits: what all x86 CPUs should compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes

from quant_core.model.session import open_session

# Operator -> the positions of its weights, of their zero points, and of a tensor of these' shape.
WEIGHTS = {
    "DequantizeLinear": ((0, 2, 1),),
    "MatMulInteger": ((1, 3, None),),
    "ConvInteger": ((1, 3, None),),
    "DynamicQuantizeLSTM": ((1, 9, 8), (2, 11, 10)),
}


def open_exact(path: Path) -> ort.InferenceSession:
    """A session in which int8 weights, and their zero points, are 128 more, in uint8.

    The products are the same, and kernels of two uint8 factors add them in 32 bits. What is added
    is folded when the model is loaded, so that onnxruntime fuses the same nodes.
    """
    model = onnx.load(path)
    types = {t.name: t.data_type for t in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in infer_shapes(model).graph.value_info}
    _shift_weights(model.graph, {name for name, kind in types.items() if kind == TensorProto.INT8})
    return open_session(model.SerializeToString())


def _shift_weights(graph: onnx.GraphProto, int8: set[str]) -> None:
    """Edit the graph in place, and its subgraphs."""
    int8 = int8 | {t.name for t in graph.initializer if t.data_type == TensorProto.INT8}
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _shift_weights(attribute.g, int8)
        for weight, zero_point, like in WEIGHTS.get(node.op_type, ()):
            if node.input[weight] in int8:
                nodes += _shifted(node, weight)
                nodes += _shifted(node, zero_point, like)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _shifted(
    node: onnx.NodeProto, position: int, like: int | None = None
) -> Iterator[onnx.NodeProto]:
    """What makes 128 more of an input, which the node then reads; 128, in the shape of another
    input, of one that is left out.
    """
    node.input.extend([""] * (position + 1 - len(node.input)))
    given, name = node.input[position], f"{node.output[0]}/exact/{position}"
    shift = numpy_helper.from_array(np.array(128, np.int32))
    yield helper.make_node("Constant", [], [f"{name}/shift"], value=shift)
    if given:
        yield helper.make_node("Cast", [given], [f"{name}/wide"], to=TensorProto.INT32)
        yield helper.make_node("Add", [f"{name}/wide", f"{name}/shift"], [f"{name}/sum"])
    elif like is not None:
        yield helper.make_node("Shape", [node.input[like]], [f"{name}/shape"])
        yield helper.make_node("Expand", [f"{name}/shift", f"{name}/shape"], [f"{name}/sum"])
    else:
        yield helper.make_node("Identity", [f"{name}/shift"], [f"{name}/sum"])
    yield helper.make_node("Cast", [f"{name}/sum"], [name], to=TensorProto.UINT8)
    node.input[position] = name
