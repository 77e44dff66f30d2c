"""How a plan and what calibration measured become a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.observe import Statistics
from quant_core.calibrate.outliers import treatment_factors, weights_reading
from quant_core.calibrate.ranges import RangeCache
from quant_core.errors import ModelError
from quant_core.model import files, graph, origins
from quant_core.model.carried import set_apart
from quant_core.model.normalize import normalize
from quant_core.model.prepare import OPSET_INT4, raise_opset
from quant_core.model.qat import respects_pairs
from quant_core.numerics.affine import Grid, QuantParams, choose_params, quantize
from quant_core.numerics.float16 import FLOAT16
from quant_core.numerics.granularity import PerTensor
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.layout import Layout
from quant_core.plan.operators import (
    KERNEL_BLOCKS,
    RULES,
    DynamicPattern,
    Kind,
    weight_layout,
    weight_positions,
)
from quant_core.plan.static_nodes import capped_output, data_inputs
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.plan.weighted_nodes import is_folded
from quant_core.rewrite import dynamic, emit
from quant_core.rewrite.dynamic import DynamicInput, StoredWeight
from quant_core.rewrite.emit import Writer
from quant_core.rewrite.float_islands import keep_in_float
from quant_core.rewrite.hard_sigmoid import spell_out_hard_sigmoid
from quant_core.rewrite.lower_pairs import lower_pairs
from quant_core.rewrite.rounding import (
    ROW_SCALES,
    Rounded,
    Rounding,
    WeightCache,
    bias_of,
    flat_bias,
)

SHORT_BIAS = (
    64  # channels, for which the four more nodes of `write_bias` take fewer bytes than it saves
)
INT32_MAX = (
    2**31 - 2**17
)  # a bias is at most this in int32: `write_bias` rounds to steps of up to 2**16
BIAS_MAX = 2**30  # half of what int32 holds: the sum of products is added to the bias


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """What `apply_plan` makes.

    written         planned node -> the node that computes in its place
    weight_sqnr_db  planned node -> signal to rounding noise of its worst weight in dB
    worst_row_db    planned node -> the same of the worst channel of its weights
    """

    model: ir.Model
    written: Mapping[str, ir.Node]
    weight_sqnr_db: Mapping[str, float]
    worst_row_db: Mapping[str, float]


def apply_plan(
    model: ir.Model,
    plan: QuantPlan,
    stats: Statistics | None,
    *,
    ranges: RangeCache | None = None,
    weights: WeightCache | None = None,
) -> Quantized:
    """The quantized model; `model` is not changed.

    ranges   those that were found before, for other plans
    weights  those that were rounded before, for other plans of one float model with the same
             statistics

    1. Every activation of the plan gets one QuantizeLinear and one DequantizeLinear. Where a static
    node writes it,
       all readers read the rounded tensor (else the node would not fuse); otherwise only static
       readers do.
    2. Every planned weight is replaced by its integers and the nodes that bring them back
    (emit.py).
    3. A bias of a Conv or Gemm gives back what rounding the weight takes from each channel's mean;
    of a static one
       it becomes int32 with scale x_scale * w_scale.
    4. Dynamic MatMul, Gemm and LSTM quantize their input at run time (dynamic.py).
    5. Whatever else reads a weight that is stored as integers reads what these stand for, so that
    no weight is stored twice.
    6. Constants that are to be float16, and are still read, are.
    7. Float nodes between integers are written so that they stay float (float_islands.py).
    8. Pairs of quantization-aware training keep their scales (lower_pairs.py).
    9. HardSigmoid is written as Clip for a runtime that has no fast kernel of it.

    Raises: ModelError if the plan names tensors that the statistics or the model lack.
    """
    copy = model.clone()
    target = TARGETS[plan.target]
    if plan.in_four_bits or target.activation_bits > 8:
        copy = raise_opset(copy, OPSET_INT4)
        normalize(copy)
        set_apart(copy)
    if respects_pairs(copy):
        lower_pairs(copy, target)  # 8
    nodes = {str(n.name): n for g in graph.graphs_of(copy) for n in g}
    missing = [n.node for n in plan.nodes if n.node not in nodes]
    if missing:
        raise ModelError(
            f"the plan names nodes that the model lacks: {', '.join(missing[:3])}",
            hint="Plan it anew",
        )
    rounding = Rounding(plan, stats, weights)
    rewrite = _Rewrite(
        copy, plan, stats, nodes, rounding, RangeCache() if ranges is None else ranges
    )
    written = {}
    for planned in sorted(plan.nodes, key=_order):
        node = nodes[planned.node]
        read = [v.const_value for v in node.inputs if v is not None]
        written[planned.node] = rewrite.node(node, planned)
        files.release(*read)
    rewrite.other_readers()
    rewrite.activations([nodes[n.node] for n in plan.nodes if n.compute is Compute.STATIC])
    graph.drop_unused(copy)
    rewrite.float16_constants()
    keep_in_float(copy, is_onnxruntime=target.is_onnxruntime)  # 7
    if not target.has_hard_sigmoid:
        spell_out_hard_sigmoid(copy)  # 9
    files.release(*files.external_tensors(model))
    _clean(copy)
    remaining = {planned: node for planned, node in written.items() if node.graph is not None}
    return Quantized(copy, remaining, rewrite.rounding.sqnr_db, rewrite.rounding.worst_row_db)


def _order(planned: NodePlan) -> int:
    """Tables first, as others may share them; then what computes in integers, whose weights float
    operators can read too.
    """
    if RULES[planned.op_type].is_table:
        return 0
    return 1 if planned.compute.is_integer else 2


def _clean(model: ir.Model) -> None:
    """Edit in place: the operator sets that are used, no types that tensors tell anyway, and who
    made it.
    """
    for domain in {n.domain for g in graph.graphs_of(model) for n in g if n.domain}:
        model.graph.opset_imports.setdefault(domain, 1)
    for g in graph.graphs_of(model):
        for value in g.initializers.values():
            if not (value.is_graph_input() or value.is_graph_output()):
                value.type = value.shape = None  # half as many value_info in the file
    model.metadata_props.pop(origins.METADATA, None)
    model.producer_name = "quantmill"


@dataclass(frozen=True, slots=True)
class _FloatKey:
    """Which weight of a float operator was written: one value serves all operators that read it
    alike.
    """

    weight: ir.Value
    storage: Storage
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Tied:
    """A product that has the integers of a table."""

    product: NodePlan
    rounded: Rounded


@dataclass(slots=True)
class _Written:
    """What stands in the copy already, for nodes that share a weight or an input.

    integers  weight -> how it is stored as integers first, by any node
    """

    static: dict[IntegerWeight, ir.Value] = field(default_factory=dict)
    products: dict[IntegerWeight, StoredWeight] = field(default_factory=dict)
    blocks: dict[IntegerWeight, StoredWeight] = field(default_factory=dict)
    floats: dict[_FloatKey, ir.Value] = field(default_factory=dict)
    float16: dict[tuple[ir.Value, ir.Graph], ir.Value] = field(default_factory=dict)
    inputs: dict[ir.Value, DynamicInput] = field(default_factory=dict)
    biases: dict[ir.Node, ir.Value] = field(default_factory=dict)
    integers: dict[ir.Value, Rounded] = field(default_factory=dict)
    factors: dict[ir.Value, NDArray[np.float32]] = field(default_factory=dict)


class _Rewrite:
    """The private copy that is being edited, and what was already written into it."""

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        stats: Statistics | None,
        nodes: Mapping[str, ir.Node],
        rounding: Rounding,
        ranges: RangeCache,
    ) -> None:
        self.model, self.plan, self.stats, self.nodes = model, plan, stats, nodes
        self.rounding, self.ranges = rounding, ranges
        self.target = TARGETS[plan.target]
        self.grid = Grid(
            self.target.activation_bits,
            self.target.activation_signed,
            symmetric=not self.target.zero_points,
        )
        moves = [n.node for n in plan.nodes if RULES[n.op_type].kind is Kind.MOVES]
        self.moved = {str(nodes[name].outputs[0].name) for name in moves}
        self.params = {t: self._params(t) for t in dict.fromkeys(plan.activations.values())}
        self.writer = Writer(model)
        self.written = _Written()
        self.alike = self._alike()

    def node(self, node: ir.Node, planned: NodePlan) -> ir.Node:
        """Rules 2 to 4 for one node; returns the node that computes in its place."""
        if planned.storage is Storage.FLOAT16:
            return self._float16_weights(node)
        if not planned.is_rounded:
            return node
        match planned.compute:
            case Compute.STATIC:
                return self._static(node, planned)
            case Compute.BLOCKS:
                return self._blocks(node, planned)
            case Compute.DYNAMIC if RULES[node.op_type].dynamic_pattern is DynamicPattern.LSTM:
                return self._dynamic_lstm(node, planned)
            case Compute.DYNAMIC:
                return self._dynamic_matmul(node, planned)
        if RULES[node.op_type].is_table:
            return self._table(node, planned)
        return self._weight_only(node, planned)

    def activations(self, static: list[ir.Node]) -> None:
        """Rule 1."""
        values = {v.name: v for v in self.model.graph.inputs}
        values |= {v.name: v for n in self.model.graph for v in n.outputs}
        readers = set(static)
        writers = {capped_output(n) for n in static}
        for tensor, root in self.plan.activations.items():
            if tensor not in values:
                raise ModelError(
                    f"the plan names tensor {tensor}, which the model lacks", hint="Plan it anew"
                )
            value = values[tensor]
            self._quantize(value, self.params[root], None if value in writers else readers)
        for node in static:
            if RULES[node.op_type].kind is Kind.ELEMENTWISE:
                self._quantize_constants(node)

    def other_readers(self) -> None:
        """Rule 5."""
        for weight, rounded in self.written.integers.items():
            uses = list(weight.uses())
            if not uses or weight.is_graph_output():
                continue
            write = self.writer.first(_owner(weight))
            value = emit.write_folded(write, str(weight.name), rounded)
            for use in uses:
                use.node.replace_input_with(use.idx, value)

    def float16_constants(self) -> None:
        """Rule 6."""
        for g in graph.graphs_of(self.model):
            for name in [n for n in g.initializers if self.plan.constants.get(n) == FLOAT16]:
                value = g.initializers[name]
                for use in list(value.uses()):
                    use.node.replace_input_with(use.idx, self._float16(value, g))
        graph.drop_unused(self.model)

    # Rule 1

    def _params(self, tensor: str) -> QuantParams:
        """Scale and zero point of an activation and of those that share its range."""
        if self.stats is None:
            raise ModelError(
                "static quantization needs calibration",
                tensor,
                "Give calibration data, or mode dynamic",
            )
        config = self.plan.config
        known = self.plan.activations
        sharing = [t for t, root in known.items() if root == tensor and t not in self.moved]
        found = self.stats.of_tensor(tensor)
        for other in sharing:
            if other != tensor:
                found = found.merge(self.stats.of_tensor(other))
        lo, hi = self.ranges.find(found, self.grid, config.method, config.percentile)
        return choose_params(lo, hi, self.grid)

    def _quantize(self, value: ir.Value, params: QuantParams, readers: set[ir.Node] | None) -> None:
        """A Q/DQ pair behind the value, read by all (None) or by these readers at their data
        inputs.
        """
        uses = [
            u
            for u in value.uses()
            if readers is None or (u.node in readers and value in data_inputs(u.node))
        ]
        is_output = value.is_graph_output() and readers is None
        producer, name = value.producer(), str(value.name)
        write = self.writer.detached()
        if is_output:
            value.name = self.writer.free(f"{name}_float")
        dq = emit.write_pair(write, name, value, params.scale, params.zero_point)
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], write.waiting)
        else:
            self.model.graph.insert_after(producer, write.waiting)
        for use in uses:
            use.node.replace_input_with(use.idx, dq)
        if is_output:
            dq.name, dq.type, dq.shape = name, value.type, value.shape
            outputs = self.model.graph.outputs
            for position in [i for i, output in enumerate(outputs) if output is value]:
                outputs[position] = dq

    def _quantize_constants(self, node: ir.Node) -> None:
        """Constant operands of an elementwise operator go onto the grid of activations."""
        for i, operand in enumerate(node.inputs):
            if operand is None or not graph.is_constant(operand):
                continue
            array = graph.array(operand)
            params = choose_params(array.min(initial=0.0), array.max(initial=0.0), self.grid)
            q = quantize(array, params)
            write = self.writer.before(node)
            dq = emit.write_qdq(write, str(operand.name), q, params.scale, params.zero_point)
            node.replace_input_with(i, dq)

    # Rules 2 and 3

    def _static(self, node: ir.Node, planned: NodePlan) -> ir.Node:
        """int8 weight behind a DequantizeLinear, int32 bias on the grid of the products."""
        weight = graph.value(node.inputs[1])
        layout = weight_layout(node, weight)
        root = self.plan.activations[graph.name_of(node.inputs[0])]
        x_scale = float(self.params[root].scale)
        channels = graph.shape_of(weight)[layout.channel_axis]
        bias = flat_bias(bias_of(node), channels)
        floor = np.abs(bias) / (BIAS_MAX * x_scale) if bias is not None else 0.0
        rounded = self.rounding.integers(node, weight, planned, floor=floor)
        known = self.written.static
        self.written.integers.setdefault(weight, rounded)
        if rounded.integers not in known:
            write = self.writer.first(self.model.graph)
            known[rounded.integers] = emit.write_dequantized(
                write, str(weight.name), rounded, layout.channel_axis
            )
        w = known[rounded.integers]
        alike = self.alike.get(node, [node])
        known_biases = self.written.biases
        if alike[0] in known_biases:
            graph.set_input(node, RULES[node.op_type].bias or 0, known_biases[alike[0]])
        else:
            found = [self.rounding.corrected_bias(n, weight, rounded) for n in alike]
            biases = [bias for bias in found if bias is not None]
            if biases:
                mean = np.mean(biases, axis=0)
                known_biases[node] = self._static_bias(node, mean, x_scale, rounded, w)
        node.replace_input_with(1, w)
        return node

    def _alike(self) -> dict[ir.Node, list[ir.Node]]:
        """Static node -> the nodes that share its weight, its bias and the range of its input.

        They share what they write for the bias, which gives back what they lose on average.
        """
        found: dict[tuple[ir.Value, ir.Value, str], list[ir.Node]] = {}
        for planned in self.plan.nodes:
            node = self.nodes[planned.node]
            if planned.compute is not Compute.STATIC or not planned.is_rounded:
                continue
            bias = bias_of(node)
            if bias is not None and graph.is_constant(bias):
                root = self.plan.activations[graph.name_of(node.inputs[0])]
                found.setdefault((graph.value(node.inputs[1]), bias, root), []).append(node)
        return {node: nodes for nodes in found.values() for node in nodes}

    def _static_bias(
        self,
        node: ir.Node,
        bias: NDArray[np.float64],
        x_scale: float,
        rounded: Rounded,
        w: ir.Value,
    ) -> ir.Value:
        """The bias (C,) in int32 with the scale of the products, or in int16 where constants are
        folded anyway; in float32 where the target wants that.
        """
        position, old = RULES[node.op_type].bias, bias_of(node)
        assert position is not None
        name = f"{node.name}_bias" if old is None else str(old.name)
        scale = (x_scale * rounded.integers.scale.astype(np.float64)).astype(np.float32)
        steps = np.rint(bias / scale.astype(np.float64))
        q = np.clip(steps, -INT32_MAX, INT32_MAX).astype(np.int32)
        axis = 0 if scale.ndim else None
        write = self.writer.before(node)
        counts_on_folding = bool(self.plan.in_four_bits) and self.target.decodes_int4
        if not self.target.integer_bias:
            value = write.constant(name, (q * scale.astype(np.float64)).astype(np.float32))
        elif counts_on_folding and len(q) >= SHORT_BIAS:
            exact = q * scale.astype(float)
            value = emit.write_bias(write, name, exact, x_scale, w, axis)
        else:
            zero = np.zeros(scale.shape, np.int32)
            value = emit.write_qdq(write, name, q, scale, zero, axis)
        graph.set_input(node, position, value)
        return value

    def _blocks(self, node: ir.Node, planned: NodePlan) -> ir.Node:
        """Weights that stay in 4 bits, in an operator of onnxruntime's own."""
        weight = graph.value(node.inputs[1])
        rounded = self.rounding.integers(node, weight, planned)
        bias = self.rounding.corrected_bias(node, weight, rounded)
        known = self.written.blocks
        if rounded.integers not in known:
            write = self.writer.first(self.model.graph)
            known[rounded.integers] = dynamic.write_block_weight(write, str(weight.name), rounded)
        write = self.writer.before(node)
        return dynamic.write_blocks(write, node, rounded, known[rounded.integers], bias)

    def _weight_only(self, node: ir.Node, planned: NodePlan) -> ir.Node:
        """Each weight is float again when onnxruntime has loaded the model, or behind the standard
        DequantizeLinear.
        """
        for position in weight_positions(node):
            if position < len(node.inputs) and graph.is_float_weight(node.inputs[position]):
                if is_folded(self.plan.config, self.target):
                    self._folded(node, planned, position)
                else:
                    self._standard(node, planned, position)
        return node

    def _standard(self, node: ir.Node, planned: NodePlan, position: int) -> None:
        weight = graph.value(node.inputs[position])
        key = _float_key(node, weight, planned)
        known = self.written.floats
        if key not in known:
            write = self.writer.first(_owner(weight))
            found = self.rounding.standard(node, weight, planned)
            value = emit.write_qdq(
                write,
                str(weight.name),
                found.q,
                found.scale,
                found.zero_point,
                found.axis,
                found.block,
            )
            if found.rows is not None:
                shape = graph.shape_of(weight)
                value = emit.write_from_rows(write, str(weight.name), value, found.rows, shape)
            known[key] = value
        node.replace_input_with(position, known[key])

    def _folded(self, node: ir.Node, planned: NodePlan, position: int) -> None:
        weight = graph.value(node.inputs[position])
        key = _float_key(node, weight, planned)
        known = self.written.floats
        stored = self.written.integers.get(weight)
        if stored is None or stored.bits < planned.weight_storage.bits:
            stored = self.rounding.integers(node, weight, planned)
            self.written.integers[weight] = stored
        rounded = stored
        if key not in known:
            write = self.writer.first(_owner(weight))
            known[key] = emit.write_folded(write, str(weight.name), rounded)
        write = self.writer.first(graph.home(node))
        at, bias = RULES[node.op_type].bias, None
        if self.rounding.corrects_bias(node) and rounded.layout == key.layout:
            bias = self.rounding.corrected_bias(node, weight, rounded)
        if at is not None and bias is not None:
            old = bias_of(node)
            name = f"{node.name}_bias" if old is None else f"{old.name}_corrected"
            graph.set_input(node, at, write.constant(name, bias.astype(np.float32)))
        node.replace_input_with(position, known[key])

    def _float16_weights(self, node: ir.Node) -> ir.Node:
        """float16 in the file, float32 when onnxruntime has loaded it; rows of a table when they
        are picked.
        """
        rule = RULES[node.op_type]
        for position in weight_positions(node):
            if position >= len(node.inputs) or not graph.is_float_weight(node.inputs[position]):
                continue
            weight = graph.value(node.inputs[position])
            value = self._float16(weight, _owner(weight))
            if rule.is_table:
                rows = emit.write_half_rows(self.writer.before(node), value, node)
                graph.replace_value(node.outputs[0], rows)
            else:
                node.replace_input_with(position, value)
        return node

    def _float16(self, value: ir.Value, home: ir.Graph) -> ir.Value:
        """The constant as float16 with the node that casts it back, written once for each graph."""
        key = (value, home)
        if key not in self.written.float16:
            write = self.writer.first(home)
            array = graph.array(value)
            self.written.float16[key] = emit.write_half(write, str(value.name), array)
        return self.written.float16[key]

    def _table(self, node: ir.Node, planned: NodePlan) -> ir.Node:
        """A table whose rows are scaled after they are picked."""
        table = graph.value(node.inputs[0])
        tied = self._tied(table, planned)
        rounded = self.rounding.table(node, table, planned) if tied is None else tied.rounded
        self.written.integers.setdefault(table, rounded)
        # An integer product needs the integers in its own graph, which the table then shares.
        is_local = tied is not None and tied.product.compute is not Compute.FLOAT
        home = self.writer.first(graph.home(node) if is_local else _owner(table))
        write = self.writer.before(node)
        rows = emit.write_rows(write, home, graph.name_of(table), rounded, node)
        graph.replace_value(node.outputs[0], rows)
        return node

    def _tied(self, table: ir.Value, planned: NodePlan) -> _Tied | None:
        """The MatMul or Gemm whose weight is this table, and its integers: stored once.

        1. Rows of the table are its output channels: of the same weight, or of a copy of it.
        2. Columns are, of the same weight. Blocks of 4 bits do not fit then.
        """
        shape = graph.shape_of(table)
        for other in self.plan.nodes:
            if other.storage is not planned.storage or not self._serves_rows(other):
                continue
            node = self.nodes[other.node]
            weight = graph.value(node.inputs[weight_positions(node)[0]])
            layout = weight_layout(node, weight)
            if weight is table and not layout.is_straight and other.storage is Storage.INT8:  # 2
                return _Tied(other, self.rounding.integers(node, weight, other))
            if layout.transposed_shape(graph.shape_of(weight)) != shape:
                continue
            rows = layout.matrix(graph.array(weight))
            if np.array_equal(rows, graph.array(table)):  # 1
                found = self.rounding.integers(node, weight, other)
                return _Tied(other, replace(found, layout=ROW_SCALES, shape=shape))
        return None

    def _serves_rows(self, other: NodePlan) -> bool:
        """Whether a product's integers could serve as the rows of a table too."""
        if RULES[other.op_type].dynamic_pattern is not DynamicPattern.MATMUL:
            return False
        if other.storage is Storage.INT4:
            return other.granularity in KERNEL_BLOCKS
        # one scale serves a product, not the rows of a table
        return not self.plan.config.per_channel or other.granularity != PerTensor()

    # Rule 4

    def _dynamic_matmul(self, node: ir.Node, planned: NodePlan) -> ir.Node:
        """A product of integers whose input is quantized at run time, once for all nodes that read
        it.
        """
        x, weight = graph.value(node.inputs[0]), graph.value(node.inputs[1])
        factors = self._factors(x)
        rounded = self.rounding.integers(node, weight, planned, factors=factors)
        integers, known = rounded.integers, self.written.products
        if factors is None:
            self.written.integers.setdefault(weight, rounded)
        if integers not in known:
            first = self.writer.first(self.model.graph)
            known[integers] = dynamic.write_weight(first, str(weight.name), integers)
        write = self.writer.before(node)
        if x not in self.written.inputs:
            self.written.inputs[x] = dynamic.write_input(write, x, factors)
        return dynamic.write_matmul(write, node, self.written.inputs[x], known[integers], factors)

    def _dynamic_lstm(self, node: ir.Node, planned: NodePlan) -> ir.Node:
        """An LSTM whose input is quantized at run time."""
        w, r = (graph.value(node.inputs[i]) for i in RULES[node.op_type].weights)
        rounded_w = self.rounding.integers(node, w, planned)
        rounded_r = self.rounding.integers(node, r, planned)
        return dynamic.write_lstm(self.writer.before(node), node, rounded_w, rounded_r)

    def _factors(self, x: ir.Value) -> NDArray[np.float32] | None:
        """(K,) by which all dynamic nodes that read the tensor divide it; None if the plan does not
        treat it.
        """
        treatment = self.plan.outliers.get(str(x.name))
        if treatment is None:
            return None
        known = self.written.factors
        if x not in known:
            read = str(x.name), -1
            if self.stats is None or read not in self.stats.means:
                raise ModelError(
                    "treating outliers needs calibration", str(x.name), "Give calibration data"
                )
            dynamic_nodes = [n.node for n in self.plan.nodes if _reads_dynamically(n)]
            weights = weights_reading(self.model, str(x.name), dynamic_nodes)
            max_abs = self.stats.means[read].max_abs
            known[x] = treatment_factors(treatment, max_abs, weights)
        return known[x]


def _reads_dynamically(planned: NodePlan) -> bool:
    """Whether the node is written as a product of integers whose input is quantized at run time."""
    is_matmul = RULES[planned.op_type].dynamic_pattern is DynamicPattern.MATMUL
    return is_matmul and planned.compute is Compute.DYNAMIC


def _float_key(node: ir.Node, weight: ir.Value, planned: NodePlan) -> _FloatKey:
    layout = weight_layout(node, weight)
    return _FloatKey(weight, planned.weight_storage, layout)


def _owner(weight: ir.Value) -> ir.Graph:
    """The graph that holds the initializer: nodes of the graphs inside it may read it too."""
    assert isinstance(weight.graph, ir.Graph)
    return weight.graph
