"""Products of the rows that a loop reads one by one are made of all rows at once, before it."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.edit import constant, free_name, put_in_place
from quant_core.optimize.facts import Facts


def hoist_products(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """What cells of recurrent nets that exporters write as a Loop multiply their input with.

        Loop { MatMul(Gather(xs, i), w) }    =>    MatMul(xs, w) -> Loop { Gather(product, i) }

    1. xs comes from outside, w is a constant matrix. A Gemm is a product as well, with its bias.
    2. Gather takes rows, that is, not along the last axis, which the product sums over.
    3. One product of many rows reads the weight once. It is more work if the loop reads few rows,
       and may be less parallel: always timed.
    """
    applied = []
    for inside in list(graph.graphs_of(model)):
        for loop in [n for n in inside if n.op_type == "Loop" and not n.domain]:
            body = loop.attributes["body"].as_graph()
            for node in [n for n in body if chosen(str(n.name)) and _is_product(n)]:
                gather = graph.value(node.inputs[0]).producer()
                if gather is not None and _takes_rows(gather, body, facts):
                    _hoist(node, gather, loop)
                    applied.append(Applied("hoist_products", str(node.name), ()))
    return applied


def _is_product(node: ir.Node) -> bool:
    """Whether the node multiplies by a constant matrix (1)."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return False
    weight, bias = node.inputs[1], graph.input_at(node, 2)
    factors = {graph.attribute(node, name, 1.0) for name in ("alpha", "beta")}
    is_plain = factors == {1.0} and not graph.attribute(node, "transA", 0)
    is_matrix = graph.is_float_weight(weight) and len(graph.shape_of(graph.value(weight))) == 2
    is_row = bias is None or (graph.is_constant(bias) and len(graph.shape_of(bias)) == 1)
    return is_plain and is_matrix and is_row


def _takes_rows(gather: ir.Node, body: ir.Graph, facts: Facts) -> bool:
    """Whether a node of the body takes rows of a tensor from outside (1, 2)."""
    if gather.op_type != "Gather" or gather.domain or gather.graph is not body:
        return False
    source = graph.value(gather.inputs[0])
    maker, rank = source.producer(), facts.rank(source)
    home = source.graph if maker is None else maker.graph
    if home is body or graph.is_constant(source) or rank is None:
        return False
    return bool(graph.attribute(gather, "axis", 0) % rank < rank - 1)


def _hoist(node: ir.Node, gather: ir.Node, loop: ir.Node) -> None:
    """Edit in place: the product stands before the loop under its name, which takes its rows."""
    outside, name = graph.home(loop), str(node.name)
    weight, bias = graph.value(node.inputs[1]), graph.input_at(node, 2)
    if graph.attribute(node, "transB", 0):
        weight = constant(outside, str(weight.name), graph.array(weight).T)
    products = [ir.Node("", "MatMul", [gather.inputs[0], _outside(weight, loop)], name=name)]
    if bias is not None:
        terms = [products[0].outputs[0], _outside(bias, loop)]
        products.append(ir.Node("", "Add", terms, name=f"{name}_bias"))
    for product in products:
        product.outputs[0].name = free_name(outside, str(product.name))
        product.outputs[0].type = node.outputs[0].type
        outside.insert_before(loop, product)
    rows = [products[-1].outputs[0], gather.inputs[1]]
    taken = ir.Node("", "Gather", rows, gather.attributes.values(), name=f"{name}_row")
    put_in_place([node], taken)


def _outside(value: ir.Value, loop: ir.Node) -> ir.Value:
    """The constant, or a copy of one that the loop's body holds."""
    if value.graph is not loop.attributes["body"].as_graph():
        return value
    return constant(graph.home(loop), str(value.name), graph.array(value))
