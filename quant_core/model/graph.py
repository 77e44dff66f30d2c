"""What a model is made of: nodes, the constants behind their inputs, and who uses what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers the 4-bit types that onnx_ir gives numpy)
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from quant_core.errors import ModelError

MICROSOFT = "com.microsoft"
INTEGER_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger",
     "ConvInteger", "MatMulNBits", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "QGemm"}
)  # fmt: skip
MESSAGE_BYTES = 1_900_000_000  # of tensors in one file: protobuf holds 2 GB in a message


def load(path: str | Path) -> ir.Model:
    """The model in that file; tensors in external files stay there until they are read.

    Raises: ModelError if there is no such file, it is not ONNX, or external data is missing or outside its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(
            "no such file" if not path.exists() else "is a folder, not a file",
            str(path),
            "Check the path",
        )
    try:
        model = ir.load(path)
        opset(model, str(path))
        if model.graph is None or not len(model.graph):
            raise ModelError(
                "the model has no nodes", str(path), "Was it truncated? Export or download it again"
            )
        check_external(model, path)
        return model
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # protobuf and onnx_ir raise many types for bytes that are not a model
        raise ModelError(
            f"not a readable ONNX model: {_first_line(error)}",
            str(path),
            "Is it truncated, or another format?",
        ) from error


def _bypass_identities(of: ir.Graph) -> None:
    for node in [n for n in of if n.op_type == "Identity" and not n.domain]:
        source, out = node.inputs[0], node.outputs[0]
        if source is not None and not out.is_graph_output():
            out.replace_all_uses_with(source)
            of.remove(node, safe=True)


def opset(model: ir.Model, where: str = "") -> int:
    """The version of ONNX's own operators that the model uses. Raises: ModelError if it declares none."""
    version = model.graph.opset_imports.get("")
    if version is None:
        raise ModelError(
            "the model declares no ONNX opset", where, "Is it truncated, or another format?"
        )
    return version


def check_external(model: ir.Model, path: Path) -> None:
    """Raises: ModelError if a tensor's external file is missing, too short, or outside the model's folder."""
    folder = path.parent.resolve()
    for tensor in external_tensors(model):
        location = Path(os.fspath(tensor.location))
        file = (folder / location).resolve()
        if location.is_absolute() or ".." in location.parts or not file.is_relative_to(folder):
            raise ModelError(
                f"tensor {tensor.name} lies outside the model's folder: {location}",
                str(path),
                "Save it beside the model",
            )
        if not file.is_file():
            raise ModelError(
                f"external data file {location} is missing", str(path), "Copy it beside the model"
            )
        end = (tensor.offset or 0) + (tensor.length or 0)
        if end > file.stat().st_size:
            raise ModelError(
                f"external data file {location} is too short for {tensor.name}",
                str(path),
                "Copy it again",
            )


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor that lies in a file of its own: initializers, and those in attributes of nodes."""
    functions = [
        g
        for function in model.functions.values()
        for g in (function.graph, *function.graph.subgraphs())
    ]
    for graph in (*graphs_of(model), *functions):
        held = [value.const_value for value in graph.initializers.values()]
        held += [tensor for node in graph for tensor in _attribute_tensors(node)]
        yield from (tensor for tensor in held if isinstance(tensor, ir.ExternalTensor))


def let_go(*tensors: Any) -> None:
    """Those that lie in files leave the memory; they come back when they are read."""
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            with suppress(BufferError):  # an array of it is in use
                tensor.release()


def _attribute_tensors(node: ir.Node) -> Iterator[Any]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            yield attribute.value
        elif attribute.type == ir.AttributeType.TENSORS:
            yield from attribute.value


def size_on_disk(path: Path, model: ir.Model) -> int:
    """Bytes of the model file and of its external data files."""
    files = {Path(os.fspath(t.location)) for t in external_tensors(model)}
    return path.stat().st_size + sum((path.parent / f).stat().st_size for f in files)


def is_large(model: ir.Model, *, as_float: bool = False) -> bool:
    """Whether the tensors, wherever they lie, come near what one protobuf message can hold; or would in float32."""
    return sum(4 * t.size if as_float else t.nbytes for t in _initializers(model)) > MESSAGE_BYTES


def size_in_file(model: ir.Model) -> int:
    """Bytes that the model takes when it is written; of a large one, those of its tensors."""
    if is_large(model):
        return sum(t.nbytes for t in _initializers(model))
    return int(ir.to_proto(model).ByteSize())


def serialized(model: ir.Model, folder: Path) -> tuple[bytes, Path | None]:
    """The model as one protobuf message, and the folder of the tensors that are not in it: theirs, or the one given.

    Tensors that lie in files stay there, unless they are in several folders; all others only if they are too large.
    """
    tensors = list(_initializers(model))
    folders = {Path(t.base_dir).absolute() for t in tensors if isinstance(t, ir.ExternalTensor)}
    if (
        len(folders) > 1
        or sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor)) > MESSAGE_BYTES
    ):
        path = folder / "model.onnx"
        ir.save(model, path, external_data="tensors")
        return path.read_bytes(), folder
    return ir.to_proto(model).SerializeToString(), next(iter(folders), None)


def _initializers(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    return (
        v.const_value
        for g in graphs_of(model)
        for v in g.initializers.values()
        if v.const_value is not None
    )


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then every graph inside an If, Loop or Scan."""
    yield model.graph
    yield from model.graph.subgraphs()


def normalize(model: ir.Model) -> ir.Model:
    """The same model, in place, with every constant an initializer, no Identity, and a unique name on every node.

    1. Constant nodes become initializers; initializers that are graph inputs too stop being inputs.
    2. Identity nodes go, except those that write an output of a graph.
    3. Nodes without a name, or with one that another node has, get one from their first output.
    4. AveragePool loses dilations of 1, which onnxruntime's QLinearAveragePool does not know.
    """
    try:
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.RemoveInitializersFromInputsPass()(model)
        for g in graphs_of(model):
            _bypass_identities(g)
        passes.RemoveUnusedNodesPass()(model)
    except Exception as error:
        raise ModelError(
            f"the graph is not valid: {_first_line(error)}", hint="Run onnx.checker on it"
        ) from error
    seen: set[str] = set()
    for graph in graphs_of(model):
        for node in graph:
            base = node.name or f"{node.op_type}_{node.outputs[0].name}"
            name, n = base, 1
            while name in seen:
                name, n = f"{base}_{n}", n + 1
            node.name = name
            seen.add(name)
            if node.op_type == "AveragePool" and set(attribute(node, "dilations", (0,))) == {1}:
                node.attributes.pop("dilations")
    return model


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array behind a value of a normalized graph, None if it is computed. Not a copy: do not write to it."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    if value.is_graph_input():
        return None
    try:
        return np.asarray(value.const_value.numpy())
    except Exception as error:
        raise ModelError(
            f"tensor {value.name} cannot be read: {_first_line(error)}",
            hint="Is the file truncated?",
        ) from error


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer, without reading it."""
    return (
        value is not None
        and value.const_value is not None
        and value.producer() is None
        and not value.is_graph_input()
    )


def is_float_weight(value: ir.Value | None) -> bool:
    """Whether the value is a constant float32 (or float16) tensor of rank 2 or more."""
    if not is_constant(value):
        return False
    tensor = value.const_value  # type: ignore[union-attr]
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) >= 2


def is_quantized(model: ir.Model) -> bool:
    """Whether a node computes in, or converts from, integers of a quantizer."""
    return any(node.op_type in INTEGER_OPS for graph in graphs_of(model) for node in graph)


def array(weight: ir.Value) -> NDArray[Any]:
    """The array behind a value that is constant. Not a copy: do not write to it."""
    found = constant(weight)
    assert found is not None, f"{weight.name} is not constant"
    return found


def value(of: ir.Value | None) -> ir.Value:
    """An input that the operator cannot do without."""
    assert of is not None
    return of


def name_of(of: ir.Value | None) -> str:
    return str(value(of).name)


def shape_of(weight: ir.Value) -> tuple[int, ...]:
    """The shape of a constant."""
    assert weight.const_value is not None
    return tuple(int(n) for n in weight.const_value.shape.numpy())


def home(node: ir.Node) -> ir.Graph:
    """The graph that the node is in."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Readers of `old`, and the graph output it may be, get `new`, under the old name."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=old.is_graph_output())
    new.type, new.shape = old.type, old.shape
    old.name = f"{name}_replaced"
    new.name = name


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the value, each once, in the order of first use."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def set_input(node: ir.Node, position: int, value: ir.Value) -> None:
    """The node reads `value` there, also where it had no such input."""
    if len(node.inputs) <= position:
        node.resize_inputs(position + 1)
    node.replace_input_with(position, value)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default where it is absent."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer of the graph. The name must be free."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def drop_unused(model: ir.Model) -> None:
    """Nodes and initializers that nothing reads go, those of branches too."""
    passes.RemoveUnusedNodesPass()(model)
    for g in model.graph.subgraphs():
        for name in [
            n for n, v in g.initializers.items() if not v.uses() and not v.is_graph_output()
        ]:
            del g.initializers[name]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
