"""Weights that are not constants where they are multiplied: Loops, Scans and nodes that move values
carry them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from quant_core.model import graph

MIN_ELEMENTS = 256  # of a weight; for a smaller one the node takes about as many bytes as it saves
# Positions of the inputs that an operator multiplies by, or picks rows of; () means all.
MULTIPLIES: dict[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Einsum": (),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Attention": (1,),
    "EmbedLayerNormalization": (2, 3, 4),
    "FusedConv": (1,),
    "FusedGemm": (0, 1),
    "FusedMatMul": (0, 1),
    "DeformConv": (1,),
    "MoE": (2, 4, 6),
    "WordConvEmbedding": (1, 3),
}
# Positions of the inputs whose values an operator gives on as they are; () means all.
MOVES: dict[str, tuple[int, ...]] = {
    "Concat": (),
    "ConcatFromSequence": (0,),
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Pad": (0,),
    "Reshape": (0,),
    "SequenceAt": (0,),
    "SequenceConstruct": (),
    "SequenceInsert": (0, 1),
    "Slice": (0,),
    "Split": (0,),
    "SplitToSequence": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
CHANGES = frozenset({"Add", "Mul", "Sub"})  # a matrix that stays as large may stay a weight


def insert_identities(model: ir.Model) -> None:
    """Edit in place: a weight that no operator reads as its own is read through an Identity.

        w -> Loop { MatMul(s, w_in) }    becomes    w -> Identity -> Loop { MatMul(s, w_in) }

    So it has a node that plans, names and reports can mean. onnxruntime drops it at load.

    1. Each float constant of rank 2 or more that reaches an operator which multiplies by it.
    2. Where an operator multiplies by it directly, it has a node already, and where an Identity
       gives it back from its own graph.
    3. A matrix that was added to something else is a weight as the right operand of a product, such
       as W + A B of an adapter. On the left it may as well be positions that were added to data.
    4. A branch of an If may give it back. What a body gives back would be made in each round, and
       what the model gives stays as it is.
    """
    callers = callers_of(model)
    branches = {inside for inside, node in callers.items() if node.op_type == "If"}
    for value in graph.initializers_of(model):
        if value.is_graph_output() and value.graph not in branches:
            continue  # 4
        if _is_large_weight(value) and not _has_node(value) and is_multiplied(value, callers):
            _insert_identity(value)


def _is_large_weight(value: ir.Value) -> bool:
    return (
        graph.is_float_weight(value)
        and value.const_value is not None
        and value.const_value.size >= MIN_ELEMENTS
    )


def _has_node(value: ir.Value) -> bool:
    """Rule 2."""
    return any(
        (node.op_type in graph.WEIGHTED and not node.domain and not _picks_columns(node))
        or (node.op_type == "Identity" and node.graph is value.graph)
        for node in graph.consumers(value)
    )


def _picks_columns(node: ir.Node) -> bool:
    return node.op_type == "Gather" and graph.attribute(node, "axis", 0) != 0


def is_multiplied(weight: ir.Value, callers: Mapping[ir.Graph, ir.Node]) -> bool:
    """Whether an operator that multiplies by it is reached (rule 1), whichever way it takes.

    callers  `callers_of` the model
    """
    seen: set[tuple[ir.Value, bool]] = set()
    waiting = [(weight, False)]
    while waiting:
        value, is_changed = waiting.pop()
        if (value, is_changed) in seen:
            continue
        seen.add((value, is_changed))
        for node, position in value.uses():
            if node.domain not in ("", graph.MICROSOFT):
                continue
            if _is_at(MULTIPLIES, node, position) and not (is_changed and position == 0):  # 3
                return True
            changes = node.op_type in CHANGES
            if changes and not _may_stay_as_large(weight, node.inputs[1 - position]):
                continue
            moved = node.outputs if changes else _moved_to(node, position)
            waiting += [(output, is_changed or changes) for output in moved]
        waiting += [(output, is_changed) for output in _given_back(value, callers)]
    return False


def _is_at(positions: Mapping[str, tuple[int, ...]], node: ir.Node, position: int) -> bool:
    """Whether the operator is listed, with this position of its inputs."""
    listed = positions.get(node.op_type)
    return listed is not None and (not listed or position in listed)


def _moved_to(node: ir.Node, position: int) -> Iterator[ir.Value]:
    """The values that hold the weight, unchanged, behind a reader of it."""
    if _is_at(MOVES, node, position):
        yield from node.outputs
    elif (
        node.op_type == "Loop" and position >= 2
    ) or node.op_type == "Scan":  # behind the number of rounds and the condition
        yield node.attributes["body"].as_graph().inputs[position]


def _may_stay_as_large(weight: ir.Value, other: ir.Value | None) -> bool:
    """Whether a matrix may have the same shape once an elementwise operator joined it with another.

    Where nothing is known of the other's rank or sizes, it may.
    """
    matrix = graph.shape_of(weight)
    if other is None or len(matrix) != 2 or min(matrix) == 1:
        return False
    if other.shape is None:
        return True
    behind = zip(reversed(matrix), reversed(list(other.shape)), strict=False)
    fits = all(not isinstance(size, int) or size in (1, largest) for largest, size in behind)
    return fits and len(other.shape) <= 2


def _given_back(value: ir.Value, callers: Mapping[ir.Graph, ir.Node]) -> Iterator[ir.Value]:
    """The outputs of the node around an inner graph that hold what this output of it holds."""
    producer = value.producer()
    inside = value.graph if producer is None else producer.graph
    if not value.is_graph_output() or not isinstance(inside, ir.Graph) or inside not in callers:
        return
    node = callers[inside]
    behind = list(inside.outputs)
    if node.op_type == "Loop":
        behind = behind[1:]  # the first is its condition
    for inner, outer in zip(behind, node.outputs, strict=False):
        if inner is value:
            yield outer


def callers_of(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    """Inner graph -> the node that runs it."""
    return {
        attribute.as_graph(): node
        for inside in graph.graphs_of(model)
        for node in inside
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
    }


def _insert_identity(value: ir.Value) -> None:
    """Edit in place: whatever reads the constant, or gives it back, has a copy of it."""
    inside = value.graph
    assert isinstance(inside, ir.Graph)
    copy = ir.Node("", "Identity", [value], name=f"Identity_{value.name}")
    output = copy.outputs[0]
    output.name, output.type, output.shape = f"{value.name}_weight", value.type, value.shape
    value.replace_all_uses_with(output, replace_graph_outputs=True)
    copy.replace_input_with(0, value)
    if len(inside):
        inside.insert_before(inside[0], copy)
    else:
        inside.append(copy)
