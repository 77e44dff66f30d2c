"""Equal constants of a model become one."""

from __future__ import annotations

import hashlib
from typing import Any

import onnx_ir as ir

from quant_core.model import files, graph

SHARED_BYTES = 1024  # of a weight that several graphs share


def deduplicate(model: ir.Model) -> None:
    """Edit in place: equal constants become one, which all graphs read.

    1. In one graph, whatever they hold.
    2. In several graphs, if they are weights: what they become moves to the main graph.
       onnxruntime wants integers, scales and sizes in the graph that reads them.
    3. A constant that is an output of its graph stays, and the others become it.
    """
    found: dict[tuple[Any, ...], ir.Value] = {}
    for inside in graph.graphs_of(model):
        outputs_first = sorted(inside.initializers.values(), key=lambda v: not v.is_graph_output())
        for value in outputs_first:
            if not graph.is_constant(value) or value.dtype == ir.DataType.STRING:
                continue
            key = _content(value)
            is_shared = graph.is_float_weight(value) and key[1] >= SHARED_BYTES  # 2
            first = found.setdefault(key if is_shared else (*key, inside), value)
            if first is value or value.is_graph_output():  # 3
                continue
            if first.graph is not inside and first.graph is not model.graph:
                _move_to_main(model, first)
            value.replace_all_uses_with(first)
            del inside.initializers[str(value.name)]


def _content(value: ir.Value) -> tuple[Any, ...]:
    """What equal constants have in common: type, bytes, shape and digest."""
    tensor = value.const_value
    assert tensor is not None
    digest = hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()
    files.release(tensor)
    return tensor.dtype, tensor.nbytes, graph.shape_of(value), digest


def _move_to_main(model: ir.Model, value: ir.Value) -> None:
    """Edit in place: a constant of an inner graph becomes one of the main graph."""
    assert isinstance(value.graph, ir.Graph)
    del value.graph.initializers[str(value.name)]
    model.graph.register_initializer(value)
