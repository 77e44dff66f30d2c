"""Which tensors cross-layer equalization can scale together, and which weights absorb the factors.

equalize.py chooses the factors and applies them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from quant_core.model import graph
from quant_core.plan.operators import rule_of

RECTIFIERS = frozenset({"Relu", "LeakyRelu"})
# operators with f(s x) = s f(x) for s > 0
SCALE_INVARIANT = RECTIFIERS | {"MaxPool", "AveragePool", "GlobalAveragePool"}


@dataclass(slots=True)
class ScaleGroup:
    """Tensors that must be scaled by the same factors, and the nodes whose weights absorb them.

    tensors  all values of the group, in graph order
    writers  Convs whose outputs are in the group, or the LayerNormalization that writes it: their
             weights and biases are multiplied
    readers  Convs, Gemms and MatMuls that read a tensor of the group: their weights are divided
    axis     of the channels of all its tensors
    """

    tensors: list[ir.Value] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)
    axis: int = 1

    @property
    def name(self) -> str:
        """The name of its first tensor."""
        return str(self.tensors[0].name)

    @property
    def quantized_tensors(self) -> list[str]:
        """The tensors that a quantized model holds as integers.

        Those that only a Relu reads are not among them: it is fused into what writes them.
        """
        found = []
        for value in self.tensors:
            readers = {node.op_type for node in graph.consumers(value)}
            if readers - RECTIFIERS:
                found.append(str(value.name))
        return found

    @property
    def channels(self) -> set[int]:
        """The channel counts of the weights around it; it can be scaled only if there is one."""
        written = {weight_shape(n)[0] for n in self.writers}
        read = {weight_shape(n)[input_axis(n)] * conv_groups(n) for n in self.readers}
        return written | read


def scale_groups(model: ir.Model) -> list[ScaleGroup]:
    """The groups of tensors that can be scaled: all operators around pass a factor on or absorb it.

    1. Tensors that one operator ties together (input and output of a Relu, both inputs of an Add)
    are one group.
    2. A group with a tensor that anything else reads or writes cannot be scaled.
    3. Nor can one with tensors of several channel counts: an Add repeats the smaller one.
    """
    parents: dict[ir.Value, ir.Value] = {}  # a forest of disjoint sets

    def root_of(value: ir.Value) -> ir.Value:
        while parents.setdefault(value, value) is not value:
            value = parents[value]
        return value

    for node in model.graph:
        if _ties(node):  # 1
            for value in graph.computed_inputs(node):
                parents[root_of(value)] = root_of(node.outputs[0])
    groups: dict[ir.Value, ScaleGroup] = {}
    for node in model.graph:
        for value in node.outputs:
            groups.setdefault(root_of(value), ScaleGroup()).tensors.append(value)
        if not absorbs_scale(node):
            continue
        if node.op_type == "Conv":
            groups[root_of(node.outputs[0])].writers.append(node)
        source = groups.get(root_of(graph.value(node.inputs[0])))
        if source is not None:
            source.readers.append(node)
    unscalable = {root_of(value) for value in _unscalable(model)}  # 2
    found = [g for root, g in groups.items() if root not in unscalable and g.writers and g.readers]
    return [group for group in found if len(group.channels) == 1]  # 3


def _ties(node: ir.Node) -> bool:
    """Whether a factor of one tensor around the node must be one of all (rule 1)."""
    return passes_scale(node) or (node.op_type == "Add" and len(graph.computed_inputs(node)) == 2)


def _unscalable(model: ir.Model) -> set[ir.Value]:
    """The tensors of the main graph that something reads or writes as they are (rule 2)."""
    found: set[ir.Value] = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        if _ties(node):
            continue
        if not absorbs_scale(node):
            found.update([*graph.computed_inputs(node), *node.outputs])
        elif node.op_type != "Conv":  # the last axis of its output is not axis 1 of an image
            found.update(node.outputs)
    for subgraph in graph.graphs_inside(model.graph):
        for node in subgraph:
            found.update(v for v in node.inputs if v is not None)
    return found


def product_groups(model: ir.Model) -> list[ScaleGroup]:
    """What MatMuls and Gemms read, each tensor a group of its own: the last axis holds channels.

    A LayerNormalization is its writer if they alone read it. A group without a writer can be scaled
    by a multiplication, which only its readers see.
    """
    taken = {value for group in scale_groups(model) for value in group.tensors}
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type != "Conv" and absorbs_scale(node):
            readers.setdefault(graph.value(node.inputs[0]), []).append(node)
    groups = [
        ScaleGroup([value], _normalizations(value, nodes), nodes, axis=-1)
        for value, nodes in readers.items()
        if value not in taken and value.producer() is not None and not value.is_graph_output()
    ]
    return [group for group in groups if len(group.channels) == 1]


def _normalizations(value: ir.Value, readers: Collection[ir.Node]) -> list[ir.Node]:
    """The LayerNormalization that writes the value for these readers alone; or none."""
    node = value.producer()
    if node is None or node.op_type != "LayerNormalization":
        return []
    if len(value.uses()) != len(readers) or value is not node.outputs[0]:
        return []
    parameters = [v for v in node.inputs[1:] if v is not None]
    is_own = all(graph.is_constant(v) and len(v.uses()) == 1 for v in parameters)
    return [node] if is_own and all(len(graph.shape_of(v)) == 1 for v in parameters) else []


def absorbs_scale(node: ir.Node) -> bool:
    """Whether the node multiplies its first input by a constant weight that no other node reads."""
    operator = rule_of(node)
    if operator is None or not operator.absorbs_scale or graph.is_constant(node.inputs[0]):
        return False
    for value in node.inputs[1:]:
        if value is None:
            continue
        if not graph.is_constant(value) or len(value.uses()) != 1:
            return False
    weight = node.inputs[1]
    if not graph.is_float_weight(weight):
        return False
    if node.op_type == "Conv":
        return True
    return not graph.attribute(node, "transA", 0) and len(weight_shape(node)) == 2


def passes_scale(node: ir.Node) -> bool:
    """Whether f(s x) = s f(x) for positive factors s of the channels."""
    if node.op_type == "Flatten":  # (N, C, 1, 1) to (N, C)
        source = graph.value(node.inputs[0]).producer()
        is_pooled = source is not None and source.op_type == "GlobalAveragePool"
        return is_pooled and graph.attribute(node, "axis", 1) == 1
    return node.op_type in SCALE_INVARIANT and len(node.outputs) == 1


def weight_shape(node: ir.Node) -> tuple[int, ...]:
    """The shape of the weight of a Conv, Gemm or MatMul."""
    return graph.shape_of(graph.value(node.inputs[1]))


def conv_groups(node: ir.Node) -> int:
    """The groups of a Conv, 1 for other operators."""
    return int(graph.attribute(node, "group", 1)) if node.op_type == "Conv" else 1


def input_axis(node: ir.Node) -> int:
    """The axis of the weight along which the input's channels (of one group) lie."""
    return 1 if node.op_type == "Conv" or graph.attribute(node, "transB", 0) else 0
