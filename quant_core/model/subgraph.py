"""A few nodes of a model as a model of their own, which runs by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph

if TYPE_CHECKING:
    import onnx


def part_of(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    later: Collection[str],
    known: Mapping[str, NDArray[Any]],
) -> onnx.ModelProto:
    """These nodes, which read tensors that are `known` (arrays tell their types) and give those that are read later.

    It takes and gives tensors of any shape, and holds all constants that it reads itself.
    """
    made = {v for n in nodes for v in n.outputs}
    read = dict.fromkeys(v for n in nodes for v in reads(n) if v not in made)
    constants = [v for v in read if graph.is_constant(v)]
    inputs, outputs = (
        [v for v in read if not graph.is_constant(v)],
        [v for v in made if v.name in later],
    )
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=constants,
        opset_imports=model.graph.opset_imports,
        name="part",
    )
    proto = ir.to_proto(ir.Model(view, ir_version=model.ir_version))  # type: ignore[arg-type]  # written as a graph is
    for constant, tensor in zip(constants, proto.graph.initializer, strict=True):
        if isinstance(constant.const_value, ir.ExternalTensor):  # read for this part alone
            tensor.CopyFrom(ir.to_proto(ir.tensor(graph.array(constant), name=constant.name)))
    for value in proto.graph.input:
        value.type.tensor_type.Clear()  # the arrays know, shapes included
        value.type.tensor_type.elem_type = int(ir.DataType.from_numpy(known[value.name].dtype))
    return proto


def reads(node: ir.Node) -> list[ir.Value]:
    """The values that a node reads, and those that its branches take from the graph around it."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            own = (
                {v for n in inner for v in n.outputs}
                | set(inner.inputs)
                | set(inner.initializers.values())
            )
            found += [v for n in inner for v in reads(n) if v not in own]
            found += [v for v in inner.outputs if v not in own]
    return found
