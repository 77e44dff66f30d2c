"""Affine operators in a row: found in a graph, and written with as few as can do the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import Affine, Numbers, affine_of
from quant_core.optimize.edit import bypass, constant, put_before, remove
from quant_core.optimize.facts import Facts


@dataclass(frozen=True, slots=True)
class Chain:
    """Affine operators in a row, each read by the next alone, and what they do together."""

    nodes: tuple[ir.Node, ...]
    source: ir.Value
    affine: Affine

    @property
    def inside(self) -> ir.Graph:
        return graph.home(self.nodes[0])

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(node.name) for node in self.nodes)


def chains(model: ir.Model, facts: Facts) -> Iterator[Chain]:
    """Every chain of the model, as long as it can be; the model may be edited meanwhile."""
    seen: set[ir.Node] = set()
    for node in graph.nodes_of(model):
        found = _chain_from(node, facts) if node not in seen else None
        if found is not None:
            seen.update(found.nodes)
            yield found


def write_chain(
    chain: Chain, affine: Affine, facts: Facts, *, takes_name: bool = False
) -> list[str]:
    """The chain's nodes go; as few as can do the affine come, under names of theirs, the result.

    takes_name  whether the source has the values of the chain's output now
    """
    inside, end, kept = chain.inside, chain.nodes[-1], []
    last = chain.source
    for op_type, arrays, attributes in operators_for(chain, affine, facts):
        free = [n for n in chain.nodes if n.name not in kept]
        name = str(next((n for n in free if n.op_type == op_type), free[-1]).name)
        inputs = [last, *(constant(inside, name, array) for array in arrays)]
        last = put_before(end, ir.Node("", op_type, inputs, attributes, name=name), name)
        last.shape = chain.output.shape
        kept.append(name)
    if last is chain.source and not takes_name:
        bypass(chain.output, last)
    else:
        graph.replace_value(chain.output, last)
    remove(chain.nodes)
    return kept


def operators_for(
    chain: Chain, affine: Affine, facts: Facts
) -> list[tuple[str, list[Numbers], list[ir.Attr]]]:
    """The fewest operators that do the affine: name, constants and attributes of each.

    A BatchNormalization is one of them where the chain has one: onnxruntime knows it in its blocked
    layout.
    """
    had_norm = any(n.op_type == "BatchNormalization" for n in chain.nodes)
    channels = facts.size(chain.output, 1)
    if had_norm and affine.axis in (None, 1) and affine.scales and affine.shifts and channels:
        scale, shift = affine.widened(channels)
        numbers = [scale, shift, np.zeros(channels), np.ones(channels)]
        return [("BatchNormalization", numbers, [ir.AttrFloat32("epsilon", 0.0)])]
    rank = facts.rank(chain.output)
    parts = (("Mul", affine.scale, affine.scales), ("Add", affine.shift, affine.shifts))
    return [
        (op_type, [_broadcastable(numbers, affine.axis, rank)], [])
        for op_type, numbers, is_needed in parts
        if is_needed
    ]


def _broadcastable(numbers: Numbers, axis: int | None, rank: int | None) -> Numbers:
    """Shaped so that the numbers meet their axis of a tensor of that rank."""
    if axis is None:
        return numbers.reshape(())
    assert rank is not None
    return numbers.reshape(-1, *[1] * (rank - axis - 1))


def _chain_from(first: ir.Node, facts: Facts) -> Chain | None:
    read = affine_of(first, facts)
    if read is None:
        return None
    source, affine = read
    nodes = [first]
    while (reader := graph.only_reader(nodes[-1].outputs[0])) is not None:
        read = affine_of(reader, facts)
        both = None if read is None else affine.then(read[1])
        if both is None:
            break
        nodes.append(reader)
        affine = both
    return Chain(tuple(nodes), source, affine)
