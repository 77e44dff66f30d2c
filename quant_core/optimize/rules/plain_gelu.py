"""Gelu in the order of operators that onnxruntime computes as one."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import Affine, affine_of
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import constant, put_before, remove
from quant_core.optimize.facts import Facts

TOLERANCE = 1e-5  # of the constants: exporters write 0.70710677, or 0.7071068


def plain_gelu(model: ir.Model, facts: Facts) -> list[Applied]:
    """Gelu of x, whichever way its three factors are multiplied.

        x * ((1 + erf(x * 0.7071)) * 0.5)   =>   (x * (1 + erf(x / 1.4142))) * 0.5

    1. The argument of Erf is x by the square root of 2, as a Mul or a Div.
    2. Of 1 + erf, x and 0.5 two are multiplied first, and then the third; nothing else reads what
       is between.
    3. What onnxruntime merges as it is stays: a Div in the argument, and no product of 1 + erf
       and 0.5 first.

    Source: onnxruntime 1.32, core/optimizer/gelu_fusion.cc; Hendrycks and Gimpel 2016, "Gaussian
    Error Linear Units", arXiv 1606.08415, section 2.
    """
    applied = []
    for erf in graph.nodes_of(model, "Erf"):
        change = _rewrite(graph.home(erf), erf, facts)
        applied += [change] if change else []
    return applied


def _rewrite(inside: ir.Graph, erf: ir.Node, facts: Facts) -> Applied | None:
    argument = graph.value(erf.inputs[0]).producer()
    added = graph.only_reader(erf.outputs[0])
    if argument is None or added is None or graph.only_reader(argument.outputs[0]) is not erf:
        return None
    x = _source(argument, facts, math.sqrt(0.5), 0)  # 1.
    if x is None or _source(added, facts, 1, 1) is not erf.outputs[0]:
        return None
    product = graph.only_reader(added.outputs[0])
    found = None if product is None else _factors(product, added.outputs[0], x, facts)  # 2.
    if found is None:
        return None
    nodes, is_half_first = found
    if argument.op_type == "Div" and not is_half_first:  # 3.
        return None
    _write(inside, x, nodes[-1])
    gone = [argument, erf, added, *nodes]
    remove(sorted(gone, key=list(inside).index))
    return Applied("plain_gelu", str(nodes[-1].name), tuple(str(n.name) for n in gone[:-1]))


def _source(node: ir.Node, facts: Facts, scale: float, shift: float) -> ir.Value | None:
    """What the node reads, if it makes scale * x + shift of it."""
    read = affine_of(node, facts)
    if read is None or read[1].axis is not None:
        return None
    wanted = Affine(np.array([scale]), np.array([float(shift)]))
    is_near = np.allclose(read[1].scale, wanted.scale, TOLERANCE, 0) and np.allclose(
        read[1].shift, wanted.shift, TOLERANCE, 0
    )
    return read[0] if is_near else None


def _factors(
    product: ir.Node, gate: ir.Value, x: ir.Value, facts: Facts
) -> tuple[list[ir.Node], bool] | None:
    """The nodes that multiply the gate by x and by 0.5, the last last; and whether the gate meets
    0.5 first. None if they do something else.
    """
    if product.op_type in ("Mul", "Div") and _source(product, facts, 0.5, 0) is gate:
        last = graph.only_reader(product.outputs[0])
        if last is not None and _multiplies(last, product.outputs[0], x):
            return [product, last], True
        return None
    if _multiplies(product, gate, x):
        last = graph.only_reader(product.outputs[0])
        is_half = last is not None and _source(last, facts, 0.5, 0) is product.outputs[0]
        return ([product, last], False) if last is not None and is_half else None
    if product.op_type != "Mul" or product.domain:
        return None
    other = next((v for v in product.inputs if v is not gate), None)
    half = None if other is None else other.producer()
    if half is None or graph.only_reader(half.outputs[0]) is not product:
        return None
    return ([half, product], False) if _source(half, facts, 0.5, 0) is x else None


def _multiplies(node: ir.Node, a: ir.Value, b: ir.Value) -> bool:
    return node.op_type == "Mul" and not node.domain and set(node.inputs) == {a, b}


def _write(inside: ir.Graph, x: ir.Value, last: ir.Node) -> None:
    """The operators in the order that onnxruntime knows, ahead of the last of the old ones."""
    name = str(last.name)

    def put(op_type: str, inputs: list[ir.Value], part: str) -> ir.Value:
        node = ir.Node("", op_type, inputs, name=None if part else name)
        output = put_before(last, node, f"{name}_{part}" if part else name)
        output.shape = last.outputs[0].shape
        return output

    def number(n: float) -> ir.Value:
        return constant(inside, f"{name}_number", np.array(n, np.float64))

    root = put("Div", [x, number(math.sqrt(2))], "root")
    gate = put("Add", [put("Erf", [root], "erf"), number(1)], "gate")
    half = put("Mul", [put("Mul", [x, gate], "product"), number(0.5)], "")
    graph.replace_value(last.outputs[0], half)
