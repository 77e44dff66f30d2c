"""What a model is: interface, opset, operators, and what of it is stored how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.model import files, graph

# As weights are stored in.
FEW_BITS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output. A size is a number, a symbol, or None if it is not known."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model at a glance.

    size_bytes    of the file and its external data
    parameters    elements of all initializers and Constant nodes
    stored_bytes  data type -> bytes of these elements, the type of most bytes first
    operators     how many nodes there are of each type, the most frequent first
    quantized     whether a quantizer made integers of weights or activations
    weights_only  whether these are weights alone, which become float when the model loads
    """

    name: str
    num_nodes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    ir_version: int
    size_bytes: int
    parameters: int
    stored_bytes: dict[str, int]
    operators: dict[str, int]
    quantized: bool
    weights_only: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def model_info(path: str | Path) -> ModelInfo:
    """What the model in that file is. Raises: ModelError if it cannot be read."""
    path = Path(path)
    model = files.load(path)
    nodes = list(graph.nodes_of(model))
    parameters = list(_parameters(model))
    computes_in_integers = any(_computes_in_integers(node) for node in nodes)
    unpacks_weights = any(_unpacks_weight(node) for node in nodes)
    fed = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    return ModelInfo(
        name=model.graph.name or path.stem,
        num_nodes=len(nodes),
        inputs=tuple(_tensor(value) for value in fed),
        outputs=tuple(_tensor(value) for value in model.graph.outputs),
        opset=graph.opset(model, str(path)),
        ir_version=model.ir_version,
        size_bytes=files.size_on_disk(path, model),
        parameters=sum(int(tensor.size) for tensor in parameters),
        stored_bytes=_stored_bytes(parameters),
        operators=_operators(nodes),
        quantized=computes_in_integers or unpacks_weights,
        weights_only=unpacks_weights and not computes_in_integers,
    )


def _computes_in_integers(node: ir.Node) -> bool:
    return node.op_type in graph.INTEGER_OPS and node.op_type != "DequantizeLinear"


def _unpacks_weight(node: ir.Node) -> bool:
    """Whether the node makes float values of a constant in few bits, as onnxruntime does once."""
    if node.op_type == "DequantizeLinear":
        return True
    if node.op_type != "Cast" or node.attributes["to"].as_int() not in FLOATS:
        return False
    value = node.inputs[0]
    return value is not None and graph.is_constant(value) and value.dtype in FEW_BITS


def _stored_bytes(tensors: Sequence[ir.TensorProtocol]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[_type_name(tensor.dtype)] += tensor.nbytes
    return dict(counts.most_common())


def _parameters(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The tensors of all initializers and Constant nodes."""
    yield from files.tensors_of(model)
    for node in graph.nodes_of(model, "Constant"):
        value = node.attributes.get("value")
        if value is not None and not value.is_ref():
            yield value.as_tensor()


def _operators(nodes: list[ir.Node]) -> dict[str, int]:
    """Operator type, with its domain if that is not ONNX's -> number of nodes."""
    counts = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _tensor(value: ir.Value) -> TensorInfo:
    dtype = "unknown" if value.dtype is None else _type_name(value.dtype)
    sizes = () if value.shape is None else value.shape
    shape = tuple(size if isinstance(size, int) else size.value for size in sizes)
    return TensorInfo(str(value.name), dtype, shape)


def _type_name(dtype: ir.DataType) -> str:
    return str(dtype.name).lower()
