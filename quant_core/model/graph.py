"""A model's graph: nodes, the constants behind their inputs, who reads what, and edits of these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.errors import ModelError

MICROSOFT = "com.microsoft"
INTEGER_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "MatMulInteger",
        "ConvInteger",
        "MatMulNBits",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "QGemm",
    }
)

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
# Operators whose constants of rank 2 or more are weights.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Gather"}) | RECURRENT

GRAPH_TYPES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def opset(model: ir.Model, where: str = "") -> int:
    """The version of ONNX's own operators that the model uses.

    Raises: ModelError, about `where`, if the model declares none.
    """
    version = model.graph.opset_imports.get("")
    if version is None:
        raise ModelError(
            "the model declares no ONNX opset", where, "Is it truncated, or another format?"
        )
    return version


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then every graph inside an If, Loop or Scan, each before those inside it."""
    yield model.graph
    yield from list(graphs_inside(model.graph))


def graphs_inside(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graphs inside nodes, as `graph.subgraphs` finds them at ten times the cost."""
    for node in graph:
        for attribute in node.attributes.data.values():
            if attribute.type in GRAPH_TYPES:
                for inside in _graphs_held(attribute):
                    yield inside
                    yield from graphs_inside(inside)


def nodes_of(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of all these graphs in their order: all, or ONNX's own operators of these types.

    The model may be edited meanwhile: nodes that are gone when their turn comes are left out.
    """
    for graph in graphs_of(model):
        for node in list(graph):
            is_wanted = not op_types or (node.op_type in op_types and not node.domain)
            if is_wanted and node.graph is graph:
                yield node


def initializers_of(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers of all these graphs in their order; the model may be edited meanwhile."""
    for graph in graphs_of(model):
        yield from list(graph.initializers.values())


def is_quantized(model: ir.Model) -> bool:
    """Whether a node computes in, or converts from, a quantizer's integers."""
    return any(node.op_type in INTEGER_OPS for node in nodes_of(model))


# Values


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array behind a value of a normalized graph; None if the value is computed.

    The array is not a copy and must not be written to.

    Raises: ModelError if the tensor's file cannot be read.
    """
    if value is None or not is_constant(value):
        return None
    assert value.const_value is not None
    try:
        return np.asarray(value.const_value.numpy())
    except Exception as error:
        raise ModelError(
            f"tensor {value.name} cannot be read: {first_line(error)}",
            hint="Is the file truncated?",
        ) from error


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer; its tensor is not read."""
    return (
        value is not None
        and value.const_value is not None
        and value.producer() is None
        and not value.is_graph_input()
    )


def is_dequantized(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear makes the value."""
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def is_float_weight(value: ir.Value | None) -> bool:
    """Whether the value is a constant float32 tensor of rank 2 or more that holds numbers."""
    if value is None or not is_constant(value):
        return False
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    return len(tensor.shape) >= 2 and tensor.size > 0


def array(weight: ir.Value) -> NDArray[Any]:
    """The array behind a value that is known to be constant. It must not be written to."""
    found = constant(weight)
    assert found is not None, f"{weight.name} is not constant"
    return found


def number(value: ir.Value | None) -> float | None:
    """The number that a float32 constant of one element holds, None for another value."""
    if value is None or not is_constant(value) or value.const_value.dtype != ir.DataType.FLOAT:  # type: ignore[union-attr]
        return None
    found = array(value)
    return float(found.reshape(())) if found.size == 1 else None


def value(of: ir.Value | None) -> ir.Value:
    """The same value, where the operator requires that input."""
    assert of is not None
    return of


def name_of(of: ir.Value | None) -> str:
    """The name of an input that the operator requires."""
    return str(value(of).name)


def shape_of(weight: ir.Value) -> tuple[int, ...]:
    """The shape of a constant."""
    assert weight.const_value is not None
    return tuple(int(size) for size in weight.const_value.shape.numpy())


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the value, each once, in the order of first use."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value, once and in its own graph; None if others see it too."""
    uses = value.uses()
    producer = value.producer()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader = next(iter(uses)).node
    own = producer.graph if producer is not None else value.graph
    return reader if reader.graph is own else None


# Nodes


def home(held: ir.Node | ir.Value) -> ir.Graph:
    """The graph that holds the node, or the initializer: nodes of the graphs inside may read it."""
    assert isinstance(held.graph, ir.Graph)
    return held.graph


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default if it is absent."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def input_at(node: ir.Node, position: int | None) -> ir.Value | None:
    """The input at that position; None if it is left out, or if the operator has no such input."""
    if position is None or position >= len(node.inputs):
        return None
    return node.inputs[position]


def computed_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that are there and no constants."""
    return [value for value in node.inputs if value is not None and not is_constant(value)]


def clip_bounds(clip: ir.Node) -> tuple[float, float] | None:
    """The bounds of a Clip, infinite where one is left out; None if one is no float32 constant."""
    found = [-math.inf, math.inf]
    for i, bound in enumerate(clip.inputs[1:]):
        limit = number(bound)
        if limit is not None:
            found[i] = limit
        elif bound is not None:
            return None
    return found[0], found[1]


def first_output(node: ir.Node) -> ir.Value:
    """The first output that is not left out: a recurrent node may write its last state alone."""
    return next((value for value in node.outputs if value.name), node.outputs[0])


# Edits: each edits in place and says so


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Edit in place: readers of `old`, and the graph output it may be, read `new` instead.

    `new` takes the name, the type, the shape, the text and the metadata of `old`.
    """
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=old.is_graph_output())
    new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)
    old.name = f"{name}_replaced"
    new.name = name


def set_input(node: ir.Node, position: int, value: ir.Value) -> None:
    """Edit in place: the node reads `value` at that position, even if it had no such input."""
    if len(node.inputs) <= position:
        node.resize_inputs(position + 1)
    node.replace_input_with(position, value)


def initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer, which the graph is given in place. No other value may have the name."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def graphs_in(node: ir.Node) -> list[ir.Graph]:
    """The graphs that the node holds itself."""
    attributes = node.attributes.data.values()
    return [held for a in attributes if a.type in GRAPH_TYPES for held in _graphs_held(a)]


def _graphs_held(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """The graphs of an attribute of one of GRAPH_TYPES."""
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, of at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
