"""A model for onnxruntime whose weights need not be copied: it reads them where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model.proto import to_proto

# onnxruntime reads smaller tensors, and those that hold shapes, while it loads a model.
LENT_TYPES = (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8)
LENT_BYTES = 4096


def lend_weights(model: ir.Model) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """The model as a message that only names its large weights, and these by name.

    Initializers of graphs inside nodes, and tensors that lie in files, stay where they are.
    """
    named, weights = model.clone(), {}
    for name, value in named.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.dtype in LENT_TYPES and tensor.nbytes >= LENT_BYTES:
            weights[name] = array = np.ascontiguousarray(tensor.numpy())
            value.const_value = ir.ExternalTensor(
                "lent", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
            )
    return to_proto(named).SerializeToString(), weights
