"""How a table is written whose rows a Gather picks, and which product shares its integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import onnx_ir as ir

from quant_core.model import graph
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.operators import (
    KERNEL_BLOCKS,
    RULES,
    DynamicPattern,
    weight_layout,
    weight_positions,
)
from quant_core.plan.tied import has_rows_of, is_lookup
from quant_core.plan.types import Compute, NodePlan, Storage
from quant_core.plan.weight_formats import is_folded
from quant_core.rewrite import emit_tables
from quant_core.rewrite.draft import Draft
from quant_core.rewrite.rounding import ROW_SCALES
from quant_core.rewrite.weight_cache import Rounded

SMALL_TABLE = 1 << 18  # elements: in float32 it takes no more memory than what runs the model


@dataclass(frozen=True, slots=True)
class _Tied:
    """A product that has the integers of a table.

    of_product, rounded  they as they lie in its weight, and in the table
    """

    product: NodePlan
    weight: ir.Value
    of_product: Rounded
    rounded: Rounded


def write_table(draft: Draft, node: ir.Node, planned: NodePlan) -> ir.Node:
    """Rule 2 of `apply_plan` for a Gather, whose rows are scaled after they are picked.

    That is three kernels more at every inference, which show in a small model: a small table of its
    own is read as it is, and rule 5 unpacks it when onnxruntime loads the model.
    """
    table = graph.value(node.inputs[0])
    tied = _tied(draft, table, planned)
    rounded = draft.rounding.table(node, table, planned) if tied is None else tied.rounded
    draft.written.integers.setdefault(table, rounded)
    is_small = prod(graph.shape_of(table)) <= SMALL_TABLE
    if is_small and tied is None and is_folded(draft.plan.config, draft.target):
        return node
    if tied is not None:
        draft.written.integers.setdefault(tied.weight, tied.of_product)
    # An integer product needs the integers in its own graph, the main one, which the table shares.
    is_in_main = tied is not None and tied.product.compute is not Compute.FLOAT
    home = draft.writer.first(draft.model.graph if is_in_main else graph.home(table))
    write = draft.writer.before(node)
    if tied is None:
        as_pairs = all(is_lookup(reader) for reader in graph.consumers(table))
    else:
        as_pairs = tied.product.compute is Compute.BLOCKS
    name = graph.name_of(table)
    rows = emit_tables.write_rows(write, home, name, rounded, node, as_pairs=as_pairs)
    graph.replace_value(node.outputs[0], rows)
    return node


def _tied(draft: Draft, table: ir.Value, planned: NodePlan) -> _Tied | None:
    """The MatMul or Gemm whose weight is this table, and its integers.

    1. Rows of the table are its output channels: of the same weight, or of a copy of it.
    2. Columns are, of the same weight. Blocks of 4 bits do not fit then.
    3. One that computes in integers takes no others; what computes in float does.
    """
    shape = graph.shape_of(table)
    for other in sorted(draft.plan.nodes, key=lambda n: not n.compute.is_integer):  # 3
        if other.storage is not planned.storage or not _serves_rows(draft, other):
            continue
        node = draft.nodes[other.node]
        weight = graph.value(node.inputs[weight_positions(node)[0]])
        layout = weight_layout(node, weight)
        if weight is table and not layout.is_straight and other.storage is Storage.INT8:  # 2
            found = draft.rounding.integers(node, weight, other)
            return _Tied(other, weight, found, found)
        if has_rows_of(node, weight, table):  # 1
            found = draft.rounding.integers(node, weight, other)
            of_rows = replace(found, layout=ROW_SCALES, shape=shape)
            return _Tied(other, weight, found, of_rows)
    return None


def _serves_rows(draft: Draft, other: NodePlan) -> bool:
    """Whether a product's integers could serve as the rows of a table too."""
    if RULES[other.op_type].dynamic_pattern is not DynamicPattern.MATMUL:
        return False
    if other.storage is Storage.INT4:
        return other.granularity in KERNEL_BLOCKS
    # one scale serves a product, not the rows of a table
    return not draft.plan.config.per_channel or other.granularity != PerTensor()
