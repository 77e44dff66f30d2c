"""Which float constants float16 can hold, so that what stays float takes half the room."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph

HALF_ELEMENTS = 256  # with fewer, a Cast takes about as much room as it saves
HALF_DB = 60.0  # float16 keeps 11 bits, about 70 dB, of all that is neither too large nor too small for it
HALF = "float16"
OVERFLOW = 65520.0  # what rounds to infinity


def why_not_half(array: NDArray[Any]) -> str:
    """Why float16 cannot stand for these numbers, "" if it can."""
    peak = float(np.abs(array).max(initial=0.0))
    if not peak < OVERFLOW:
        return f"values up to {peak:.2g} overflow float16"
    noise, power = (
        float(np.square(x, dtype=np.float64).sum())
        for x in (array - array.astype(np.float16), array)
    )
    if noise > power * 10 ** (-HALF_DB / 10):
        return f"values of at most {peak:.2g} are too small for float16"
    return ""


def half_constants(model: ir.Model, weights: set[str]) -> dict[str, str]:
    """Float32 constants other than these weights -> float16, or why they stay as they are.

    Other operators than a sum may not forgive a number that has become zero (a divisor), so none may.
    """
    found = {}
    for g in graph.graphs_of(model):
        for name, value in g.initializers.items():
            array = graph.constant(value)
            if (
                name in weights
                or array is None
                or array.dtype != np.float32
                or array.size < HALF_ELEMENTS
            ):
                continue
            obstacle = why_not_half(array)
            if not obstacle and np.any((array != 0) & (array.astype(np.float16) == 0)):
                added = all(n.op_type in ("Add", "Sub") for n in graph.consumers(value))
                obstacle = "" if added else "numbers too small for float16"
            found[name] = f"float32: {obstacle}" if obstacle else HALF
    return found
