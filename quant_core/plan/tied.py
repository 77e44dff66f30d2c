"""Which products have the rows of a table as their output channels: both are stored once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.plan.operators import DynamicPattern, rule_of, weight_layout, weight_positions


def tied_products(nodes: Iterable[ir.Node]) -> set[str]:
    """The names of products with constant weights that are a table too, as it is or transposed."""
    nodes = list(nodes)
    tables = {graph.value(node.inputs[0]) for node in nodes if is_lookup(node)}
    return {str(node.name) for node in nodes if any(_is_tied(node, table) for table in tables)}


def is_lookup(node: ir.Node) -> bool:
    """Whether the node picks rows of a constant table."""
    rule = rule_of(node)
    if rule is None or not rule.is_table or graph.attribute(node, "axis", 0) != 0:
        return False
    return graph.is_float_weight(node.inputs[0])


def is_product(node: ir.Node) -> bool:
    """Whether the node multiplies by a matrix."""
    rule = rule_of(node)
    return rule is not None and rule.dynamic_pattern is DynamicPattern.MATMUL


def _is_tied(node: ir.Node, table: ir.Value) -> bool:
    if not is_product(node):
        return False
    weight = node.inputs[weight_positions(node)[0]]
    if not graph.is_float_weight(weight):
        return False
    return weight is table or has_rows_of(node, graph.value(weight), table)


def has_rows_of(node: ir.Node, weight: ir.Value, table: ir.Value) -> bool:
    """Whether the output channels of a product with this weight are the rows of the table."""
    layout = weight_layout(node, weight)
    if layout.transposed_shape(graph.shape_of(weight)) != graph.shape_of(table):
        return False
    rows, expected = layout.matrix(graph.array(weight)), graph.array(table)
    # one row tells most weights apart
    return np.array_equal(rows[:1], expected[:1]) and np.array_equal(rows, expected)
