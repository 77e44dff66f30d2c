"""Constants that are no node's weight: how they are stored, and why large ones stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from quant_core.config import QuantConfig
from quant_core.model import files, graph
from quant_core.model.compact import made_of_constants
from quant_core.model.to_float32 import stores_float16
from quant_core.numerics.float16 import FLOAT16, is_float16, why_not_float16
from quant_core.plan.operators import has_weights, rule_of, weight_positions
from quant_core.plan.types import NodePlan

LARGE_SHARE = 0.01  # of all constants: one that stays float has its reason in the plan
# Of a constant in float16: with fewer, the node that casts them back takes about as many bytes as
# float16 saves.
MIN_ELEMENTS = 256
DIRECTIONS = 2  # of a recurrent node


def other_constants(
    model: ir.Model, plans: Iterable[NodePlan], config: QuantConfig
) -> dict[str, str]:
    """Constant that is no node's weight -> `float16`, or why it stays float32.

    Large ones (positions that are added, grids of a detector) are stored as float16 where it holds
    them, which onnxruntime turns back when it loads the model; smaller ones only where the config
    asks for it, or where nothing is lost. Weights that nodes make of fewer bytes stay as they are.
    """
    planned = {name for n in plans for name in n.weights}
    least_bytes = LARGE_SHARE * files.constant_bytes(model)
    was_float16, is_requested = stores_float16(model), config.float_storage == FLOAT16
    found = {}
    for value in graph.initializers_of(model):
        name = str(value.name)
        if name in planned:
            continue
        is_large = _is_large(value, least_bytes)
        if is_large:
            readers = sorted({node.op_type for node in graph.consumers(value)})
            operators = " and ".join(readers) or "nothing"
            found[name] = f"float32: an operand of {operators}, not a weight"
        if not _can_save_bytes(value):
            continue
        if is_requested or is_large:
            obstacle = _why_not_float16(value)
            found[name] = f"float32: {obstacle}" if obstacle else FLOAT16
        elif was_float16 and is_float16(graph.array(value)):
            found[name] = FLOAT16
    made = dict.fromkeys(
        made_weights(model), "float32: nodes make it of fewer bytes than its integers have"
    )
    return found | made


def made_weights(model: ir.Model) -> list[str]:
    """The weights that nodes make of constants, which take fewer bytes (model/compact.py)."""
    if graph.is_quantized(model):
        return []
    nodes = [n for n in graph.nodes_of(model) if rule_of(n)]
    operands = [v for n in nodes for i in weight_positions(n) for v in n.inputs[i : i + 1]]
    made = made_of_constants(model)
    carried: set[ir.Value] = set()  # of a weight that has a node of its own
    for value, node in made.items():
        if node.op_type == "Identity" or not carried.isdisjoint(v for v in node.inputs if v):
            carried.add(value)
    return list(dict.fromkeys(str(v.name) for v in operands if v in made and v not in carried))


def _can_save_bytes(value: ir.Value) -> bool:
    """Whether it is a float32 constant that takes fewer bytes in float16 and a Cast; one that is an
    output too would lie in the file twice.
    """
    array = None if value.is_graph_output() else graph.constant(value)
    return array is not None and array.dtype == np.float32 and array.size >= MIN_ELEMENTS


def _why_not_float16(value: ir.Value) -> str:
    """Why float16 cannot hold the constant, "" if it can.

    A number that becomes zero in float16 is harmless in a sum, but not in every operator (a
    divisor, say): where another operator reads the constant, no number may.
    """
    array = graph.array(value)
    obstacle = why_not_float16(array)
    if not obstacle and np.any((array != 0) & (array.astype(np.float16) == 0)):
        added = all(n.op_type in ("Add", "Sub") for n in graph.consumers(value))
        obstacle = "" if added else "numbers too small for float16"
    return obstacle


def _is_large(value: ir.Value, least_bytes: float) -> bool:
    """Whether it is a float constant of so many bytes that it has to say why it stays float."""
    if not graph.is_float_weight(value) or _is_bias(value):
        return False
    assert value.const_value is not None
    return value.const_value.nbytes >= least_bytes


def _is_bias(value: ir.Value) -> bool:
    """Whether nodes read the constant only beside their weights, and it is one row for each
    direction: biases, peepholes and initial states of recurrent nodes have several axes too.
    """
    *rows, _ = graph.shape_of(value)
    return math.prod(rows) <= DIRECTIONS and all(
        has_weights(use.node) and use.idx > max(weight_positions(use.node)) for use in value.uses()
    )
