"""Between ONNX's messages and onnx_ir, which cannot hold everything that a message can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quant_core.errors import ModelError
from quant_core.model.graph import consumers, graphs_in, home
from quant_core.model.unused import drop_unused

IR_DEFAULTS = 4  # the first in which an input may have a default value
HABIT = 5  # so many initializers, all of them inputs, are no choice of the author's
MAX_DENSE_BYTES = 1_900_000_000  # of a sparse tensor: protobuf holds 2 GB in a message
SCATTERED = ("float32", "float64", "int32", "int64")  # types that onnxruntime scatters for sure
SCATTERING_BYTES = 1024  # of the nodes that scatter a tensor, about
TYPE = "quantmill.type"  # key of a value's type that onnx_ir cannot hold, in the value's meta


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """The model of a message, which is changed.

    1. A sparse tensor becomes a dense one, or one that nodes scatter where that takes fewer bytes.
    2. An input or output of the model whose type holds a map keeps this type beside it, for
       `to_proto`. Inner values lose such types.
    3. The domain `ai.onnx`, ONNX's own by its full name, becomes "".
    4. Initializers that are inputs too are default values, unless all are: IR versions before 4
       demanded that, and exporters kept the habit.
    5. A Constant whose output is an initializer too goes: onnxruntime writes both for a graph
       inside a graph inside another.
    6. Nodes come after those whose results they read, as ONNX demands and onnxruntime does not.

    Raises: ModelError if a sparse tensor is not valid, or too large when it is dense.
    """
    for graph in _graphs(proto):
        _make_dense(graph.node, graph)  # 1
        _forget_maps(graph.value_info)
        _drop_repeated_constants(graph)  # 5
    for function in proto.functions:
        _make_dense(function.node)
        _forget_maps(function.value_info)
    held = _hold_maps([*proto.graph.input, *proto.graph.output])  # 2
    for imported in _opset_imports(proto):
        if imported.domain == "ai.onnx":  # 3; onnx_ir does the same for nodes
            imported.domain = ""
    _fix_constants(proto)  # 4
    model = ir.from_proto(proto)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in held:
            value.meta[TYPE] = held[value.name]
    if not _is_sorted(model.graph, set()):  # 6
        model.graph.sort()
    return model


def _is_sorted(graph: ir.Graph, done: set[ir.Node]) -> bool:
    """Whether no node, in a subgraph either, reads a result of one that is not `done` before it."""
    for node in graph:
        producers = (value.producer() for value in node.inputs if value is not None)
        if not done.issuperset(p for p in producers if p is not None):
            return False
        if not all(_is_sorted(inside, done) for inside in graphs_in(node)):
            return False
        done.add(node)
    return True


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The message of a model; external tensors stay where they are."""
    proto = ir.to_proto(model)
    restore_types(proto, model)
    return proto


def restore_types(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Edit the message in place: inputs and outputs get the types that onnx_ir could not hold."""
    infos = (*proto.graph.input, *proto.graph.output)
    values = (*model.graph.inputs, *model.graph.outputs)
    for info, value in zip(infos, values, strict=True):
        if TYPE in value.meta:
            info.type.CopyFrom(value.meta[TYPE])


def has_held_types(model: ir.Model) -> bool:
    """Whether an input or output has a type that onnx_ir cannot hold."""
    return any(TYPE in value.meta for value in (*model.graph.inputs, *model.graph.outputs))


def _fix_constants(proto: onnx.ModelProto) -> None:
    """Edit in place (rule 4): inputs that no caller is meant to give are none any more."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    fed = [info for info in proto.graph.input if info.name not in constants]
    are_all_inputs = len(proto.graph.input) - len(fed) == len(constants)
    if proto.ir_version < IR_DEFAULTS or (are_all_inputs and len(constants) >= HABIT):
        del proto.graph.input[:]
        proto.graph.input.extend(fed)
        proto.ir_version = max(proto.ir_version, IR_DEFAULTS)


def cut_held_types(model: ir.Model) -> None:
    """Edit in place: nodes that write outputs of types that onnx_ir cannot hold go, and what they
    read is an output instead; nodes that read inputs of such types go, and what they write is an
    input instead. Passes that go through messages need that.
    """
    for value in [v for v in model.graph.inputs if TYPE in v.meta]:
        for node in consumers(value):
            model.graph.inputs.extend(_detached(output) for output in node.outputs)
            home(node).remove(node, safe=True)
        model.graph.inputs.remove(value)
    outputs: list[ir.Value] = []
    for value in model.graph.outputs:
        producer = value.producer()
        if TYPE in value.meta and producer is not None:
            outputs += [v for v in producer.inputs if v is not None]
        else:
            outputs.append(value)
    model.graph.outputs[:] = list(dict.fromkeys(outputs))
    drop_unused(model)


def _detached(output: ir.Value) -> ir.Value:
    """A value that nobody computes, for all that read this one."""
    name, output.name = output.name, None
    value = ir.Value(name=name, type=output.type, shape=output.shape)
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    return value


def external_protos(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the message whose data lies in a file of its own."""
    nodes = [node for function in proto.functions for node in function.node]
    for graph in _graphs(proto):
        nodes += graph.node
        yield from _external(graph.initializer)
    for node in nodes:
        for attribute in node.attribute:
            yield from _external([attribute.t, *attribute.tensors])


def _external(tensors: Any) -> Iterator[onnx.TensorProto]:
    return (t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL)


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every graph inside a node, also of the model's functions."""
    yield proto.graph
    yield from _inside(proto.graph.node)
    for function in proto.functions:
        yield from _inside(function.node)


def _inside(nodes: Any) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for graph in graphs:
                yield graph
                yield from _inside(graph.node)


def _opset_imports(proto: onnx.ModelProto) -> Iterator[onnx.OperatorSetIdProto]:
    yield from proto.opset_import
    for function in proto.functions:
        yield from function.opset_import


def _make_dense(nodes: Any, graph: onnx.GraphProto | None = None) -> None:
    """Edit in place: sparse Constants among the nodes, and sparse initializers of the graph, are
    dense, or what nodes scatter.
    """
    ahead: list[onnx.NodeProto] = []
    for sparse in [] if graph is None else graph.sparse_initializer:
        name, dense = sparse.values.name, _dense(sparse)
        scattering = _scattering(dense, name)
        if scattering:
            ahead += scattering
        else:
            graph.initializer.append(numpy_helper.from_array(dense, name))  # type: ignore[union-attr]
    spelled = {}
    for position, node in enumerate(nodes):
        sparse = next(
            (a.sparse_tensor for a in node.attribute if a.HasField("sparse_tensor")), None
        )
        if sparse is not None:
            name, dense = node.output[0], _dense(sparse)
            spelled[position] = _scattering(dense, name) or [_constant(dense, name)]
    if graph is not None:
        graph.ClearField("sparse_initializer")
    if ahead or spelled:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del nodes[:]
        nodes.extend(ahead)
        for position, node in enumerate(kept):
            nodes.extend(spelled.get(position, [node]))


def _scattering(dense: NDArray[Any], name: str) -> list[onnx.NodeProto]:
    """Nodes that scatter the numbers of a tensor into zeros; none where it is not much smaller.

    ConstantOfShape -> ScatterElements(places, numbers) -> Reshape
    """
    flat = dense.ravel()
    places = np.flatnonzero(flat)
    size = len(places) * (flat.itemsize + 4) + SCATTERING_BYTES
    if dense.dtype.name not in SCATTERED or size > dense.nbytes / 2:
        return []
    constants = {
        "size": np.array([flat.size]),
        "places": places.astype(np.int32),
        "numbers": flat[places],
        "shape": np.array(dense.shape, np.int64),
    }
    of = {part: f"{name}/{part}" for part in (*constants, "zeros", "flat")}
    zero = numpy_helper.from_array(np.zeros(1, dense.dtype))
    return [
        *(_constant(array, of[part]) for part, array in constants.items()),
        helper.make_node("ConstantOfShape", [of["size"]], [of["zeros"]], value=zero),
        helper.make_node(
            "ScatterElements", [of["zeros"], of["places"], of["numbers"]], [of["flat"]]
        ),
        helper.make_node("Reshape", [of["flat"], of["shape"]], [name]),
    ]


def _constant(array: NDArray[Any], name: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def _drop_repeated_constants(graph: onnx.GraphProto) -> None:
    """Edit in place (rule 5): initializers stay, Constants of the same name go."""
    stored = {tensor.name for tensor in graph.initializer}
    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Constant" and node.output[0] in stored:
            del graph.node[position]


def _dense(sparse: onnx.SparseTensorProto) -> NDArray[Any]:
    """The tensor with its zeros. Indices are flat, or one row of coordinates per value."""
    name, shape = sparse.values.name, tuple(sparse.dims)
    try:
        values = numpy_helper.to_array(sparse.values)
        indices = numpy_helper.to_array(sparse.indices)
        size = int(np.prod(shape, dtype=object))
        if size * values.itemsize > MAX_DENSE_BYTES:
            raise ModelError(f"sparse tensor of shape {shape} is too large", name)
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), shape)
        dense = np.zeros(size, values.dtype)
        dense[indices] = values
        return dense.reshape(shape)
    except ModelError:
        raise
    except Exception as error:  # indices outside the shape, data of another length, ...
        raise ModelError(
            f"sparse tensor is not valid: {error}", name, "Export the model again"
        ) from error


def _hold_maps(infos: list[onnx.ValueInfoProto]) -> dict[str, onnx.TypeProto]:
    """Edit in place: types that hold a map are taken out. Returns them by the value's name."""
    held = {}
    for info in infos:
        if _holds_map(info.type):
            held[info.name] = onnx.TypeProto()
            held[info.name].CopyFrom(info.type)
            info.ClearField("type")
    return held


def _forget_maps(infos: Any) -> None:
    kept = [info for info in infos if not _holds_map(info.type)]
    if len(kept) < len(infos):
        del infos[:]
        infos.extend(kept)


def _holds_map(kind: onnx.TypeProto) -> bool:
    """Whether the type is a map, or a sequence or optional of one; one without content counts."""
    which = kind.WhichOneof("value")
    if which in ("sequence_type", "optional_type"):
        return _holds_map(getattr(kind, which).elem_type)
    return bool(which == "map_type")
