"""The table of operators: which inputs are data, weight and bias, and how each operator can be
quantized.

A new operator is a row of RULES (and a line of tests): planning, rounding and rewriting read this
table alone.

Source: onnxruntime's CPU kernels and its QDQ selectors; tests/facts holds each row against the
installed version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import onnx_ir as ir

from quant_core.model import graph
from quant_core.numerics.granularity import PerBlock
from quant_core.numerics.layout import Layout
from quant_core.plan.types import Compute, NodePlan

# Weights of a channel: with fewer, their scales would take more bytes than they save.
MIN_CARRIED_COLUMNS = 16

LayoutOf = Callable[[ir.Node, int], Layout]


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


# Layouts: which axes of a weight are output channels, and in which order the kernel adds the others


def _conv_layout(node: ir.Node, rank: int) -> Layout:
    """(O, I / groups, kernel...): the input channel varies fastest."""
    return Layout((0, *range(2, rank), 1))


def _transposed_conv_layout(node: ir.Node, rank: int) -> Layout:
    """(I, O / groups, kernel...): each group has output channels of its own."""
    groups = int(graph.attribute(node, "group", 1))
    if groups == 1:
        return Layout((1, 0, *range(2, rank)))
    return Layout((0, 2, 1, *range(3, rank + 1)), channel_dims=2, groups=groups)


def _matmul_layout(node: ir.Node, rank: int) -> Layout:
    """(..., K, N): each matrix of a stack has output channels of its own.

    On the left of the product a weight is (..., C, K).
    """
    if is_left_weight(node):
        return Layout(tuple(range(rank)), channel_dims=rank - 1)
    return Layout((*range(rank - 2), rank - 1, rank - 2), channel_dims=rank - 1)


def _gemm_layout(node: ir.Node, rank: int) -> Layout:
    """(K, N) or, with transB, (N, K)."""
    return Layout((0, 1)) if graph.attribute(node, "transB", 0) else _matmul_layout(node, rank)


def _carried_layout(node: ir.Node, rank: int) -> Layout:
    """(..., K, N), as of a MatMul, or rows along the first axis where its matrices are small."""
    shape = graph.shape_of(graph.value(node.inputs[0]))
    if shape[-2] < MIN_CARRIED_COLUMNS:
        return Layout(tuple(range(rank)))
    return Layout((*range(rank - 2), rank - 1, rank - 2), channel_dims=rank - 1)


def _recurrent_layout(node: ir.Node, rank: int) -> Layout:
    """(directions, gates * hidden, K)."""
    return Layout((0, 1, 2), channel_dims=2)


def _dynamic_lstm_layout(node: ir.Node, rank: int) -> Layout:
    """(directions, K, 4 * hidden)."""
    return Layout((0, 2, 1), channel_dims=2)


def _table_layout(node: ir.Node, rank: int) -> Layout:
    """(rows, ..., width): each row is a channel."""
    return Layout(tuple(range(rank)), channel_dims=rank - 1)


# Obstacles: why a node has no integer kernel although its operator has one


def _why_not_conv(node: ir.Node) -> str:
    bias = graph.input_at(node, 2)
    if bias is not None and not graph.is_constant(bias):
        return "a computed bias has no integer kernel"
    return ""


def _why_not_matmul(node: ir.Node) -> str:
    if is_left_weight(node):
        return "a weight on the left has no integer kernel"
    if len(graph.value(node.inputs[1]).shape or ()) != 2:
        return "a stack of weight matrices has no integer kernel with a scale per channel"
    return ""


def _why_not_gemm(node: ir.Node) -> str:
    if graph.attribute(node, "transA", 0):
        return "transA has no integer kernel"
    if graph.attribute(node, "alpha", 1.0) != 1.0 or graph.attribute(node, "beta", 1.0) != 1.0:
        return "alpha and beta other than 1 have no integer kernel"
    bias = graph.input_at(node, 2)
    if bias is None:
        return ""
    weight = graph.value(node.inputs[1])
    if not graph.is_constant(bias) or not graph.is_constant(weight):
        return "a computed bias has no integer kernel"
    shape = graph.shape_of(bias)
    channels = graph.shape_of(weight)[channel_axis(node, weight)]
    if math.prod(shape) != 1 and (math.prod(shape) != channels or shape[-1] != channels):
        return "a bias with rows has no integer kernel"
    return ""


def _why_not_lstm(node: ir.Node) -> str:
    if not all(graph.is_float_weight(node.inputs[i]) for i in (1, 2)):
        return "a computed weight has no integer kernel"
    return ""


def _why_not_average_pool(node: ir.Node) -> str:
    if "dilations" in node.attributes:
        return "QLinearAveragePool does not load with dilations"
    if all(graph.attribute(node, a, 0) for a in ("ceil_mode", "count_include_pad")):
        return "QLinearAveragePool is wrong at borders that it rounds up and counts"
    return ""


def _why_not_max_pool(node: ir.Node) -> str:
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "indices are found in float only"
    return ""


def _why_not_identity(node: ir.Node) -> str:
    return "its weight is multiplied where other operators carry it"


_STATIC = (Compute.STATIC,)
_ANY = (Compute.STATIC, Compute.DYNAMIC, Compute.BLOCKS)
_RECURRENT = Operator(Kind.WEIGHT_ONLY, weights=(1, 2), layout=_recurrent_layout)
_ELEMENTWISE = Operator(Kind.ELEMENTWISE)
_MOVES = Operator(Kind.MOVES)

RULES: dict[str, Operator] = {
    "Conv": Operator(
        Kind.ANCHOR,
        weights=(1,),
        bias=2,
        layout=_conv_layout,
        computes=_STATIC,
        has_gram=True,
        absorbs_scale=True,
        mean_axis=1,
        obstacle=_why_not_conv,
        integer_forms={"ConvInteger": IntegerForm((1,)), "QLinearConv": IntegerForm((3,))},
    ),
    "Gemm": Operator(
        Kind.ANCHOR,
        weights=(1,),
        bias=2,
        layout=_gemm_layout,
        computes=_ANY,
        dynamic_pattern=DynamicPattern.MATMUL,
        needs_q=False,
        has_gram=True,
        absorbs_scale=True,
        obstacle=_why_not_gemm,
        integer_forms={"QGemm": IntegerForm((3,))},
    ),
    "MatMul": Operator(
        Kind.ANCHOR,
        weights=(1,),
        layout=_matmul_layout,
        computes=_ANY,
        dynamic_pattern=DynamicPattern.MATMUL,
        needs_q=False,
        has_gram=True,
        absorbs_scale=True,
        obstacle=_why_not_matmul,
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
        layout=_recurrent_layout,
        computes=(Compute.DYNAMIC,),
        dynamic_pattern=DynamicPattern.LSTM,
        obstacle=_why_not_lstm,
        integer_forms={"DynamicQuantizeLSTM": IntegerForm((1, 2), _dynamic_lstm_layout)},
    ),
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "ConvTranspose": Operator(Kind.WEIGHT_ONLY, weights=(1,), layout=_transposed_conv_layout),
    "Gather": Operator(
        Kind.WEIGHT_ONLY, data=(1,), weights=(0,), layout=_table_layout, is_table=True
    ),
    "Identity": Operator(  # of a weight that other operators carry (model/carried.py)
        Kind.WEIGHT_ONLY, weights=(0,), layout=_carried_layout, obstacle=_why_not_identity
    ),
    "Add": Operator(Kind.ELEMENTWISE, data=(0, 1)),
    "Mul": Operator(Kind.ELEMENTWISE, data=(0, 1)),
    "Sigmoid": _ELEMENTWISE,
    "LeakyRelu": _ELEMENTWISE,
    "AveragePool": Operator(Kind.ELEMENTWISE, obstacle=_why_not_average_pool),
    "GlobalAveragePool": _ELEMENTWISE,
    "Concat": Operator(Kind.ELEMENTWISE, data=()),
    "MaxPool": Operator(Kind.MOVES, obstacle=_why_not_max_pool),
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


def is_left_weight(node: ir.Node) -> bool:
    """Whether the node is the product of a constant and what is computed, in this order."""
    return (
        node.op_type == "MatMul"
        and len(node.inputs) == 2
        and graph.is_float_weight(node.inputs[0])
        and not graph.is_constant(node.inputs[1])
    )


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


def is_pointwise(node: ir.Node) -> bool:
    """Whether the Conv multiplies the channels of each pixel by one matrix."""
    if node.op_type != "Conv" or not graph.is_float_weight(node.inputs[1]):
        return False
    kernel = graph.shape_of(graph.value(node.inputs[1]))[2:]
    strides = graph.attribute(node, "strides", ())
    is_one_group = graph.attribute(node, "group", 1) == 1
    return (
        is_one_group and {*kernel, *strides} <= {1} and not any(graph.attribute(node, "pads", ()))
    )


def is_depthwise(node: ir.Node) -> bool:
    """Whether each output channel of the Conv sees one input channel."""
    grouped = node.op_type == "Conv" and graph.attribute(node, "group", 1) > 1
    return grouped and graph.shape_of(graph.value(node.inputs[1]))[1] == 1


def has_depthwise_kernel(node: ir.Node) -> bool:
    """Whether onnxruntime's kernel for depthwise Convs runs the Conv in integers, which adds in
    int32: each group has one input and one output channel.
    """
    if node.op_type != "Conv":
        return False
    shape = graph.shape_of(graph.value(node.inputs[1]))
    return shape[:2] == (graph.attribute(node, "group", 1), 1)


def has_other_pairs(node: ir.Node) -> bool:
    """Whether kernels that pair channels of one tap of the Conv add other neighbours than those of
    onnxruntime, which pair the last of an odd number of channels with the first of the next tap.
    """
    if node.op_type != "Conv":
        return False
    _, channels, *taps = graph.shape_of(graph.value(node.inputs[1]))
    return channels % 2 == 1 and channels > 1 and math.prod(taps) > 1
