"""How the nodes that read one weight agree on its storage, so that the file holds it once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from quant_core.model import graph
from quant_core.numerics.both_axes import least_db_of_both_axes
from quant_core.numerics.granularity import BothAxes, Granularity, PerBlock, PerChannel
from quant_core.numerics.layout import Layout
from quant_core.plan.operators import RULES, float_weights, weight_layout
from quant_core.plan.tied import has_rows_of, is_lookup, is_product
from quant_core.plan.types import Compute, NodePlan, Storage
from quant_core.plan.weighted_nodes import WeightedNodes, kept_in_float

# Of the row or column that it serves worst: activations in 8 bits have some 40 dB. Not tuned.
ONE_SCALE_DB = 27.0


def unify_weights(
    nodes: Sequence[ir.Node],
    outputs: Collection[ir.Value],
    weighted: dict[str, NodePlan],
    decide: WeightedNodes,
) -> None:
    """Edit `weighted` in place, so that each weight is stored in one form.

    outputs  of the model

    1. A weight that one node reads in float, or that is an output of the model, is stored as that
       float for all. Of float16 and float32 it is the wider that any of them needs.
    2. It has 8 bits if one of its readers takes whole bytes only.
    3. Where integer kernels multiply it along both axes, they share one scale that serves each row
       and each column. Otherwise they multiply it along one axis: that of a table in 4 bits, or
       else of most readers. Others compute in float, which takes integers that lie along any axis.
    4. MatMulNBits, whose form no other kernel reads, is for weights that only it and tables read.
    5. Integer kernels have the finest scales that one of them needs, or a table, and are all safe
       from saturation if one of them must be.
    6. Levels of 4 bits are even for all if they must be for one.
    """
    _keep_in_float(nodes, outputs, weighted)  # 1
    shared = [_Shared(r, weighted, decide) for r in _readers(nodes) if len(r) > 1]
    while sum(weight.widen() for weight in shared):  # again, as a node may have two weights
        pass
    for weight in shared:
        weight.choose_axis()
        weight.choose_form()
        weight.choose_scales()
        weight.choose_levels()


@dataclass(frozen=True, slots=True)
class _Reader:
    """A node that reads a weight, and the layout by which its integer kernel makes rows of it."""

    node: ir.Node
    layout: Layout

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def is_table(self) -> bool:
        return RULES[self.node.op_type].is_table


@dataclass(frozen=True, slots=True)
class _Shared:
    """A weight with several readers; `weighted` is edited in place."""

    readers: Sequence[_Reader]
    weighted: dict[str, NodePlan]
    decide: WeightedNodes

    def widen(self) -> bool:
        """Rule 2: whether it changed anything."""
        plans = [(reader, self.weighted[reader.name]) for reader in self.readers]
        whole = next((p.node for _, p in plans if p.storage is Storage.INT8), None)
        narrow = [reader for reader, p in plans if p.storage is Storage.INT4]
        if whole is None:
            return False
        for reader in narrow:
            self._change(reader, f"int8: {whole} takes whole bytes", storage=Storage.INT8)
        return bool(narrow)

    def choose_axis(self) -> None:
        """Rule 3."""
        narrow = (r for r in self.readers if self.weighted[r.name].storage is Storage.INT4)
        fixed = [reader.layout for reader in narrow if reader.is_table]
        kernels = [reader.layout for reader in self._in_integers()]
        if not kernels or (len(set(kernels)) > 1 and self._has_one_scale()):
            return
        chosen = fixed[0] if fixed else max(kernels, key=kernels.count)
        for reader in self._in_integers():
            if reader.layout != chosen:
                reason = "integers of its weight lie along another axis, for another node"
                self._change(reader, reason, compute=Compute.FLOAT)

    def choose_form(self) -> None:
        """Rule 4."""
        blocks = [r for r in self.readers if self.weighted[r.name].compute is Compute.BLOCKS]
        if not all(reader.is_table or reader in blocks for reader in self.readers):
            for reader in blocks:
                self._change(reader, compute=Compute.DYNAMIC)

    def choose_scales(self) -> None:
        """Rule 5."""
        kernels = self._in_integers()
        plans = [self.weighted[reader.name] for reader in kernels]
        needed = [p.granularity for p in plans if p.granularity is not None]
        if self.decide.config.per_channel and any(reader.is_table for reader in self.readers):
            needed.append(PerChannel())  # one scale serves a product, not the rows of a table
        if len({reader.layout for reader in kernels}) > 1:
            needed = [BothAxes()]
        for planned in plans:
            self.weighted[planned.node] = replace(
                planned,
                granularity=min(needed, key=_coarseness),
                pair_safe=any(p.pair_safe for p in plans),
            )

    def choose_levels(self) -> None:
        """Rule 6."""
        plans = [self.weighted[reader.name] for reader in self.readers]
        sizes = [(p, p.granularity.size) for p in plans if isinstance(p.granularity, PerBlock)]
        if any(p.granularity == PerBlock(size) for p, size in sizes):
            for p, size in sizes:
                self.weighted[p.node] = replace(p, granularity=PerBlock(size))

    def _has_one_scale(self) -> bool:
        """Whether integers on one grid serve all that read the weight, along both axes."""
        plans = [self.weighted[reader.name] for reader in self.readers]
        weights = {float_weights(reader.node)[0] for reader in self.readers}  # a table has copies
        if len(weights) > 1 or any(planned.storage is not Storage.INT8 for planned in plans):
            return False
        if not all(reader.is_table or is_product(reader.node) for reader in self.readers):
            return False
        pair_safe = any(planned.pair_safe for planned in plans)
        matrix = graph.array(weights.pop())
        return least_db_of_both_axes(matrix, pair_safe=pair_safe) > ONE_SCALE_DB

    def _in_integers(self) -> list[_Reader]:
        return [r for r in self.readers if self.weighted[r.name].compute.is_integer]

    def _change(
        self,
        reader: _Reader,
        reason: str = "",
        *,
        compute: Compute | None = None,
        storage: Storage | None = None,
    ) -> None:
        planned = self.weighted[reader.name]
        self.weighted[reader.name] = self.decide.changed(
            reader.node, planned, reason, compute=compute, storage=storage
        )


def _readers(nodes: Sequence[ir.Node]) -> list[list[_Reader]]:
    """The readers of each weight; a product with a copy of a table whose rows are its output
    channels reads that table.
    """
    lookups = [node for node in nodes if is_lookup(node)]
    tables = {graph.value(n.inputs[0]): weight_layout(n, graph.value(n.inputs[0])) for n in lookups}
    found: dict[ir.Value, dict[ir.Node, _Reader]] = {}
    for node in nodes:
        for weight in float_weights(node):
            read, layout = weight, weight_layout(node, weight)
            if weight not in tables and is_product(node):
                copied = (table for table in tables if has_rows_of(node, weight, table))
                read = next(copied, weight)
                layout = tables.get(read, layout)
            found.setdefault(read, {})[node] = _Reader(node, layout)
    return [list(readers.values()) for readers in found.values()]


def _coarseness(granularity: Granularity) -> tuple[int, int]:
    """A number that orders granularities, the finest first."""
    if isinstance(granularity, PerBlock):
        return 0, granularity.size
    return (1, 0) if granularity == PerChannel() else (2, 0)


def _keep_in_float(
    nodes: Sequence[ir.Node], outputs: Collection[ir.Value], weighted: dict[str, NodePlan]
) -> None:
    """Rule 1: integers beside a float would only add bytes."""
    changed = True
    while changed:
        changed, in_float = False, _float_weights_read(nodes, outputs, weighted)
        for node in nodes:
            planned, weights = weighted[str(node.name)], float_weights(node)
            shared = [w for w in weights if w in in_float]
            if not shared:
                continue
            widest = max(shared, key=lambda w: in_float[w][0].bits)
            storage, why = in_float[widest]
            if planned.is_rounded or planned.weight_storage.bits < storage.bits:
                stays, reason = planned.in_float(storage), f"its weight {widest.name} is {why}"
                weighted[planned.node] = kept_in_float(stays, weights, reason)
                changed = True


def _float_weights_read(
    nodes: Sequence[ir.Node], outputs: Collection[ir.Value], weighted: Mapping[str, NodePlan]
) -> dict[ir.Value, tuple[Storage, str]]:
    """Weight that must be stored as a float -> as which, and why."""
    found: dict[ir.Value, tuple[Storage, str]] = {}
    for node in nodes:
        planned = weighted[str(node.name)]
        for weight in float_weights(node):
            if _is_given(weight, outputs):
                found[weight] = Storage.FLOAT32, "an output of the model"
            elif planned.is_rounded:
                continue
            elif weight not in found or found[weight][0].bits < planned.weight_storage.bits:
                found[weight] = planned.weight_storage, f"read in float by {planned.node}"
    return found


def _is_given(weight: ir.Value, outputs: Collection[ir.Value]) -> bool:
    """Whether the weight, or a copy of it, is one of the outputs."""
    copies = [n.outputs[0] for n in graph.consumers(weight) if n.op_type == "Identity"]
    return any(value in outputs for value in (weight, *copies))
