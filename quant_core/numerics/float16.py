"""Which float constants float16 can hold, so that weights that stay float take half the bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph

MIN_ELEMENTS = (
    256  # with fewer, the node that casts them back takes about as many bytes as float16 saves
)
# float16 keeps 11 bits, about 70 dB, of numbers within its range; less tells that some are not.
MIN_SQNR_DB = 60.0
OVERFLOW = 65520.0  # the least number that rounds to infinity
FLOAT16 = "float16"


def why_not_float16(array: NDArray[Any]) -> str:
    """Why float16 cannot hold these numbers, "" if it can."""
    peak = float(np.abs(array).max(initial=0.0))
    if not peak < OVERFLOW:
        return f"values up to {peak:.2g} overflow float16"
    noise = float(np.square(array - array.astype(np.float16), dtype=np.float64).sum())
    signal = float(np.square(array, dtype=np.float64).sum())
    if noise > signal * 10 ** (-MIN_SQNR_DB / 10):
        return f"values of at most {peak:.2g} are too small for float16"
    return ""


def why_constant_not_float16(value: ir.Value) -> str:
    """The same of a constant that is no node's weight.

    A number that becomes zero in float16 is harmless in a sum, but not in every operator (a
    divisor, say): where another operator reads the constant, no number may.
    """
    array = graph.array(value)
    obstacle = why_not_float16(array)
    if not obstacle and np.any((array != 0) & (array.astype(np.float16) == 0)):
        added = all(n.op_type in ("Add", "Sub") for n in graph.consumers(value))
        obstacle = "" if added else "numbers too small for float16"
    return obstacle


def is_float16(array: NDArray[Any]) -> bool:
    """Whether float16 holds each of these numbers exactly."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array, array.astype(np.float16), equal_nan=True))


def can_save_bytes(value: ir.Value) -> bool:
    """Whether it is a float32 constant that takes fewer bytes in float16 and a Cast; one that is an
    output too would lie in the file twice.
    """
    array = None if value.is_graph_output() else graph.constant(value)
    return array is not None and array.dtype == np.float32 and array.size >= MIN_ELEMENTS
