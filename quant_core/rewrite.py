"""How a plan and what calibration measured become a quantized model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from quant_core import graph, store
from quant_core.affine import Grid, QuantParams, choose_params, dequantize, quantize, range_of
from quant_core.correct import corrected_bias
from quant_core.errors import ModelError
from quant_core.gptq import gptq_int4, gptq_int8
from quant_core.observe import Statistics
from quant_core.plan import DYNAMIC, FLOAT, STATIC, NodePlan, QuantPlan, capped_output, data_inputs
from quant_core.prepare import OPSET_INT4, raise_opset
from quant_core.rules import RULES, channel_axis, is_depthwise
from quant_core.store import Writer
from quant_core.targets import TARGETS
from quant_core.weights import IntegerWeight, Layout, block_width, layout_of, quantize_int4, quantize_int8

BIAS_MAX = 2**30  # half of what int32 holds: the sum of products needs room as well
QDQ_BITS_OPSET = {"int8": 13, "int4": OPSET_INT4}


def apply_plan(model: ir.Model, plan: QuantPlan, stats: Statistics | None) -> ir.Model:
    """The quantized model; `model` is not changed.

    1. Every activation of the plan gets one QuantizeLinear and one DequantizeLinear. Where a static node writes it,
       all readers read the rounded tensor (else the node would not fuse); otherwise only static readers do.
    2. Every planned weight is replaced by its integers and the nodes that bring them back (store.py).
    3. A bias of a static Conv or Gemm becomes int32 with scale x_scale * w_scale, corrected for what rounding the
       weight adds to each channel's mean.
    4. Dynamic MatMul, Gemm and LSTM quantize their input at run time.

    Raises: ModelError if the plan names tensors that the statistics or the model lack.
    """
    bits4 = any(n.storage == "int4" for n in plan.nodes)
    copy = model.clone()
    if bits4 and graph.opset(copy) < OPSET_INT4:
        copy = graph.normalize(raise_opset(copy, OPSET_INT4))
    rewrite = _Rewrite(copy, plan, stats)
    nodes = {n.name: n for g in graph.graphs_of(copy) for n in g}
    missing = [n.node for n in plan.nodes if n.node not in nodes]
    if missing:
        raise ModelError(f"the plan names nodes that the model lacks: {', '.join(missing[:3])}", hint="Plan this model anew")
    for planned in plan.nodes:
        rewrite.weights(nodes[planned.node], planned)
    rewrite.activations([nodes[n.node] for n in plan.nodes if n.compute == STATIC])
    graph.drop_unused(copy)
    passes.RemoveUnusedOpsetsPass()(copy)
    for domain in {n.domain for g in graph.graphs_of(copy) for n in g if n.domain}:
        copy.graph.opset_imports.setdefault(domain, 1)
    copy.producer_name = "quantmill"
    return copy


def weight_sqnr(model: ir.Model) -> dict[str, float]:
    """Node -> signal to rounding noise of its worst weight in dB, in a model that `apply_plan` made."""
    return dict(model.meta.get("weight_sqnr", {}))


class _Rewrite:
    """The private copy that is being edited, and what was already written into it."""

    def __init__(self, model: ir.Model, plan: QuantPlan, stats: Statistics | None) -> None:
        self.model, self.plan, self.stats = model, plan, stats
        self.config, self.target = plan.config, TARGETS[plan.target]
        self.grid = Grid(8, self.target.activation_signed, symmetric=False)
        self.params = {t: self._params(t) for t in dict.fromkeys(plan.activations.values())}
        self.written: dict[tuple[Any, ...], Any] = {}

    def _params(self, tensor: str) -> QuantParams:
        if self.stats is None:
            raise ModelError("static quantization needs calibration", tensor, "Give calibration data, or mode dynamic")
        lo, hi = self.stats.range(tensor, self.grid, self.config.method, self.config.percentile)
        return choose_params(lo, hi, self.grid)

    def activations(self, static: list[ir.Node]) -> None:
        """Rule 1."""
        values = {v.name: v for v in _values(self.model.graph)}
        readers = {n for n in static}
        writers = {capped_output(n) for n in static if _requantizes(n, self.plan)}
        for tensor, root in self.plan.activations.items():
            value = values.get(tensor)
            if value is None:
                raise ModelError(f"the plan names tensor {tensor}, which the model lacks", hint="Plan this model anew")
            self._quantize(value, self.params[root], None if value in writers else readers)
        for node in static:
            for i, value in enumerate(node.inputs):
                if RULES[node.op_type].kind == "elementwise" and graph.is_constant(value):
                    assert value is not None
                    node.replace_input_with(i, self._quantized_constant(node, value))

    def _quantize(self, value: ir.Value, params: QuantParams, readers: set[ir.Node] | None) -> None:
        """A Q/DQ pair behind the value, read by all (None) or by these readers at their data inputs."""
        uses = [u for u in value.uses() if readers is None or (u.node in readers and value in data_inputs(u.node))]
        output, producer, name = value.is_graph_output() and readers is None, value.producer(), str(value.name)
        if output:
            value.name = f"{name}_float"
        write = Writer(self.model, None)
        scale = write.constant(f"{name}_scale", params.scale)
        zero = write.constant(f"{name}_zero_point", params.zero_point)
        q = write.node("QuantizeLinear", [value, scale, zero], f"{name}_quantized")
        dq = write.node("DequantizeLinear", [q, scale, zero], f"{name}_dequantized")
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], write.waiting)
        else:
            self.model.graph.insert_after(producer, write.waiting)
        for use in uses:
            use.node.replace_input_with(use.idx, dq)
        if output:
            dq.name, dq.type, dq.shape = name, value.type, value.shape
            self.model.graph.outputs[list(self.model.graph.outputs).index(value)] = dq

    def _quantized_constant(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """A constant operand of an elementwise operator, on the grid of activations."""
        array = np.asarray(graph.constant(value), np.float32)
        params = choose_params(array.min(initial=0.0), array.max(initial=0.0), self.grid)
        write = Writer(self.model, node)
        name = str(value.name)
        return store.write_qdq(write, name, quantize(array, params), params.scale, params.zero_point, None, None)

    def weights(self, node: ir.Node, planned: NodePlan) -> None:
        """Rules 2 to 4."""
        if planned.storage in ("", "float32"):
            return
        rule = RULES[node.op_type]
        positions = [i for i in rule.weights if i < len(node.inputs) and graph.is_float_weight(node.inputs[i])]
        if planned.compute == DYNAMIC and node.op_type == "LSTM":
            self._dynamic_lstm(node, planned)
        elif planned.compute == DYNAMIC:
            self._dynamic_matmul(node, planned)
        elif planned.compute == STATIC:
            self._static(node, planned, positions[0])
        elif node.op_type == "Gather":
            self._gather(node, planned)
        else:
            for position in positions:
                self._weight_only(node, planned, position)

    def _integers(self, node: ir.Node, position: int, planned: NodePlan, *, safe: bool, floor: Any = 0.0) -> tuple[IntegerWeight, Layout]:
        """The integers of a weight, worked out once for all nodes that share it."""
        value = node.inputs[position]
        assert value is not None
        array = np.asarray(graph.constant(value), np.float32)
        layout = layout_of(node, array.ndim)
        rows = layout.matrix(array)
        needed = np.any(np.asarray(floor) > np.abs(rows).max(1, initial=0.0) / 127)
        config = self.config
        key = (value.name, layout, planned.storage, safe, float(np.max(floor)) if needed else 0.0,
               config.per_channel, config.weight_method, config.block_size)  # fmt: skip
        memo = self.stats.memo if self.stats is not None else self.written
        if key not in memo:
            found = self._round(rows, planned.storage, self._gram(node), safe, floor)
            memo[key] = found, _sqnr_db(rows, found.values)
        sqnr = self.model.meta.setdefault("weight_sqnr", {})
        sqnr[node.name] = min(memo[key][1], sqnr.get(node.name, np.inf))
        return memo[key][0], layout

    def _gram(self, node: ir.Node) -> NDArray[Any] | None:
        if self.stats is None or self.config.weight_method not in ("auto", "gptq"):
            return None
        return self.stats.grams.get(str(node.name))

    def _round(self, rows: NDArray[Any], storage: str, gram: NDArray[Any] | None, safe: bool, floor: Any) -> IntegerWeight:
        """The integers of a weight; by GPTQ where calibration knows how the inputs vary."""
        per_channel, method = self.config.per_channel, self.config.weight_method
        if storage == "int4":
            block = block_width(rows.shape[1], self.config.block_size)
            if gram is None:
                return quantize_int4(rows, block, safe=safe, floor=floor)
            return gptq_int4(rows, gram, block, safe=safe, floor=floor)
        if gram is None:
            return quantize_int8(rows, per_channel=per_channel, safe=safe, floor=floor, method=method)
        return gptq_int8(rows, gram, per_channel=per_channel, safe=safe, floor=floor)

    def _static(self, node: ir.Node, planned: NodePlan, position: int) -> None:
        weight = node.inputs[position]
        assert weight is not None
        shape = tuple(weight.shape.numpy())  # type: ignore[union-attr]
        x_params = self.params[self.plan.activations[str(node.inputs[0].name)]]  # type: ignore[union-attr]
        rule = RULES[node.op_type]
        bias_value = node.inputs[rule.bias] if rule.bias is not None and len(node.inputs) > rule.bias else None
        channels = shape[channel_axis(node, weight)]
        bias = _flat_bias(bias_value, channels)
        safe = self.target.saturates and not is_depthwise(node)
        floor = np.abs(bias) / (BIAS_MAX * float(x_params.scale)) if bias is not None else 0.0
        found, layout = self._integers(node, position, planned, safe=safe, floor=floor)
        write, axis = Writer(self.model, node), channel_axis(node, weight)
        if ("static", found) not in self.written:
            first = Writer(self.model, self.model.graph[0])
            self.written["static", found] = store.write_dequantized(first, str(weight.name), found, layout, shape, axis)
        if rule.bias is not None and (bias_value is None or bias is not None):
            bias = self._corrected(node, bias, layout.matrix(np.asarray(graph.constant(weight), np.float32)), found.values, channels)
            if bias is not None:
                if len(node.inputs) <= rule.bias:
                    node.resize_inputs(rule.bias + 1)
                scale = (x_params.scale.astype(np.float64) * found.scale).astype(np.float32)
                q = np.clip(np.rint(bias / scale.astype(np.float64)), -(2**31) + 1, 2**31 - 1).astype(np.int32)
                zero = np.zeros(scale.shape, np.int32)
                name = str(bias_value.name) if bias_value is not None else f"{node.name}_bias"
                q_axis = 0 if scale.ndim else None
                node.replace_input_with(rule.bias, store.write_qdq(write, name, q, scale, zero, q_axis, None))
        node.replace_input_with(position, self.written["static", found])

    def _corrected(
        self, node: ir.Node, bias: NDArray[Any] | None, rows: NDArray[Any], rounded: NDArray[Any], channels: int
    ) -> NDArray[Any] | None:
        """The bias plus what rounding the weight took from each channel's mean; None if there is neither."""
        means = self.stats.means.get(str(node.inputs[0].name)) if self.stats is not None else None  # type: ignore[union-attr]
        if not self.config.bias_correction or means is None:
            return bias
        return corrected_bias(np.zeros(channels) if bias is None else bias, rows, rounded, means.mean, node)

    def _weight_only(self, node: ir.Node, planned: NodePlan, position: int) -> None:
        weight = node.inputs[position]
        assert weight is not None
        shape = tuple(weight.shape.numpy())  # type: ignore[union-attr]
        key = ("float", weight, node.graph, planned.storage)
        if key not in self.written:
            write = Writer(self.model, next(iter(node.graph)))  # type: ignore[arg-type]
            if self.config.runtime == "qdq" or not self.config.symmetric:
                self.written[key] = self._standard(write, node, planned, position, weight, shape)
            else:
                found, layout = self._integers(node, position, planned, safe=False)
                self.written[key] = (store.write_folded(write, str(weight.name), found, layout, shape), found.values)
        value, rounded = self.written[key]
        rule, channels = RULES[node.op_type], shape[channel_axis(node, weight)]
        if rule.kind == "anchor" and rule.bias is not None:
            self._correct_float_bias(node, rule.bias, layout_of(node, len(shape)).matrix(graph.constant(weight)), rounded, channels)
        node.replace_input_with(position, value)

    def _correct_float_bias(self, node: ir.Node, position: int, rows: NDArray[Any], rounded: NDArray[Any], channels: int) -> None:
        old = node.inputs[position] if len(node.inputs) > position else None
        bias = _flat_bias(old, channels)
        corrected = self._corrected(node, bias, rows, rounded, channels) if old is None or bias is not None else bias
        if corrected is None or corrected is bias:
            return
        if len(node.inputs) <= position:
            node.resize_inputs(position + 1)
        name = f"{node.name}_bias" if old is None else f"{old.name}_corrected"
        node.replace_input_with(position, Writer(self.model, node).constant(name, corrected.astype(np.float32)))

    def _standard(
        self, write: Writer, node: ir.Node, planned: NodePlan, position: int, weight: ir.Value, shape: tuple[int, ...]
    ) -> tuple[ir.Value, NDArray[Any]]:
        """The DequantizeLinear pattern that every runtime reads: per tensor, per channel, or 4 bits in blocks along K.

        Returns its output, and what the weight became as a matrix (C, K).
        """
        array = np.asarray(graph.constant(weight), np.float32)
        bits, symmetric = int(planned.storage[3:]), self.config.symmetric
        grid = Grid(bits, symmetric, symmetric)
        axis: int | None = channel_axis(node, weight) if self.config.per_channel else None
        block = None
        if bits == 4 and node.op_type in ("MatMul", "Gemm"):
            axis = 1 - channel_axis(node, weight) if len(shape) == 2 else len(shape) - 2
            block = self.config.block_size if shape[axis] % self.config.block_size == 0 else shape[axis]
        params = choose_params(*range_of(array, axis, block), grid, axis, block)
        q = quantize(array, params)
        value = store.write_qdq(write, str(weight.name), q, params.scale, params.zero_point, axis, block)
        return value, layout_of(node, array.ndim).matrix(dequantize(q, params))

    def _gather(self, node: ir.Node, planned: NodePlan) -> None:
        weight, out = node.inputs[0], node.outputs[0]
        assert weight is not None
        shape = tuple(weight.shape.numpy())  # type: ignore[union-attr]
        planned8 = NodePlan(planned.node, planned.op_type, FLOAT, "int8")
        found, _ = self._integers(node, 0, planned8, safe=False)
        _take_over(out, store.write_rows(Writer(self.model, node), str(weight.name), found, node, shape))

    def _dynamic_matmul(self, node: ir.Node, planned: NodePlan) -> None:
        """DynamicQuantizeLinear, MatMulInteger, Cast, Mul (and Add): onnxruntime fuses them into one kernel."""
        x, weight, out = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and weight is not None
        found, layout = self._integers(node, 1, planned, safe=self.target.saturates)
        channels, columns = found.q.shape
        key = ("dynamic", weight, planned.storage)
        if key not in self.written:
            kn = Layout((1, 0)) if layout.perm == (0, 1) else layout  # MatMulInteger takes (K, N)
            write = Writer(self.model, next(iter(self.model.graph)))
            self.written[key] = (
                store.write_int8(write, str(weight.name), found, kn, (columns, channels)),
                write.constant(f"{weight.name}_scale", found.scale),
            )
        w_int8, w_scale = self.written[key]
        write = Writer(self.model, node)
        if ("input", x) not in self.written:
            names = [f"{x.name}_dynamic", f"{x.name}_dynamic_scale", f"{x.name}_dynamic_zero_point"]
            self.written["input", x] = write.nodes("DynamicQuantizeLinear", [x], names)
        x_q, x_scale, x_zero = self.written["input", x]
        product = write.node("MatMulInteger", [x_q, w_int8, x_zero], f"{node.name}_integer")
        cast = write.node("Cast", [product], f"{node.name}_cast", to=ir.DataType.FLOAT)
        scale = write.node("Mul", [x_scale, w_scale], f"{node.name}_scale")
        y = write.node("Mul", [cast, scale], f"{node.name}_scaled")
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            y = write.node("Add", [y, node.inputs[2]], f"{node.name}_biased")
        _take_over(out, y)

    def _dynamic_lstm(self, node: ir.Node, planned: NodePlan) -> None:
        """com.microsoft.DynamicQuantizeLSTM: W (D, K, 4H) and R (D, H, 4H) in int8, a scale per gate and unit (D, 4H)."""
        write = Writer(self.model, node)
        inputs = list(node.inputs) + [None] * (8 - len(node.inputs))
        extra: list[ir.Value | None] = []
        for i in (1, 2):
            value = node.inputs[i]
            assert value is not None
            directions, gates, columns = value.shape.numpy()  # type: ignore[union-attr]
            found, _ = self._integers(node, i, NodePlan(planned.node, planned.op_type, DYNAMIC, "int8"), safe=self.target.saturates)
            q = found.q.reshape(directions, gates, columns).transpose(0, 2, 1)
            scale = np.broadcast_to(found.scale, (directions * gates,)).reshape(directions, gates)
            inputs[i] = write.constant(f"{value.name}_int8", q)
            extra += [write.constant(f"{value.name}_scale", np.ascontiguousarray(scale)),
                      write.constant(f"{value.name}_zero_point", np.zeros((directions, gates), np.int8))]  # fmt: skip
        outputs = [ir.Value(name=write.free(f"{o.name}_lstm"), type=o.type, shape=o.shape) for o in node.outputs]
        attributes = [a for a in node.attributes.values() if a.name != "layout"]
        new = ir.Node(graph.MICROSOFT, "DynamicQuantizeLSTM", [*inputs, *extra], attributes, outputs=outputs, name=f"{node.name}_int8")
        node.graph.insert_before(node, new)  # type: ignore[union-attr]
        for old, fresh in zip(node.outputs, outputs, strict=True):
            _take_over(old, fresh)


def _sqnr_db(rows: NDArray[Any], rounded: NDArray[Any]) -> float:
    noise = float(np.square(rows - rounded, dtype=np.float64).sum())
    return 10 * float(np.log10(max(float(np.square(rows, dtype=np.float64).sum()), 1e-30) / noise)) if noise else 200.0


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Readers of `old`, and the graph output it may be, get `new`, under the old name."""
    name = old.name
    is_output = old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=is_output)
    new.type, new.shape = old.type, old.shape
    old.name = f"{name}_replaced"
    new.name = name


def _requantizes(node: ir.Node, plan: QuantPlan) -> bool:
    """Whether what the node writes is quantized at once, so that all readers must read the rounded tensor."""
    return str(capped_output(node).name) in plan.activations


def _values(of: ir.Graph) -> list[ir.Value]:
    return [*of.inputs, *(v for n in of for v in n.outputs)]


def _flat_bias(value: ir.Value | None, channels: int) -> NDArray[Any] | None:
    """The constant bias as float64 (channels,), None if it is absent, computed or of another shape."""
    found = graph.constant(value)
    if found is None:
        return None
    try:
        return np.asarray(np.broadcast_to(found.reshape(-1), (channels,)), np.float64)
    except ValueError:
        return None

