"""Where new nodes and constants go in a model that is being rewritten, and what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.layout import Layout


class Writer:
    """What was written into one model so far: the names that are taken, and constants that others
    may share.

    shared  (graph, type, shape, bytes) -> the constant that holds them, for all that need it
    tables  (graph, integers) -> the rows (C, K) of a table in int4, which may be the weight of
            another operator too
    pairs   (graph, integers) -> the same rows with two integers in a byte, (C, K / 2)
    scales  (graph, integers) -> the scales of these rows
    int8    (graph, integers) -> the int8 value that holds them, and in which layout
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.shared: dict[tuple[object, ...], ir.Value] = {}
        self.tables: dict[tuple[ir.Graph, IntegerWeight], ir.Value] = {}
        self.pairs: dict[tuple[ir.Graph, IntegerWeight], ir.Value] = {}
        self.scales: dict[tuple[ir.Graph, IntegerWeight], ir.Value] = {}
        self.int8: dict[tuple[ir.Graph, IntegerWeight], tuple[ir.Value, Layout]] = {}
        self._first_nodes: dict[ir.Graph, ir.Node] = {}
        self._names: set[str] = set()
        self._numbers: Counter[str] = Counter()
        for g in graph.graphs_of(model):
            self._names.update(g.initializers)
            self._names.update(str(v.name) for v in g.inputs)
            self._names.update(str(v.name) for node in g for v in node.outputs)
            self._names.update(str(node.name) for node in g)

    def before(self, node: ir.Node) -> Cursor:
        """A cursor that writes ahead of the node."""
        return Cursor(self, graph.home(node), node)

    def first(self, of: ir.Graph) -> Cursor:
        """A cursor that writes ahead of all nodes that the graph had, behind what was written there
        before.
        """
        if of not in self._first_nodes or self._first_nodes[of].graph is not of:
            self._first_nodes[of] = of[0]  # none yet, or it was dropped
        return Cursor(self, of, self._first_nodes[of])

    def detached(self) -> Cursor:
        """A cursor whose nodes wait to be inserted into the main graph."""
        return Cursor(self, self.model.graph, None)

    def free(self, name: str) -> str:
        """A name that no value has yet: what stands behind the last `_` of this one, and a number.

        Names of exported models are long. All that is written for one weight or activation would
        repeat its name some ten times, which took up to a tenth of a small file.
        """
        kind = name.rpartition("_")[2]
        while True:
            found = f"{kind}_{self._numbers[kind]}"
            self._numbers[kind] += 1
            if found not in self._names:
                self._names.add(found)
                return found


@dataclass(slots=True)
class Cursor:
    """A place in a graph: adds initializers to the graph, and nodes ahead of one node (or, without
    one, to `waiting`).

    The graph is the one that the node is in: onnxruntime does not find the integers of a
    DequantizeLinear in a branch among the outer graph's initializers.
    """

    writer: Writer
    home: ir.Graph
    node_behind: ir.Node | None
    waiting: list[ir.Node] = field(default_factory=list)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer of the graph that is written to."""
        return graph.initializer(self.home, self.writer.free(name), array)

    def shared(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer that all share that need the same one in this graph."""
        known, key = self.writer.shared, (self.home, array.dtype, array.shape, array.tobytes())
        if key not in known:
            known[key] = self.constant(name, array)
        return known[key]

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Value:
        """The one output of a new node."""
        return self.nodes(op_type, inputs, [name], **attributes)[0]

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """The outputs of a new node; attributes are integers or tuples of them."""
        attrs = [
            ir.AttrInt64s(k, v) if isinstance(v, tuple) else ir.AttrInt64(k, v)
            for k, v in attributes.items()
        ]
        outputs = [ir.Value(name=self.writer.free(n)) for n in names]
        name = outputs[0].name
        self.insert(ir.Node(domain, op_type, inputs, attrs, outputs=outputs, name=name))
        return outputs

    def insert(self, node: ir.Node) -> None:
        """Put a new node there."""
        if self.node_behind is None:
            self.waiting.append(node)
        else:
            self.home.insert_before(self.node_behind, node)
