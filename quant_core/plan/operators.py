"""The table of operators: which inputs are data, weight and bias, and how each operator can be
quantized.

A new operator is a row of RULES (and a line of tests): planning, rounding and rewriting read this
table alone.

Source: onnxruntime's CPU kernels and its QDQ selectors; tests/facts holds each row against the
installed version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import onnx_ir as ir

from quant_core.model import graph
from quant_core.numerics.granularity import PerBlock
from quant_core.numerics.layout import Layout
from quant_core.plan import layouts, obstacles
from quant_core.plan.layouts import LayoutOf, is_left_weight
from quant_core.plan.types import Compute, NodePlan


class Kind(StrEnum):
    """What an operator is to a quantizer.

    ANCHOR       multiplies by a weight: worth quantizing for its own sake
    ELEMENTWISE  has a QLinear kernel, worth it between quantized neighbours only
    MOVES        only moves or picks values: runs on 8-bit data with the parameters of its input
    WEIGHT_ONLY  has no static integer kernel worth having; its weight can still be stored in fewer
                 bits
    """

    ANCHOR = "anchor"
    ELEMENTWISE = "elementwise"
    MOVES = "moves"
    WEIGHT_ONLY = "weight_only"


class DynamicPattern(StrEnum):
    """What is written for a node that computes dynamically (rewrite/emit_dynamic.py)."""

    MATMUL = "DynamicQuantizeLinear, MatMulInteger, Cast, Mul, Add"
    LSTM = "DynamicQuantizeLSTM"


@dataclass(frozen=True, slots=True)
class IntegerForm:
    """An operator that onnxruntime or another quantizer writes in place of a float one.

    weights  positions of its integer weights
    layout   of its weights, None where it is that of the float operator
    """

    weights: tuple[int, ...]
    layout: LayoutOf | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """How one operator can be quantized.

    kind             what it is to a quantizer
    data             positions of the inputs that carry activations; () means all of them
    weights          positions of the inputs that carry weights
    bias             position of the bias
    layout           (node, rank of the weight) -> how the weight becomes rows of output channels
    computes         in which ways it may compute, beside float; a 1x1 Conv that a search chose may
                     compute dynamically too (`is_pointwise`)
    dynamic_pattern  what is written where it computes dynamically
    needs_q          its static kernel fuses only if its output is quantized again; others may leave
                     integers at once
    is_table         its weight is a table of which rows are picked
    has_gram         Gram matrices of its inputs make sense: it multiplies rows by the weight
    absorbs_scale    its weight can take up a factor for each channel of its input (equalize.py)
    mean_axis        axis of its input's channels, by whose means its bias is corrected
    obstacle         node -> why that node has no integer kernel although its operator has one, or
                     ""
    integer_forms    operators that stand for it in files with integers, for the saturation check
    """

    kind: Kind
    data: tuple[int, ...] = (0,)
    weights: tuple[int, ...] = ()
    bias: int | None = None
    layout: LayoutOf | None = None
    computes: tuple[Compute, ...] = ()
    dynamic_pattern: DynamicPattern | None = None
    needs_q: bool = True
    is_table: bool = False
    has_gram: bool = False
    absorbs_scale: bool = False
    mean_axis: int = -1
    obstacle: Callable[[ir.Node], str] | None = None
    integer_forms: Mapping[str, IntegerForm] = field(default_factory=dict)

    @property
    def dynamic(self) -> bool:
        """Whether its activations may be quantized at run time, from each batch's own range."""
        return Compute.DYNAMIC in self.computes


_STATIC = (Compute.STATIC,)
_ANY = (Compute.STATIC, Compute.DYNAMIC, Compute.BLOCKS)
_RECURRENT = Operator(Kind.WEIGHT_ONLY, weights=(1, 2), layout=layouts.recurrent)
_ELEMENTWISE = Operator(Kind.ELEMENTWISE)
_MOVES = Operator(Kind.MOVES)

RULES: dict[str, Operator] = {
    "Conv": Operator(
        Kind.ANCHOR,
        weights=(1,),
        bias=2,
        layout=layouts.conv,
        computes=_STATIC,
        has_gram=True,
        absorbs_scale=True,
        mean_axis=1,
        obstacle=obstacles.conv,
        integer_forms={"ConvInteger": IntegerForm((1,)), "QLinearConv": IntegerForm((3,))},
    ),
    "Gemm": Operator(
        Kind.ANCHOR,
        weights=(1,),
        bias=2,
        layout=layouts.gemm,
        computes=_ANY,
        dynamic_pattern=DynamicPattern.MATMUL,
        needs_q=False,
        has_gram=True,
        absorbs_scale=True,
        obstacle=obstacles.gemm,
        integer_forms={"QGemm": IntegerForm((3,))},
    ),
    "MatMul": Operator(
        Kind.ANCHOR,
        weights=(1,),
        layout=layouts.matmul,
        computes=_ANY,
        dynamic_pattern=DynamicPattern.MATMUL,
        needs_q=False,
        has_gram=True,
        absorbs_scale=True,
        obstacle=obstacles.matmul,
        integer_forms={
            "MatMulInteger": IntegerForm((1,)),
            "QLinearMatMul": IntegerForm((3,)),
            "MatMulIntegerToFloat": IntegerForm((1,)),
            "DynamicQuantizeMatMul": IntegerForm((1,)),
        },
    ),
    "LSTM": Operator(
        Kind.WEIGHT_ONLY,
        weights=(1, 2),
        layout=layouts.recurrent,
        computes=(Compute.DYNAMIC,),
        dynamic_pattern=DynamicPattern.LSTM,
        obstacle=obstacles.lstm,
        integer_forms={"DynamicQuantizeLSTM": IntegerForm((1, 2), layouts.dynamic_lstm)},
    ),
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "ConvTranspose": Operator(Kind.WEIGHT_ONLY, weights=(1,), layout=layouts.transposed_conv),
    "Gather": Operator(
        Kind.WEIGHT_ONLY, data=(1,), weights=(0,), layout=layouts.table, is_table=True
    ),
    "Identity": Operator(  # of a weight that other operators carry (model/carried.py)
        Kind.WEIGHT_ONLY,
        weights=(0,),
        layout=layouts.carried,
        obstacle=obstacles.identity,
    ),
    "Add": Operator(Kind.ELEMENTWISE, data=(0, 1)),
    "Mul": Operator(Kind.ELEMENTWISE, data=(0, 1)),
    "Sigmoid": _ELEMENTWISE,
    "LeakyRelu": _ELEMENTWISE,
    "AveragePool": Operator(Kind.ELEMENTWISE, obstacle=obstacles.average_pool),
    "GlobalAveragePool": _ELEMENTWISE,
    "Concat": Operator(Kind.ELEMENTWISE, data=()),
    "MaxPool": Operator(Kind.MOVES, obstacle=obstacles.max_pool),
    "Reshape": _MOVES,
    "Transpose": _MOVES,
    "Squeeze": _MOVES,
    "Unsqueeze": _MOVES,
    "Flatten": _MOVES,
}
# The blocks of 4-bit weights that com.microsoft.MatMulNBits takes.
KERNEL_BLOCKS = tuple(PerBlock(size) for size in (16, 32, 64, 128, 256))
# Fused into the operator before them where the range of the quantized tensor makes them redundant.
CAPS = ("Relu", "Clip")


def rule_of(node: ir.Node) -> Operator | None:
    """The node's row; None for operators of other domains, whatever they are called."""
    return None if node.domain else RULES.get(node.op_type)


def layout_of(node: ir.Node, rank: int) -> Layout:
    """The layout of a weight of that rank of the node, whose operator is in the table or an integer
    form there.
    """
    if node.op_type in RULES:
        layout = RULES[node.op_type].layout
        assert layout is not None, f"{node.op_type} has no weight"
        return layout(node, rank)
    for operator in RULES.values():
        form = operator.integer_forms.get(node.op_type)
        if form is not None:
            layout = form.layout or operator.layout
            assert layout is not None
            return layout(node, rank)
    raise KeyError(node.op_type)


def weight_positions(node: ir.Node) -> tuple[int, ...]:
    """The positions of the node's inputs that carry weights; a MatMul may have its on the left."""
    return (0,) if is_left_weight(node) else RULES[node.op_type].weights


def has_weights(node: ir.Node) -> bool:
    """Whether the node has a constant float weight that can be quantized."""
    return rule_of(node) is not None and bool(float_weights(node))


def float_weights(node: ir.Node) -> list[ir.Value]:
    """The constant float weights of the node."""
    rule = RULES[node.op_type]
    values = [graph.input_at(node, i) for i in weight_positions(node)]
    found = [v for v in values if v is not None and graph.is_float_weight(v)]
    if not rule.is_table:
        return found
    are_rows = graph.attribute(node, "axis", 0) == 0
    return found if are_rows else []


def weight_layout(node: ir.Node, weight: ir.Value) -> Layout:
    """The layout of the node's constant weight."""
    return layout_of(node, len(graph.shape_of(weight)))


def channel_axis(node: ir.Node, weight: ir.Value) -> int:
    """The axis of the node's weight along which each slice makes one output channel."""
    return layout_of(node, len(weight.shape or ())).channel_axis


def multiplied_weights() -> dict[str, tuple[int, ...]]:
    """Operator that may multiply by integers, in the table or an integer form there -> positions of
    its weights.
    """
    found: dict[str, tuple[int, ...]] = {}
    for op_type, operator in RULES.items():
        if operator.kind is Kind.ANCHOR:
            found[op_type] = operator.weights
        found |= {name: form.weights for name, form in operator.integer_forms.items()}
    return found


def why_not_integer(node: ir.Node) -> str:
    """Why this node has no integer kernel although its operator has one; "" if it has one."""
    rule = rule_of(node)
    if rule is None:
        return ""
    if rule.kind is Kind.ANCHOR and graph.is_constant(node.inputs[0]) and not is_left_weight(node):
        return "a product of constants has no integer kernel"
    return rule.obstacle(node) if rule.obstacle is not None else ""


def mean_axis(node: ir.Node) -> int | None:
    """The axis of the channels of the node's input by whose means its bias is corrected.

    None if it is not corrected: calibration does not look at the inputs of such a node.
    """
    rule = RULES[node.op_type]
    if rule.kind is not Kind.ANCHOR or graph.is_constant(node.inputs[0]) or why_not_integer(node):
        return None
    return rule.mean_axis


def is_dynamic_product(planned: NodePlan) -> bool:
    """Whether the node is written as a product of integers whose input is quantized at run time."""
    is_lstm = RULES[planned.op_type].dynamic_pattern is DynamicPattern.LSTM
    return planned.compute is Compute.DYNAMIC and not is_lstm
