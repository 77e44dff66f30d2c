"""What is computed twice is computed once."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from quant_core.model import graph
from quant_core.model.fixed_noise import DRAW_NUMBERS
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import bypass, remove
from quant_core.optimize.facts import Facts

RANDOM = frozenset({*DRAW_NUMBERS, "Multinomial", "Bernoulli", "Dropout"})
NUMBERS_AND_TEXT = frozenset(
    {ir.AttributeType.FLOAT, ir.AttributeType.FLOATS, ir.AttributeType.INT, ir.AttributeType.INTS,
     ir.AttributeType.STRING, ir.AttributeType.STRINGS}
)  # fmt: skip
COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal"})


def common_subexpressions(model: ir.Model, facts: Facts) -> list[Applied]:
    """Readers of a node read an earlier one that is the same.

        Sigmoid(x) -> a, Sigmoid(x) -> b   =>   Sigmoid(x) -> a, which readers of b read

    1. Both have the same operator, attributes and inputs, and write the same number of outputs.
       The order of the inputs of a sum or a product does not matter.
    2. Operators that draw random numbers, or hold graphs, tensors or types, stay as they are.
    3. An output of a graph keeps its name; of two equal ones each has its own node.
    """
    applied = []
    for inside in graph.graphs_of(model):
        first: dict[Hashable, ir.Node] = {}
        for node in list(inside):
            key = _key(node)
            other = None if key is None else first.setdefault(key, node)
            if other is None or other is node:
                continue
            pairs = list(zip(node.outputs, other.outputs, strict=True))
            if any(new.is_graph_output() and old.is_graph_output() for old, new in pairs):  # 3.
                continue
            for old, new in pairs:
                bypass(old, new)
            remove([node])
            applied.append(Applied("common_subexpressions", str(other.name), (str(node.name),)))
    return applied


def _key(node: ir.Node) -> Hashable | None:
    """What equal nodes have in common, None if the node has no equal (1., 2.)."""
    attributes = []
    for name, found in sorted(node.attributes.items()):
        value = found.value
        if found.type not in NUMBERS_AND_TEXT:
            return None
        attributes.append((name, tuple(value) if isinstance(value, (list, tuple)) else value))
    if node.domain or node.op_type in RANDOM:
        return None
    inputs = [None if v is None else id(v) for v in node.inputs]
    if node.op_type in COMMUTATIVE:
        inputs.sort(key=str)
    written = tuple(bool(v.name) for v in node.outputs)
    return node.op_type, tuple(attributes), tuple(inputs), written
