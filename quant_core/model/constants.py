"""Constants of a graph as its exporter left it: initializers, and what Constant nodes hold."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.errors import ModelError
from quant_core.model import graph


def is_given(value: ir.Value | None) -> bool:
    """Whether the value is a constant; its tensor is not read."""
    producer = value.producer() if value is not None else None
    return graph.is_constant(value) or (producer is not None and producer.op_type == "Constant")


def numbers_of(value: ir.Value | None) -> list[int] | None:
    """The whole numbers of a constant; None if it is computed."""
    tensor = tensor_of(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant; None if it is computed."""
    if value is None:
        return None
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:  # a sparse one
        return None


def floats_of(value: ir.Value | None, most: float = math.inf) -> NDArray[np.float64] | None:
    """The numbers of a constant of floats, in double; None of any other, of one without entries, or
    with more than `most`.
    """
    tensor = tensor_of(value)
    if tensor is None or not tensor.dtype.is_floating_point() or not 0 < tensor.size <= most:
        return None
    return np.asarray(tensor.numpy(), np.float64)


def size_of(value: ir.Value | None, axis: int) -> int | str | None:
    """The size of any value along an axis, a symbol if it is open, None if it is not known."""
    if value is None:
        return None
    tensor = tensor_of(value)
    shape = value.shape if tensor is None else tensor.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else size.value


def mean_of(value: ir.Value | None) -> float | None:
    """The mean of a small constant of floats; None of any other."""
    tensor = tensor_of(value)
    if tensor is None or tensor.size > 4:
        return None
    try:
        array = np.asarray(tensor.numpy())
    except Exception as error:
        raise ModelError(f"tensor {tensor.name} cannot be read: {error}") from error
    return float(array.mean()) if array.dtype.kind == "f" and array.size else None
