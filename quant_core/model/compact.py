"""Constants that nodes make of fewer bytes: they stay made by nodes, and a file never grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.model.session import open_session, run
from quant_core.model.subgraph import extract

MIN_BYTES = 1024  # of a constant; what smaller ones add to a file is not worth a thought
INTEGER_SHARE = 1 / 4  # of a weight's bytes is left when it is stored in 8 bits


def keep_compact(folded: ir.Model, before: ir.Model, *, stays_float: bool = False) -> None:
    """Edit `folded` in place: nodes of `before` make a constant again if they take fewer bytes.

        ConstantOfShape -> Trilu -> Mul -> mask       instead of       mask, written out

    folded       the model after constants were folded: each has the name of the value that it
                 stands for
    stays_float  whether no weight is going to be stored in integers

    1. A constant that stays float, as all do that no operator multiplies by: what its nodes read,
       and nobody else does, has fewer bytes.
    2. A weight that is going to be integers: all that its nodes read has fewer bytes than these.
       Otherwise it stays a constant, as only constants compute in integers. What its nodes read
       counts nothing if another operator multiplies by it: that weight is in the file all the
       same, and a part of it would be stored twice. Only the transpose of a table stays a
       constant: products share the integers of that.
    3. Whatever else these nodes make is no constant either: the other parts of a Split, say.
    4. What was made again first may read what was made again later: nodes are put in order.
    5. What the nodes read and make is the same in both models: onnxruntime transposes constants to
       take Transposes away, and keeps their names.
    """
    makers = {str(value.name): node for value, node in made_of_constants(before).items()}
    if not makers:
        return
    inner = list(graph.graphs_of(folded))
    values = {name: value for inside in inner for name, value in inside.initializers.items()}
    first = {inside: inside[0] for inside in inner if len(inside)}
    unfold = _Unfold(folded, before, makers, values, first, stays_float)
    for inside in inner:
        for name, value in list(inside.initializers.items()):
            is_made_again = inside.initializers.get(name) is not value
            if is_made_again or name not in makers or value.const_value is None:
                continue
            if value.const_value.nbytes >= MIN_BYTES:
                unfold.constant(inside, value)
    folded.graph.sort()  # 4


def made_of_constants(model: ir.Model) -> dict[ir.Value, ir.Node]:
    """The values that nodes make of constants, directly or through others, and these nodes."""
    found: dict[ir.Value, ir.Node] = {}
    for node in graph.nodes_of(model):
        read = [v for v in node.inputs if v is not None]
        if not _has_graphs(node) and all(v in found or graph.is_constant(v) for v in read):
            found.update((v, node) for v in node.outputs if v.name)
    return found


def _has_graphs(node: ir.Node) -> bool:
    return any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())


@dataclass(frozen=True, slots=True)
class _Unfold:
    """The folded model, and the nodes that made its constants before.

    values  what of that the folded model has, by name: constants, and what is made again
    first   graph -> the node before which nodes are inserted; absent in a graph without nodes

    stays_float  as `keep_compact` takes it
    """

    folded: ir.Model
    before: ir.Model
    makers: Mapping[str, ir.Node]
    values: dict[str, ir.Value]
    first: Mapping[ir.Graph, ir.Node]
    stays_float: bool

    def constant(self, inside: ir.Graph, value: ir.Value) -> None:
        """Edit in place: the nodes that made the constant make it again, if that is smaller."""
        nodes, leaves = self._chain(str(value.name), self.values)
        if not self._is_smaller(value, nodes, leaves) or not self._are_as_before(nodes):  # 5
            return
        for leaf in leaves:
            if leaf.name not in self.values:
                self.values[str(leaf.name)] = self._copied(leaf)
        made = {str(v.name) for node in nodes for v in node.outputs if v.name}
        gone = [self.values.pop(name) for name in made if name in self.values]
        main = [node for node in nodes if node.graph is self.before.graph]
        inner = [node for node in nodes if node.graph is not self.before.graph]
        self._insert(self.folded.graph, main)
        self._insert(inside, inner)
        for constant in gone:  # 3
            assert isinstance(constant.graph, ir.Graph)
            del constant.graph.initializers[str(constant.name)]
            again = self.values[str(constant.name)]
            again.type, again.shape = constant.type, constant.shape
            constant.replace_all_uses_with(again, replace_graph_outputs=True)

    def _is_smaller(self, value: ir.Value, nodes: list[ir.Node], leaves: list[ir.Value]) -> bool:
        """Rules 1 and 2: whether these nodes, and the constants that they read, are smaller than
        the one that they make.
        """
        tensor = value.const_value
        assert tensor is not None
        is_multiplied = any(node.op_type in graph.WEIGHTED for node in graph.consumers(value))
        if is_multiplied and not self.stays_float:
            dense = tensor.nbytes * INTEGER_SHARE
            read = [v for v in leaves if not self._is_stored_for_others(v, nodes)]  # 2
        else:
            dense = tensor.nbytes
            read = [v for v in leaves if v.name not in self.values]  # 1
        compact = sum(v.const_value.nbytes for v in read if v.const_value is not None)
        return compact + sum(map(_size_in_file, nodes)) < dense

    def _is_stored_for_others(self, leaf: ir.Value, nodes: list[ir.Node]) -> bool:
        """Rule 2: whether the constant is a weight in the folded model, whoever these nodes are."""
        kept = self.values.get(str(leaf.name))
        if kept is None or kept.const_value is None:
            return False
        readers = {n.op_type for n in graph.consumers(kept) if n.op_type in graph.WEIGHTED}
        is_transposed = [node.op_type for node in nodes] == ["Transpose"]
        return bool(readers - {"Gather"} if is_transposed else readers)

    def _are_as_before(self, nodes: list[ir.Node]) -> bool:
        """Rule 5: whether the constants that these nodes read and make have their former values."""
        touched = {v for node in nodes for v in (*node.inputs, *node.outputs) if v is not None}
        kept = {v: self.values[str(v.name)] for v in touched if v.name in self.values}
        arrays = {v: array for v, now in kept.items() if (array := graph.constant(now)) is not None}
        made = [v for v in arrays if not graph.is_constant(v)]
        former = {v: graph.constant(v) for v in arrays if graph.is_constant(v)}
        former |= dict(zip(made, self._made(made), strict=True))
        return all(_are_equal(former[v], array) for v, array in arrays.items())

    def _made(self, values: list[ir.Value]) -> list[NDArray[Any]]:
        """What the nodes of the model before make of its constants."""
        nodes = dict.fromkeys(n for v in values for n in self._chain(str(v.name), {})[0])
        names = [str(v.name) for v in values]
        part = extract(self.before, list(nodes), names, {})
        return run(open_session(part.SerializeToString(), optimize=False), {}, outputs=names)

    def _chain(
        self, name: str, present: Mapping[str, ir.Value]
    ) -> tuple[list[ir.Node], list[ir.Value]]:
        """The nodes that make a value, in the order in which they run, and the constants they read.

        present  what is not made again, by name
        """
        nodes: dict[ir.Node, None] = {}
        leaves: dict[ir.Value, None] = {}
        waiting = [(self.makers[name], False)]
        while waiting:
            node, is_ready = waiting.pop()
            if node in nodes:
                continue
            if is_ready:
                nodes[node] = None
                continue
            waiting.append((node, True))
            for read in node.inputs:
                if read is None:
                    continue
                if graph.is_constant(read):
                    leaves[read] = None
                elif read.name not in present:
                    waiting.append((self.makers[str(read.name)], False))
        return list(nodes), list(leaves)

    def _copied(self, leaf: ir.Value) -> ir.Value:
        """A constant of the model before, in the main graph of the folded one."""
        copy = ir.Value(
            name=leaf.name, type=leaf.type, shape=leaf.shape, const_value=leaf.const_value
        )
        self.folded.graph.register_initializer(copy)
        return copy

    def _insert(self, inside: ir.Graph, nodes: list[ir.Node]) -> None:
        """Edit in place: copies of these nodes stand before those that the graph had."""
        copies = []
        for node in nodes:
            outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in node.outputs]
            copies.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    [None if v is None else self.values[str(v.name)] for v in node.inputs],
                    node.attributes.values(),
                    outputs=outputs,
                    version=node.version,
                    name=node.name,
                )
            )
            self.values.update((str(v.name), v) for v in outputs if v.name)
        if inside in self.first:
            inside.insert_before(self.first[inside], copies)
        else:
            inside.extend(copies)


def _size_in_file(node: ir.Node) -> int:
    """Bytes of a node, with the tensors that it holds as attributes."""
    return int(ir.to_proto(node).ByteSize())


def _are_equal(before: NDArray[Any] | None, now: NDArray[Any]) -> bool:
    """Whether the arrays are the same, NaN included, but for the last bits of floats."""
    if before is None or before.shape != now.shape:
        return False
    if now.dtype.kind == "f":
        return np.allclose(before, now, equal_nan=True)
    return np.array_equal(before, now)
