"""A few nodes of a model as a model of their own, which runs by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph

if TYPE_CHECKING:
    import onnx


def extract(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    later: Collection[str],
    known: Mapping[str, NDArray[Any]],
) -> onnx.ModelProto:
    """A model of these nodes; `model` is not changed.

    nodes  nodes of one graph, in the order in which they run
    later  names of tensors that are read after these nodes: those that the nodes write are outputs
    known  an array for every tensor that the nodes read and do not write, which becomes an input

    Inputs and outputs have the dtypes of the arrays and any shape. Constants that the nodes read
    are part of the new model, those that lie in files too, and inputs that have a default value
    and no array.
    """
    written = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in reads(node) if value not in written)
    constants = [v for v in read if graph.is_constant(v) or _is_left_out(v, known)]
    inputs = [v for v in read if not graph.is_constant(v) and not _is_left_out(v, known)]
    outputs = [value for value in written if value.name in later]
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=constants,
        opset_imports=model.graph.opset_imports,
        name="part",
    )
    # A view is serialized as a graph is, though Model's type does not say so.
    proto = ir.to_proto(ir.Model(view, ir_version=model.ir_version))  # type: ignore[arg-type]
    for constant, tensor in zip(constants, proto.graph.initializer, strict=True):
        _bring_along(constant.const_value, tensor)
    for node, message in zip(nodes, proto.graph.node, strict=True):
        for attribute in message.attribute:
            _bring_along(node.attributes[attribute.name].value, attribute.t)
    for value, kept in zip(proto.graph.input, inputs, strict=True):
        if not isinstance(kept.type, (ir.TensorType, NoneType)):
            continue  # a sequence or a map
        value.type.tensor_type.Clear()  # any shape
        value.type.tensor_type.elem_type = int(ir.DataType.from_numpy(known[value.name].dtype))
    return proto


def _bring_along(value: Any, tensor: onnx.TensorProto) -> None:
    """Edit the message in place: what lies in a file is part of it."""
    if isinstance(value, ir.ExternalTensor):
        tensor.CopyFrom(ir.to_proto(ir.tensor(value.numpy(), name=value.name)))


def _is_left_out(value: ir.Value, known: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the value is an input that has its default value."""
    return value.is_graph_input() and value.const_value is not None and value.name not in known


def producers_of(model: ir.Model) -> dict[str, ir.Node]:
    """Name of a tensor of the main graph -> the node that writes it."""
    return {str(value.name): node for node in model.graph for value in node.outputs}


def nodes_before(
    tensors: Iterable[str], producers: Mapping[str, ir.Node], has_run: Collection[ir.Node]
) -> set[ir.Node]:
    """The nodes that must still run before these tensors are known, after those that have run.

    producers  as `producers_of` tells
    """
    found: set[ir.Node] = set()
    unknown = list(tensors)
    while unknown:
        node = producers.get(unknown.pop())
        if node is None or node in has_run or node in found:
            continue
        found.add(node)
        unknown += [str(v.name) for v in reads(node)]
    return found


def reads(node: ir.Node) -> list[ir.Value]:
    """The values that a node reads, and those that its branches take from the graph around it."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found += _captured(attribute.as_graph())
    return found


def _captured(branch: ir.Graph) -> list[ir.Value]:
    """The values that a branch reads and does not define."""
    own = {value for node in branch for value in node.outputs}
    own |= {*branch.inputs, *branch.initializers.values()}
    found = [value for node in branch for value in reads(node)]
    found.extend(branch.outputs)
    return [value for value in found if value not in own]
