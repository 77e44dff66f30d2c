"""A Conv whose result is only split becomes one Conv for each part."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize import convolution
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.edit import put_before, remove
from quant_core.optimize.facts import Facts


def split_convs(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """Each part of a Split along the channels gets a Conv of its own, and its own activation.

        Conv(x, w) -> Split -> y1, y2   =>   Conv(x, w[:n]) -> y1,  Conv(x, w[n:]) -> y2

    1. Between Conv and Split may stand an activation: one operator, or the Sigmoid and Mul of a
       SiLU.
    2. The sizes of the parts are known, and the Conv has one group.
    """
    applied = []
    for split in graph.nodes_of(model, "Split"):
        found = _before(split)
        if found is not None and graph.attribute(split, "axis", 0) in (1, -3):
            conv, activation = found
            sizes = [facts.size(v, 1) for v in split.outputs]
            known = [n for n in sizes if n]
            read = convolution.read(conv)
            if not chosen(str(conv.name)):
                continue
            if read is None or read.groups != 1 or len(known) != len(sizes):  # 2.
                continue
            if facts.rank(conv.outputs[0]) != 4:
                continue
            _write(graph.home(split), split, conv, activation, read, known)
            gone = (str(n.name) for n in (*activation, split))
            applied.append(Applied("split_convs", str(conv.name), tuple(gone)))
    return applied


def _before(split: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """The Conv that makes what is split, and the activation between: none, one node or two."""
    value = graph.value(split.inputs[0])
    last = value.producer()
    if last is None or graph.only_reader(value) is not split:
        return None
    if last.op_type == "Conv":
        return last, []
    if last.op_type in convolution.ACTIVATIONS and not last.domain:
        inner = graph.value(last.inputs[0])
        conv = inner.producer()
        if conv is not None and conv.op_type == "Conv" and graph.only_reader(inner) is last:
            return conv, [last]
    if last.op_type == "Mul":
        return _silu(last)
    return None


def _silu(product: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """x * sigmoid(x), or x * hardsigmoid(x), of a Conv's result x that nothing else reads."""
    for x, y in (product.inputs, tuple(reversed(product.inputs))):
        conv = None if x is None else x.producer()
        gate = None if y is None else y.producer()
        if conv is None or gate is None or x is None or y is None or conv.op_type != "Conv":
            continue
        if gate.op_type in ("Sigmoid", "HardSigmoid") and gate.inputs[0] is x:
            alone = graph.only_reader(y) is product and set(graph.consumers(x)) == {gate, product}
            if alone and not x.is_graph_output():
                return conv, [gate, product]
    return None


def _write(
    inside: ir.Graph, split: ir.Node, conv: ir.Node, activation: list[ir.Node],
    read: convolution.Convolution, sizes: list[int],
) -> None:  # fmt: skip
    x, starts = graph.value(conv.inputs[0]), [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    for i, (start, end) in enumerate(pairwise(starts)):
        part = replace(read, weight=read.weight[start:end], bias=read.bias[start:end])
        name = str(conv.name) if i == 0 else f"{conv.name}_part{i}"
        new = convolution.make(inside, name, x, part)
        inside.insert_before(split, new)
        made = {conv.outputs[0]: new.outputs[0]}
        last = new.outputs[0]
        for node in activation:
            inputs = [made.get(v, v) if v is not None else None for v in node.inputs]
            name = str(node.name) if i == 0 else f"{node.name}_part{i}"
            copy = ir.Node("", node.op_type, inputs, list(node.attributes.values()), name=name)
            last = made[node.outputs[0]] = put_before(split, copy, name)
        graph.replace_value(split.outputs[i], last)
    remove([conv, *activation, split])
