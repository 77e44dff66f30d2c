"""A model for onnxruntime whose weights need not be copied: it reads them where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model.proto import to_proto

# onnxruntime reads smaller tensors, and those that hold shapes, while it loads a model.
EXTERNAL_TYPES = (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8)
EXTERNAL_BYTES = 4096


def external_initializers(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """The model as a message that only names its large weights, and these by name.

    Initializers of graphs inside nodes, and tensors that lie in files, stay where they are.
    """
    initializers, weights = [], {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and _is_external(tensor):
            weights[name] = array = np.ascontiguousarray(tensor.numpy())
            value = _external(name, value, array)
        initializers.append(value)
    return to_proto(_with_initializers(model, initializers)), weights


def size_with_weights(model: ir.Model) -> int:
    """Bytes of the whole message; its large weights are counted, not copied."""
    proto, weights = external_initializers(model)
    size, inside = proto.ByteSize(), proto.graph.ByteSize()
    grown = inside
    for tensor in proto.graph.initializer:
        if tensor.name not in weights:
            continue
        grown -= _delimited(tensor.ByteSize())
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        numbers = 1 + _delimited(weights[tensor.name].nbytes)  # the field raw_data
        grown += _delimited(tensor.ByteSize() + numbers)
    return int(size - _delimited(inside) + _delimited(grown))


def _delimited(size_bytes: int) -> int:
    """Bytes of a field of that size, with those that say how long it is: 7 bits of it in each."""
    return size_bytes + max(1, -(-size_bytes.bit_length() // 7))


def _is_external(tensor: ir.TensorProtocol) -> bool:
    is_large = tensor.dtype in EXTERNAL_TYPES and tensor.nbytes >= EXTERNAL_BYTES
    return is_large and not isinstance(tensor, ir.ExternalTensor)


def _external(name: str, value: ir.Value, array: NDArray[Any]) -> ir.Value:
    """The initializer, marked as one whose numbers lie elsewhere."""
    dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    elsewhere = ir.ExternalTensor("lent", 0, array.nbytes, dtype, shape=shape, name=name)
    return ir.Value(name=name, type=value.type, shape=value.shape, const_value=elsewhere)


def _with_initializers(model: ir.Model, initializers: list[ir.Value]) -> ir.Model:
    """The model, to be written, with these initializers in place of its own; it shares all else."""
    graph = model.graph
    view = ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=tuple(graph),
        initializers=initializers,
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    return ir.Model(
        view,  # type: ignore[arg-type]  # what is written may be a view
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata_props=model.metadata_props,
        device_configurations=model.device_configurations,
        functions=tuple(model.functions.values()),
    )
