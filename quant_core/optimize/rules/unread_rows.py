"""Rows that nobody reads are not computed: the choice of some moves before what makes them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import constant, free_name, remove
from quant_core.optimize.facts import Facts
from quant_core.optimize.rowwise import Rows, rows_of

TO_THE_END = np.iinfo(np.int64).max
FEW = 0.5  # of the rows: more are not worth a move
COSTLY = frozenset({"MatMul", "Gemm", "LayerNormalization", "Softmax", "LogSoftmax"})


@dataclass(frozen=True, slots=True)
class Choice:
    """A node that takes some rows of a tensor.

    axis    counted from the front
    rows    as onnx's Gather counts them, negative ones from the end
    drops   whether the axis goes
    slices  whether it may meet no row at all, and gives none then
    """

    node: ir.Node
    axis: int
    rows: tuple[int, ...]
    drops: bool = False
    slices: bool = False


def unread_rows(model: ir.Model, facts: Facts) -> list[Applied]:
    """A Gather or Slice of few rows moves before everything that works row by row.

        x -> MatMul -> Add -> LayerNormalization -> Gather([0], axis = 1)
        =>   x -> Gather([0], axis = 1) -> MatMul -> Add -> LayerNormalization

    1. The rows are constant: the token [CLS] of a BERT, the last step of a sequence. They are at
       most half of those that there are, or one of an unknown number. Where that may be none, a
       Slice stays one: it gives no row, and a Gather fails.
    2. The choice passes an operator that makes each row of the same row of its inputs (rowwise.py),
       if nothing else reads the result. It then stands before each of these inputs; equal choices
       of one tensor are one node.
    3. A Reshape that names the number of rows names the new one.
    4. What is passed must compute something somewhere: a choice that moves numbers is no less work
       before operators that only move them too.
    """
    applied = []
    for inside in graph.graphs_of(model):
        moves = _Moves(inside, facts)
        waiting = [c for c in _choices(inside, facts) if _passes_costly(c, facts)]  # 1., 4.
        while waiting:
            choice = waiting.pop()
            if choice.node.graph is None:
                continue  # it moved as another's equal
            maker = graph.value(choice.node.inputs[0]).producer()
            if maker is None or graph.only_reader(maker.outputs[0]) is not choice.node:
                continue
            rows = rows_of(maker, choice.axis, facts)
            if rows:  # 2.
                waiting += moves.before(maker, rows, choice)
                if maker.op_type in COSTLY:  # 4.
                    applied.append(Applied("unread_rows", str(maker.name), ()))
    return applied


def _choices(inside: ir.Graph, facts: Facts) -> Iterator[Choice]:
    for node in inside:
        if node.op_type in ("Gather", "Slice") and not node.domain:
            found = _gathered(node, facts) if node.op_type == "Gather" else _sliced(node, facts)
            size = None if found is None else facts.size(node.inputs[0], found.axis)
            if found is not None and len(found.rows) <= (1 if size is None else FEW * size):
                yield found


def _passes_costly(choice: Choice, facts: Facts) -> bool:
    """Whether the choice would pass something that computes much (4.)."""
    passed = {choice.node}
    waiting = [(graph.value(choice.node.inputs[0]), choice.axis)]
    while waiting:
        value, axis = waiting.pop()
        maker = value.producer()
        if (
            maker is None
            or value.is_graph_output()
            or not passed.issuperset(graph.consumers(value))
        ):
            continue  # the last reader that is passed comes here again
        rows = rows_of(maker, axis, facts)
        if rows and maker.op_type in COSTLY:
            return True
        if rows and maker not in passed:
            passed.add(maker)
            waiting += [(graph.value(maker.inputs[at]), axis) for at, axis in rows.items()]
    return False


def _gathered(node: ir.Node, facts: Facts) -> Choice | None:
    rank, indices = facts.rank(node.inputs[0]), graph.constant(node.inputs[1])
    if rank is None or indices is None or graph.is_constant(node.inputs[0]) or indices.ndim > 1:
        return None
    rows = tuple(int(i) for i in indices.reshape(-1))
    return Choice(node, graph.attribute(node, "axis", 0) % rank, rows, drops=indices.ndim == 0)


def _sliced(node: ir.Node, facts: Facts) -> Choice | None:
    """One axis, with a known size or one row that is the first or the last."""
    rank = facts.rank(node.inputs[0])
    arrays = [graph.constant(v) for v in node.inputs[1:]]
    if rank is None or len(arrays) < 3 or any(a is None or a.size != 1 for a in arrays):
        return None
    start, end, axis, *steps = (int(a.reshape(())) for a in arrays if a is not None)
    axis %= rank
    size = facts.size(node.inputs[0], axis)
    if size is not None:
        return Choice(node, axis, tuple(range(size)[slice(start, end, *steps)]))
    is_first, is_last = (start, end) == (0, 1), start == -1 and end > 0
    return Choice(node, axis, (start,), slices=True) if is_first or is_last else None


@dataclass(slots=True)
class _Moves:
    """Moves within one graph; a tensor and its rows -> the node that takes them."""

    inside: ir.Graph
    facts: Facts
    made: dict[tuple[ir.Value, int, tuple[int, ...], bool], ir.Node] = field(default_factory=dict)

    def before(self, maker: ir.Node, rows: Rows, choice: Choice) -> list[Choice]:
        """Edit in place: the maker works on chosen rows alone. Returns the choices before it."""
        found = []
        for position, axis in rows.items():
            source = graph.value(maker.inputs[position])
            if graph.is_constant(source):
                chosen = np.take(graph.array(source), choice.rows, axis)
                part = constant(self.inside, str(source.name), chosen)
            else:
                taker = self._taker(source, axis, choice)
                found.append(Choice(taker, axis, choice.rows, slices=choice.slices))
                part = taker.outputs[0]
            maker.replace_input_with(position, part)
        if maker.op_type == "Reshape":
            self._shorten(maker, choice)
        self._replace(choice, maker.outputs[0])
        return found

    def _taker(self, source: ir.Value, axis: int, choice: Choice) -> ir.Node:
        """The node that takes these rows of a tensor, behind the one that makes it."""
        key = source, axis, choice.rows, choice.slices
        if key not in self.made or self.made[key].graph is None:
            name = free_name(self.inside, f"{source.name}_rows")
            if choice.slices:
                node = self._slice(source, axis, choice.rows[0], name)
            else:
                indices = constant(self.inside, name, np.array(choice.rows, np.int64))
                along = [ir.AttrInt64("axis", axis)]
                node = ir.Node("", "Gather", [source, indices], along, name=name)
            node.outputs[0].name, node.outputs[0].type = name, source.type
            maker = source.producer()
            if maker is not None and maker.graph is self.inside:
                self.inside.insert_after(maker, node)
            else:
                self.inside.insert_before(self.inside[0], node)
            self.made[key] = node
        return self.made[key]

    def _slice(self, source: ir.Value, axis: int, row: int, name: str) -> ir.Node:
        """The node that takes the first or the last row, if there is one."""
        ends = (row, TO_THE_END if row < 0 else row + 1, axis)
        inputs = [constant(self.inside, name, np.array([end], np.int64)) for end in ends]
        return ir.Node("", "Slice", [source, *inputs], name=name)

    def _shorten(self, reshape: ir.Node, choice: Choice) -> None:
        """Edit in place (3.)."""
        target = graph.array(graph.value(reshape.inputs[1])).copy()
        if target[choice.axis] > 0:
            target[choice.axis] = len(choice.rows)
            shape = constant(self.inside, f"{reshape.name}_shape", target)
            reshape.replace_input_with(1, shape)

    def _replace(self, choice: Choice, chosen: ir.Value) -> None:
        """Edit in place: the result of a choice is what the maker gives now."""
        old = choice.node.outputs[0]
        if choice.drops:
            chosen.shape, chosen.name = None, free_name(self.inside, str(chosen.name))
            axes = constant(self.inside, f"{choice.node.name}_axes", np.array([choice.axis]))
            squeeze = ir.Node("", "Squeeze", [chosen, axes], name=f"{choice.node.name}_squeeze")
            self.inside.insert_before(choice.node, squeeze)
            chosen = squeeze.outputs[0]
        graph.replace_value(old, chosen)
        remove([choice.node])
