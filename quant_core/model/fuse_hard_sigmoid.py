"""Gates that exporters spell out in elementary operators, as the one operator that onnxruntime computes in one pass.

clip(x + a, 0, h) / h = HardSigmoid(x) with alpha = 1 / h and beta = a / h, alone (squeeze and excitation) or within
x * clip(x + 3, 0, 6) / 6, the hard swish of MobileNetV3 (Howard et al. 2019, arXiv 1905.02244, section 5.2).
onnxruntime merges a HardSigmoid into the Conv before it; what is spelled out takes four passes over the tensor.
"""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph

NEARLY = 1e-6


def fuse_gates(model: ir.Model) -> None:
    """Every such gate becomes a HardSigmoid, in place; tensors that others read keep their names and values."""
    for inside in graph.graphs_of(model):
        for node in [n for n in inside if n.op_type == "Clip" and not n.domain]:
            _fuse(inside, node)


def _fuse(inside: ir.Graph, clip: ir.Node) -> None:
    bounds = [_scalar(v) for v in clip.inputs[1:]]
    shifted = clip.inputs[0]
    add = shifted.producer() if shifted is not None else None
    if (
        len(bounds) != 2
        or bounds[0] != 0
        or not bounds[1]
        or bounds[1] < 0
        or add is None
        or add.op_type != "Add"
    ):
        return
    shifts = [
        (x, a)
        for x, v in (add.inputs, reversed(add.inputs))
        if x is not None and (a := _scalar(v)) is not None
    ]
    reader = _only_reader(clip.outputs[0])
    if len(shifts) != 1 or _only_reader(add.outputs[0]) is not clip or reader is None:
        return
    product, divided = None, reader
    if reader.op_type == "Mul" and not any(graph.is_constant(v) for v in reader.inputs):
        after = _only_reader(reader.outputs[0])
        if after is None or list(reader.inputs).count(clip.outputs[0]) != 1:
            return
        product, divided = reader, after
    source, shift, high = shifts[0][0], shifts[0][1], bounds[1]
    if abs(_divisor(divided) / high - 1) > NEARLY:
        return
    attributes = [ir.AttrFloat32("alpha", 1 / high), ir.AttrFloat32("beta", shift / high)]
    gate = ir.Node("", "HardSigmoid", [source], attributes, name=clip.name)
    gate.outputs[0].name, gate.outputs[0].type = (
        f"{clip.outputs[0].name}_gate",
        clip.outputs[0].type,
    )
    inside.insert_before(clip, gate)
    if product is not None:
        clip.outputs[0].replace_all_uses_with(gate.outputs[0])
    graph.take_over(divided.outputs[0], gate.outputs[0] if product is None else product.outputs[0])
    inside.remove([divided, clip, add], safe=True)


def _divisor(node: ir.Node) -> float:
    """By what the node divides its one input, 0 if it does something else."""
    first, second = (_scalar(v) for v in node.inputs) if len(node.inputs) == 2 else (None, None)
    if node.op_type == "Div" and first is None and second:
        return second
    if node.op_type == "Mul" and (first is None) != (second is None) and (first or second):
        return 1 / (first or second or 1.0)
    return 0.0


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers, producer = graph.consumers(value), value.producer()
    if len(readers) != 1 or value.is_graph_output() or producer is None:
        return None
    return readers[0] if readers[0].graph is producer.graph else None


def _scalar(value: ir.Value | None) -> float | None:
    """The number behind a float32 constant that broadcasts to any shape, None for anything else."""
    if not graph.is_constant(value) or value.const_value.dtype != ir.DataType.FLOAT:  # type: ignore[union-attr]
        return None
    array = graph.array(value)  # type: ignore[arg-type]
    return float(array.reshape(())) if array.size == 1 and array.ndim <= 1 else None
