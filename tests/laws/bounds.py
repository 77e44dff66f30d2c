"""How far the outputs of a quantized model may be from float's, by its scales alone.

Every value of the float model is computed node by node, and beside it a bound of its error:

1. A rounded weight is at most half a step from itself, a quantized activation at most one.
2. Operators that add up products of positive numbers when their operands are positive pass errors
   on as f(|x| + e) - f(|x|): MatMul, Conv, Add, pools, and all that only move values.
3. Other operators by the largest slope that they have.
4. An operator without a rule may do anything: inf.
5. onnxruntime quantizes ahead of nodes that only move values, also where an output lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper, numpy_helper

from quant_core.model import graph
from quant_core.plan.operators import RULES, weight_layout
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage

ROUNDING = 2e-5  # of float32 sums, relative to the sum of magnitudes
# Of rows of zeros, whose scale is 1: MatMulNBits subtracts 128 times the sum of x from itself, and
# either product is rounded to float32.
NO_WEIGHT = 2 * 128 * 2.0**-23
BIAS_STEP = 2.0**-14  # of an int32 bias that is kept in fewer bits
Bounded = tuple[np.ndarray, np.ndarray]  # values, and bounds of their errors

POSITIVE = frozenset(
    [
        "Add",
        "Mul",
        "MatMul",
        "Gemm",
        "Conv",
        "ConvTranspose",
        "Sum",
        "ReduceSum",
        "ReduceMean",
        "AveragePool",
        "GlobalAveragePool",
        "Concat",
        "Transpose",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Expand",
        "Tile",
        "Pad",
        "Identity",
        "Cast",
        "Resize",
        "Upsample",
    ]
)
PASSED = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"})  # 5.
LARGEST = frozenset({"MaxPool", "GlobalMaxPool", "ReduceMax", "Max"})
# Operator -> its largest slope, from its attributes.
SLOPES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "Relu": lambda _: 1.0,
    "Tanh": lambda _: 1.0,
    "Neg": lambda _: 1.0,
    "Abs": lambda _: 1.0,
    "Clip": lambda _: 1.0,
    "Sigmoid": lambda _: 0.25,
    "LeakyRelu": lambda a: max(1.0, abs(a.get("alpha", 0.01))),
    "HardSigmoid": lambda a: abs(a.get("alpha", 0.2)),
    "Softmax": lambda _: 0.5,
}


def output_bounds(
    model: ir.Model, plan: QuantPlan, feed: Mapping[str, np.ndarray]
) -> list[Bounded]:
    """The float model's outputs, each with the bound of its error under the plan."""
    walk = _Walk(plan, _weight_errors(model, plan), model.graph.opset_imports)
    known = {name: _exact(array) for name, array in feed.items()}
    return walk.graph(ir.to_proto(model).graph, known)


def _exact(array: np.ndarray) -> Bounded:
    return array, np.zeros(array.shape, np.float64)


def _weight_errors(model: ir.Model, plan: QuantPlan) -> dict[str, np.ndarray]:
    """For each weight the largest error of its elements, whoever reads it."""
    nodes = {str(n.name): n for n in graph.nodes_of(model)}
    found: dict[str, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {}
    for planned in plan.nodes:
        for value in nodes[planned.node].inputs:
            if planned.storage is not None and value is not None and value.name in planned.weights:
                errors = _rounding_errors(nodes[planned.node], value, planned)
                name = str(value.name)
                arrays[name] = np.asarray(graph.array(value))
                found[name] = np.maximum(errors, found.get(name, 0.0))
    for name, other in permutations(arrays, 2):  # a table and its copy are stored once
        if arrays[name].ndim == 2 and np.array_equal(arrays[name], arrays[other].T):
            found[name] = np.maximum(found[name], found[other].T)
    return found


def _rounding_errors(node: ir.Node, weight: ir.Value, planned: NodePlan) -> np.ndarray:
    """Half a step of each row's scale, as it follows from the row's largest weight, or of float16.

    Twice the step, and one step more, where pairs are made safe. In 4 bits a block may clip one
    weight if the squares of all errors together are smaller for it.
    """
    layout, array = weight_layout(node, weight), np.asarray(graph.array(weight), np.float64)
    if planned.storage is Storage.FLOAT32:
        return np.zeros(array.shape)
    if planned.storage is Storage.FLOAT16:
        return np.abs(array) * 2.0**-11 + 2.0**-25
    matrix = np.abs(layout.matrix(array))
    rows = matrix.max(1, keepdims=True, initial=0.0)
    if RULES[planned.op_type].is_table:  # which has a scale per row or per column
        rows = np.maximum(rows, matrix.max(0, keepdims=True, initial=0.0))
    if planned.to_dict()["granularity"] in ("tensor", "both axes"):
        rows = np.full_like(rows, rows.max(initial=0.0))
    if planned.weight_storage.bits == 8:
        steps = 3.0 * 2 * 1.01 if planned.pair_safe else 0.5
        rows = rows * steps / 127
    else:
        rows = rows / 7 * (np.sqrt(32) / 2 + (2 if planned.pair_safe else 0)) * 1.02
    rows = np.where(rows > 0, rows, NO_WEIGHT)
    wide = np.broadcast_to(rows, matrix.shape)
    return layout.tensor(wide, array.shape).reshape(array.shape)


@dataclass
class _Walk:
    """The walk through a model: what its plan says of nodes and tensors."""

    plan: QuantPlan
    weight_errors: Mapping[str, np.ndarray]
    opsets: Mapping[str, int]
    planned: dict[str, NodePlan] = field(init=False)
    ranges: dict[str, float] = field(default_factory=dict)  # of quantized tensors: step

    def __post_init__(self) -> None:
        self.planned = {n.node: n for n in self.plan.nodes}

    def graph(self, proto: onnx.GraphProto, known: dict[str, Bounded]) -> list[Bounded]:
        known = dict(known)
        for tensor in proto.initializer:
            array = numpy_helper.to_array(tensor)
            errors = self.weight_errors.get(tensor.name)
            known[tensor.name] = _exact(array) if errors is None else (array, errors)
        for name in list(known):
            known[name] = self.quantized(name, known[name])
        for node in proto.node:
            for name, value in zip(node.output, self.node(node, known), strict=True):
                if name:
                    known[name] = self.quantized(name, value)
        return [self.output(proto, info.name, known[info.name]) for info in proto.output]

    def output(self, proto: onnx.GraphProto, name: str, value: Bounded) -> Bounded:
        """The value with a step of what is quantized behind nodes that only move it (rule 5)."""
        x, e = value
        moved = [n.output[0] for n in proto.node if n.op_type in PASSED and name == n.input[0]]
        sources = [self.plan.activations.get(other) for other in moved]
        largest = max((self.ranges[source] for source in sources if source), default=0.0)
        behind = [self.output(proto, other, (x, e))[1] for other in moved]
        return x, np.maximum.reduce([e + largest, *behind])

    def quantized(self, name: str, value: Bounded) -> Bounded:
        """The value with the step of its quantization, if the plan quantizes it."""
        source = self.plan.activations.get(name)
        x, e = value
        if source is None:
            return value
        if source == name:
            self.ranges[name] = float(max(x.max(initial=0.0), 0) - min(x.min(initial=0.0), 0)) / 255
        return x, e + self.ranges[source]

    def node(self, node: onnx.NodeProto, known: Mapping[str, Bounded]) -> list[Bounded]:
        inner = {"If": self.branch, "Loop": self.loop, "Scan": self.scan}.get(node.op_type)
        if inner is not None:
            return inner(node, known)
        read = [known[name] if name else None for name in node.input]
        values = self.run(node, [x if x is None else x[0] for x in read])
        planned = self.planned.get(node.name)
        seen = [self.operand(planned, position, read) for position in range(len(read))]
        errors = self.errors(node, seen, values)
        return list(zip(values, errors, strict=True))

    def errors(
        self, node: onnx.NodeProto, read: list[Bounded | None], values: list[np.ndarray]
    ) -> list[np.ndarray]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = [x for x in read if x is not None and x[0].dtype.kind == "f"]
        op_type = "Add" if node.op_type == "Sub" else node.op_type
        if not any(e.any() for _, e in inputs):
            return [ROUNDING * np.abs(v) if v.dtype.kind == "f" else np.zeros(v.shape)
                    for v in values]  # fmt: skip
        if not all(np.isfinite(e).all() for _, e in inputs):
            return [np.full(v.shape, np.inf) for v in values]
        if op_type == "Resize" and attributes.get("mode") == b"cubic":
            return [np.full(v.shape, 4 * inputs[0][1].max(initial=0.0)) for v in values]
        if op_type in POSITIVE:
            absolute = partial(self.run, node if op_type == node.op_type else _as(node, op_type))
            alone = absolute([_magnitude(x, 0.0) for x in read])
            both = absolute([_magnitude(x, 1.0) for x in read])
            return [
                b.astype(np.float64) - a + ROUNDING * b for a, b in zip(alone, both, strict=True)
            ]
        if op_type in LARGEST:
            error = self.run(node, [_error_alone(x) for x in read])
            return [error[0] * (1 + ROUNDING), *(np.zeros(v.shape) for v in values[1:])]
        e, others = inputs[0][1], inputs[1:]
        slack = ROUNDING * np.abs(values[0])
        if op_type == "Softmax":
            axis = attributes.get("axis", -1)
            return [0.5 * e.max(axis, keepdims=True, initial=0.0) + np.zeros(e.shape) + slack]
        if op_type in SLOPES:
            return [SLOPES[op_type](attributes) * e + slack]
        if op_type == "PRelu":
            slopes = np.maximum(1, np.abs(others[0][0]))
            return [slopes * e + slack]
        if op_type == "Div" and not others[0][1].any():
            return [e / np.abs(others[0][0]) + slack]
        if op_type == "BatchNormalization":
            scale, _, _, variance = (c for c, _ in others)
            factor = np.abs(scale) / np.sqrt(variance + attributes.get("epsilon", 1e-5))
            return [
                factor.reshape(-1, *[1] * (e.ndim - 2)) * e + ROUNDING * (np.abs(values[0]) + 1)
            ]
        return [np.full(v.shape, np.inf) for v in values]  # 4.

    def operand(
        self, planned: NodePlan | None, position: int, read: list[Bounded | None]
    ) -> Bounded | None:
        """An operand as the node reads it: quantized at run time, or a bias in int32.

        DequantizeLinear -> MatMul of a weight becomes MatMulNBits, which rounds its input too.
        """
        value = read[position]
        if planned is None or value is None or not planned.is_rounded:
            return value
        x, e = value
        is_product = planned.op_type in ("MatMul", "Gemm")
        blocks = planned.compute is Compute.BLOCKS or self.plan.config.runtime == "qdq"
        if position == 0 and planned.compute is Compute.DYNAMIC:
            lo, hi = (x - e).min(initial=0.0), (x + e).max(initial=0.0)
            return x, e + (hi - lo) / 255
        if position == 0 and is_product and blocks:
            return x, e + (np.abs(x) + e).max(initial=0.0) / 127
        if position == 2 and planned.compute is Compute.STATIC:
            largest = [(np.abs(v[0]) + v[1]).max(initial=0.0) for v in read[:2] if v is not None]
            return x, e + np.abs(x) * BIAS_STEP + np.prod(largest) / 127**2
        return value

    def run(self, node: onnx.NodeProto, inputs: list[np.ndarray | None]) -> list[np.ndarray]:
        """What onnxruntime computes for this node alone."""
        names = [name if x is not None else "" for name, x in zip(node.input, inputs, strict=True)]
        given = {n: x for n, x in zip(names, inputs, strict=True) if n and x is not None}
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        one = helper.make_graph([node], "one", infos, outputs)
        imports = [helper.make_opsetid(domain, v) for domain, v in self.opsets.items()]
        model = helper.make_model(one, opset_imports=imports)
        model.ir_version = 10
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(model.SerializeToString(), options)
        made = iter(session.run(None, given))
        return [next(made) if name else np.zeros(0) for name in node.output]

    def branch(self, node: onnx.NodeProto, known: Mapping[str, Bounded]) -> list[Bounded]:
        graphs = {a.name: a.g for a in node.attribute}
        is_taken = bool(known[node.input[0]][0])
        return self.graph(graphs["then_branch" if is_taken else "else_branch"], dict(known))

    def loop(self, node: onnx.NodeProto, known: Mapping[str, Bounded]) -> list[Bounded]:
        body = next(a.g for a in node.attribute if a.name == "body")
        states = [known[name] for name in node.input[2:]]
        for i in range(int(known[node.input[0]][0])):
            first = [_exact(np.array(i)), _exact(np.array(True))]
            names = [info.name for info in body.input]
            given = dict(zip(names, [*first, *states], strict=True))
            _, *states = self.graph(body, {**known, **given})
        return states

    def scan(self, node: onnx.NodeProto, known: Mapping[str, Bounded]) -> list[Bounded]:
        """A Scan over axis 1 with one input and one output."""
        body = next(a.g for a in node.attribute if a.name == "body")
        *states, (x, e) = (known[name] for name in node.input)
        rows = []
        for i in range(x.shape[1]):
            names = [info.name for info in body.input]
            given = dict(zip(names, [*states, (x[:, i], e[:, i])], strict=True))
            *states, row = self.graph(body, {**known, **given})
            rows.append(row)
        return [*states, tuple(np.stack(part, axis=1) for part in zip(*rows, strict=True))]


def _magnitude(value: Bounded | None, share: float) -> np.ndarray | None:
    """|x| + share e, of floats; other operands as they are."""
    if value is None or value[0].dtype.kind != "f":
        return None if value is None else value[0]
    x, e = value
    return np.asarray(np.abs(x) + share * e, x.dtype)


def _error_alone(value: Bounded | None) -> np.ndarray | None:
    """e, of floats; other operands as they are."""
    if value is None or value[0].dtype.kind != "f":
        return None if value is None else value[0]
    return value[1].astype(value[0].dtype)


def _as(node: onnx.NodeProto, op_type: str) -> onnx.NodeProto:
    other = onnx.NodeProto()
    other.CopyFrom(node)
    other.op_type = op_type
    return other
