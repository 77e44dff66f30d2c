"""How a plan and what calibration measured become a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from quant_core.calibrate.observe import Statistics
from quant_core.calibrate.outliers import treatment_factors, weights_reading
from quant_core.calibrate.ranges import RangeCache
from quant_core.errors import ModelError
from quant_core.model import files, graph
from quant_core.model.normalize import normalize
from quant_core.model.prepare import OPSET_INT4, raise_opset
from quant_core.numerics.affine import Grid, QuantParams, choose_params, quantize
from quant_core.numerics.float16 import HALF
from quant_core.numerics.granularity import PerTensor
from quant_core.numerics.weights import layout_of
from quant_core.plan.make import capped_output, data_inputs
from quant_core.plan.operators import RULES, channel_axis, is_depthwise
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.rewrite import dynamic, emit
from quant_core.rewrite.emit import Writer
from quant_core.rewrite.rounding import TABLES, Rounded, Rounding, flat_bias

SHORT_BIAS = 64  # channels, for which four more nodes take less room than they save
INT32_MAX = 2**31 - 2**17  # with room for the rounding of `emit.write_bias`
BIAS_MAX = 2**30  # half of what int32 holds: the sum of products needs room as well


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """What `apply_plan` makes.

    written         planned node -> the node that computes in its place
    weight_sqnr_db  planned node -> signal to rounding noise of its worst weight in dB
    """

    model: ir.Model
    written: Mapping[str, ir.Node]
    weight_sqnr_db: Mapping[str, float]


def apply_plan(
    model: ir.Model, plan: QuantPlan, stats: Statistics | None, ranges: RangeCache | None = None
) -> Quantized:
    """The quantized model; `model` is not changed. `ranges` keeps what is found for other plans.

    1. Every activation of the plan gets one QuantizeLinear and one DequantizeLinear. Where a static node writes it,
       all readers read the rounded tensor (else the node would not fuse); otherwise only static readers do.
    2. Every planned weight is replaced by its integers and the nodes that bring them back (emit.py).
    3. A bias of a Conv or Gemm gives back what rounding the weight takes from each channel's mean; of a static one
       it becomes int32 with scale x_scale * w_scale.
    4. Dynamic MatMul, Gemm and LSTM quantize their input at run time (dynamic.py).
    5. Constants that are to be float16, and are still read, are.

    Raises: ModelError if the plan names tensors that the statistics or the model lack.
    """
    copy = model.clone()
    if plan.in_four_bits:
        copy = raise_opset(copy, OPSET_INT4)
        normalize(copy)
    nodes = {n.name: n for g in graph.graphs_of(copy) for n in g}
    missing = [n.node for n in plan.nodes if n.node not in nodes]
    if missing:
        raise ModelError(
            f"the plan names nodes that the model lacks: {', '.join(missing[:3])}",
            hint="Plan it anew",
        )
    rewrite = _Rewrite(copy, plan, stats, nodes, RangeCache() if ranges is None else ranges)
    for planned in sorted(
        plan.nodes, key=lambda n: n.op_type != "Gather"
    ):  # tables first: others may share them
        read = [v.const_value for v in nodes[planned.node].inputs if v is not None]
        rewrite.weights(nodes[planned.node], planned)
        files.release(*read)
    rewrite.activations([nodes[n.node] for n in plan.nodes if n.compute == Compute.STATIC])
    graph.drop_unused(copy)
    rewrite.halves()
    files.release(*files.external_tensors(model))
    passes.RemoveUnusedOpsetsPass()(copy)
    for domain in {n.domain for g in graph.graphs_of(copy) for n in g if n.domain}:
        copy.graph.opset_imports.setdefault(domain, 1)
    for value in (v for g in graph.graphs_of(copy) for v in g.initializers.values()):
        value.type = value.shape = None  # the tensor says both: half as many value_info in the file
    copy.producer_name = "quantmill"
    return Quantized(copy, _written(copy, plan), rewrite.rounding.sqnr_db)


def _written(model: ir.Model, plan: QuantPlan) -> dict[str, ir.Node]:
    """Planned node -> the node that computes in its place, which dynamic.py may have written."""
    nodes = {n.name: n for g in graph.graphs_of(model) for n in g}
    found = {}
    for planned in plan.nodes:
        names = (planned.node, f"{planned.node}_integer", f"{planned.node}_int8")
        written = next((nodes[name] for name in names if name in nodes), None)
        if written is not None:
            found[planned.node] = written
    return found


class _Rewrite:
    """The private copy that is being edited, and what was already written into it."""

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        stats: Statistics | None,
        nodes: Mapping[str | None, ir.Node],
        ranges: RangeCache,
    ) -> None:
        self.ranges = ranges
        self.model, self.plan, self.stats, self.nodes = model, plan, stats, nodes
        self.target = TARGETS[plan.target]
        self.grid = Grid(8, self.target.activation_signed, symmetric=False)
        self.rounding = Rounding(plan.config, stats)
        self.folds = bool(plan.in_four_bits)  # and so counts on what onnxruntime does at load
        self.params = {t: self._params(t) for t in dict.fromkeys(plan.activations.values())}
        self.dynamic = {
            n.node for n in plan.nodes if n.compute == Compute.DYNAMIC and n.op_type != "LSTM"
        }
        self.factors: dict[ir.Value, NDArray[np.float32]] = {}
        self.inputs: dict[
            ir.Value, list[ir.Value]
        ] = {}  # what a dynamic node reads -> its DynamicQuantizeLinear
        self.written: dict[
            tuple[Any, ...], Any
        ] = {}  # weight and how it is used -> the value that stands for it

    def _params(self, tensor: str) -> QuantParams:
        if self.stats is None:
            raise ModelError(
                "static quantization needs calibration",
                tensor,
                "Give calibration data, or mode dynamic",
            )
        config = self.plan.config
        found = self.stats.of_tensor(tensor)
        lo, hi = self.ranges.find(found, self.grid, config.method, config.percentile)
        return choose_params(lo, hi, self.grid)

    def activations(self, static: list[ir.Node]) -> None:
        """Rule 1."""
        values = {
            v.name: v
            for v in (*self.model.graph.inputs, *(v for n in self.model.graph for v in n.outputs))
        }
        readers = set(static)
        writers = {
            capped_output(n) for n in static if capped_output(n).name in self.plan.activations
        }
        for tensor, root in self.plan.activations.items():
            if tensor not in values:
                raise ModelError(
                    f"the plan names tensor {tensor}, which the model lacks", hint="Plan it anew"
                )
            value = values[tensor]
            self._quantize(value, self.params[root], None if value in writers else readers)
        for node in static:
            for i, operand in enumerate(node.inputs):
                if (
                    RULES[node.op_type].kind == "elementwise"
                    and operand is not None
                    and graph.is_constant(operand)
                ):
                    node.replace_input_with(i, self._quantized_constant(node, operand))

    def _quantize(self, value: ir.Value, params: QuantParams, readers: set[ir.Node] | None) -> None:
        """A Q/DQ pair behind the value, read by all (None) or by these readers at their data inputs."""
        uses = [
            u
            for u in value.uses()
            if readers is None or (u.node in readers and value in data_inputs(u.node))
        ]
        is_output, producer, name = (
            value.is_graph_output() and readers is None,
            value.producer(),
            str(value.name),
        )
        write = Writer(self.model, None)
        if is_output:
            value.name = write.free(f"{name}_float")
        dq = emit.write_pair(write, name, value, params.scale, params.zero_point)
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], write.waiting)
        else:
            self.model.graph.insert_after(producer, write.waiting)
        for use in uses:
            use.node.replace_input_with(use.idx, dq)
        if is_output:
            dq.name, dq.type, dq.shape = name, value.type, value.shape
            self.model.graph.outputs[list(self.model.graph.outputs).index(value)] = dq

    def _quantized_constant(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """A constant operand of an elementwise operator, on the grid of activations."""
        array = graph.array(value)
        params = choose_params(array.min(initial=0.0), array.max(initial=0.0), self.grid)
        q = quantize(array, params)
        return emit.write_qdq(
            Writer(self.model, node), str(value.name), q, params.scale, params.zero_point
        )

    def weights(self, node: ir.Node, planned: NodePlan) -> None:
        """Rules 2 to 4."""
        if planned.storage is Storage.FLOAT16:
            self._half(node)
        if not planned.is_rounded:
            return
        safe = self.target.saturates and not is_depthwise(node)
        if planned.compute == Compute.DYNAMIC and node.op_type == "LSTM":
            dynamic.write_lstm(
                self.model, node, self.rounding, safe=safe, granularity=planned.granularity
            )
        elif planned.compute == Compute.BLOCKS and self._blocks(node):
            return
        elif planned.compute in (Compute.DYNAMIC, Compute.BLOCKS):
            dynamic.write_matmul(self.model, node, planned.weight_storage, self.rounding, self.inputs, self.written, safe=safe,
                                 granularity=planned.granularity,
                                 factors=self._factors(graph.value(node.inputs[0])))  # fmt: skip
        elif planned.compute == Compute.STATIC:
            self._static(node, planned, safe=safe)
        elif node.op_type == "Gather":
            self._gather(node, planned)
        else:
            for position in RULES[node.op_type].weights:
                if position < len(node.inputs) and graph.is_float_weight(node.inputs[position]):
                    self._weight_only(node, planned, position)

    def _factors(self, x: ir.Value) -> NDArray[np.float32] | None:
        """What eases the tensor for all dynamic nodes that read it, None if the plan does not."""
        treatment = self.plan.outliers.get(str(x.name))
        if treatment is None:
            return None
        if x not in self.factors:
            if self.stats is None or x.name not in self.stats.means:
                raise ModelError(
                    "treating outliers needs calibration", str(x.name), "Give calibration data"
                )
            weights = weights_reading(self.model, str(x.name), self.dynamic)
            self.factors[x] = treatment_factors(
                treatment, self.stats.means[str(x.name)].max_abs, weights
            )
        return self.factors[x]

    def _static(self, node: ir.Node, planned: NodePlan, *, safe: bool) -> None:
        """int8 weight behind a DequantizeLinear, int32 bias on the grid of the products."""
        weight, position = graph.value(node.inputs[1]), RULES[node.op_type].bias
        axis = channel_axis(node, weight)
        channels = graph.shape_of(weight)[axis]
        old = (
            node.inputs[position] if position is not None and len(node.inputs) > position else None
        )
        bias = flat_bias(old, channels)
        x_scale = float(self.params[self.plan.activations[graph.name_of(node.inputs[0])]].scale)
        floor = np.abs(bias) / (BIAS_MAX * x_scale) if bias is not None else 0.0
        rounded = self.rounding.integers(
            node, weight, planned.weight_storage, safe=safe, floor=floor
        )
        key = ("static", rounded.integers)
        if key not in self.written:
            write = Writer(self.model, self.model.graph[0])
            self.written[key] = emit.write_dequantized(write, str(weight.name), rounded, axis)
        if position is not None and (old is None or bias is not None):
            bias = self.rounding.bias(node, bias, weight, rounded)
            if bias is not None:
                scale = (x_scale * rounded.integers.scale.astype(np.float64)).astype(np.float32)
                q = np.clip(np.rint(bias / scale.astype(np.float64)), -INT32_MAX, INT32_MAX).astype(
                    np.int32
                )
                name = str(old.name) if old is not None else f"{node.name}_bias"
                zero, write = np.zeros(scale.shape, np.int32), Writer(self.model, node)
                if self.folds and len(q) >= SHORT_BIAS:
                    value = emit.write_bias(
                        write,
                        name,
                        q * scale.astype(float),
                        x_scale,
                        self.written[key],
                        0 if scale.ndim else None,
                    )
                else:
                    value = emit.write_qdq(write, name, q, scale, zero, 0 if scale.ndim else None)
                graph.set_input(node, position, value)
        node.replace_input_with(1, self.written[key])

    def _blocks(self, node: ir.Node) -> bool:
        """Weights that stay in 4 bits, in an operator of onnxruntime's own; False if it does not take their blocks."""
        weight, position = graph.value(node.inputs[1]), RULES[node.op_type].bias
        rounded = self.rounding.integers(node, weight, Storage.INT4)
        if not dynamic.takes_blocks(rounded):
            return False
        bias = None
        if position is not None:
            old = node.inputs[position] if len(node.inputs) > position else None
            bias = self.rounding.bias(
                node, flat_bias(old, len(rounded.integers.q)), weight, rounded
            )
        dynamic.write_blocks(self.model, node, rounded, bias, self.written)
        return True

    def _weight_only(self, node: ir.Node, planned: NodePlan, position: int) -> None:
        """Float again when the session has loaded, or behind the standard DequantizeLinear."""
        weight, config = graph.value(node.inputs[position]), self.plan.config
        key: tuple[Any, ...] = (
            "float",
            weight,
            node.graph,
            planned.storage,
            layout_of(node, len(graph.shape_of(weight))),
        )
        first = Writer(self.model, next(iter(graph.home(node))))
        if config.runtime == "qdq" or not config.symmetric or not self.target.is_onnxruntime:
            if key not in self.written:
                parts = self.rounding.standard(node, weight, planned.weight_storage.bits)
                self.written[key] = emit.write_qdq(first, str(weight.name), *parts)
        else:
            rounded = self.rounding.integers(node, weight, planned.weight_storage)
            if key not in self.written:
                self.written[key] = emit.write_folded(first, str(weight.name), rounded)
            bias = RULES[node.op_type].bias
            if bias is not None:
                old = node.inputs[bias] if len(node.inputs) > bias else None
                flat = flat_bias(old, len(rounded.integers.q))
                corrected = (
                    self.rounding.bias(node, flat, weight, rounded)
                    if old is None or flat is not None
                    else None
                )
                if corrected is not None and corrected is not flat:
                    name = f"{node.name}_bias" if old is None else f"{old.name}_corrected"
                    graph.set_input(node, bias, first.constant(name, corrected.astype(np.float32)))
        node.replace_input_with(position, self.written[key])

    def _half(self, node: ir.Node) -> None:
        """float16 in the file, float32 when the session has loaded; rows of a table when they are picked."""
        weights = [(i, graph.value(node.inputs[i])) for i in RULES[node.op_type].weights
                   if i < len(node.inputs) and graph.is_float_weight(node.inputs[i])]  # fmt: skip
        for position, weight in weights:
            halved = self._halved(weight, graph.home(node))
            if node.op_type == "Gather":
                graph.replace_value(
                    node.outputs[0], emit.write_half_rows(Writer(self.model, node), halved, node)
                )
            else:
                node.replace_input_with(position, halved)

    def _halved(self, value: ir.Value, home: ir.Graph) -> ir.Value:
        key = (HALF, value, home)
        if key not in self.written:
            first = Writer(self.model, next(iter(home)))
            self.written[key] = emit.write_half(first, str(value.name), graph.array(value))
        found: ir.Value = self.written[key]
        return found

    def halves(self) -> None:
        """Rule 5."""
        for g in graph.graphs_of(self.model):
            for name in [n for n in g.initializers if self.plan.constants.get(n) == HALF]:
                for use in list(g.initializers[name].uses()):
                    use.node.replace_input_with(use.idx, self._halved(g.initializers[name], g))
        graph.drop_unused(self.model)

    def _gather(self, node: ir.Node, planned: NodePlan) -> None:
        """A table whose rows are scaled after they are picked."""
        table = graph.value(node.inputs[0])
        rounded = self._tied(table, planned) or self.rounding.table(
            node, table, planned.weight_storage
        )
        rows = emit.write_rows(Writer(self.model, node), graph.name_of(table), rounded, node)
        graph.replace_value(node.outputs[0], rows)

    def _tied(self, table: ir.Value, planned: NodePlan) -> Rounded | None:
        """The integers of the MatMul or Gemm whose weight is this table, rows as output channels: stored once."""
        for other in self.plan.nodes:
            # one scale serves a product, not the rows of a table
            coarse = self.plan.config.per_channel and other.granularity == PerTensor()
            if (
                other.op_type in ("MatMul", "Gemm")
                and other.storage == planned.storage
                and not coarse
            ):
                node = self.nodes[other.node]
                weight = graph.value(node.inputs[1])
                layout = layout_of(node, len(graph.shape_of(weight)))
                if layout.moved_shape(graph.shape_of(weight)) != graph.shape_of(table):
                    continue
                if weight is table or np.array_equal(
                    layout.matrix(graph.array(weight)), graph.array(table)
                ):
                    safe = self.target.saturates and other.compute != Compute.FLOAT
                    found = self.rounding.integers(node, weight, other.weight_storage, safe=safe)
                    if other.storage is not Storage.INT4 or dynamic.takes_blocks(found):
                        return replace(found, layout=TABLES[0], shape=graph.shape_of(table))
        return None
