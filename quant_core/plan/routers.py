"""Which products only rank: by their results TopK, ArgMax or ArgMin choose what else is computed.

A change of 1 % hardly changes a sum, but where two results are close it changes which comes first:
one row, or one expert, takes the place of another.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from quant_core.model import graph
from quant_core.plan.tied import is_product

CHOOSES = frozenset({"ArgMax", "ArgMin", "TopK"})
# What moves the values of the first operand, keeps their order, or the largest of some.
KEEPS_ORDER = frozenset(
    {
        "Cast",
        "Flatten",
        "Identity",
        "LogSoftmax",
        "ReduceMax",
        "Reshape",
        "Sigmoid",
        "Softmax",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def routers(nodes: Iterable[ir.Node]) -> set[str]:
    """The names of the products by whose results one of the nodes chooses."""
    products = (_ranking(node) for node in nodes if node.op_type in CHOOSES)
    return {str(product.name) for product in products if product is not None}


def _ranking(chooser: ir.Node) -> ir.Node | None:
    """The product whose result the chooser reads, with a bias or in another shape."""
    node = graph.value(chooser.inputs[0]).producer()
    while node is not None and not is_product(node):
        operands = graph.computed_inputs(node)
        if node.op_type not in KEEPS_ORDER and not (node.op_type == "Add" and len(operands) == 1):
            return None
        node = operands[0].producer()
    return node
