"""The normal form that plans are made of: constants are initializers, names are unique."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from quant_core.errors import ModelError
from quant_core.model import files
from quant_core.model.graph import (
    WEIGHTED,
    attribute,
    consumers,
    first_line,
    graphs_of,
    home,
    nodes_of,
    replace_value,
)
from quant_core.model.names import free, make_unique
from quant_core.model.unused import drop_unused


def normalize(model: ir.Model) -> None:
    """Edit the model in place, so that every constant is an initializer and every node has a name.

    1. Constant nodes become initializers.
    2. Identity nodes go, except those that write an output of a graph. What a Loop carries and
       never changes is read from outside.
    3. A node without a name, or with an earlier node's name, gets one from its first output. A
       value of an inner graph gets a name that no other graph has (names.py).
    4. AveragePool loses dilations of 1, which onnxruntime's QLinearAveragePool does not know.

    Raises: ModelError if the graph is not valid.
    """
    try:
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)  # 1
        for graph in graphs_of(model):
            _remove_identities(graph)  # 2
            _capture_carried(graph)  # 2
        drop_unused(model)
    except Exception as error:
        raise ModelError(
            f"the graph is not valid: {first_line(error)}", hint="Run onnx.checker on it"
        ) from error
    make_unique(model)  # 3
    names: set[str] = set()
    for node in nodes_of(model):
        node.name = free(node.name or f"{node.op_type}_{node.outputs[0].name}", names)  # 3
        names.add(node.name)
        _remove_trivial_dilations(node)  # 4


def load_normalized(path: str | Path) -> ir.Model:
    """The model in that file in its normal form. Raises: ModelError as `files.load`."""
    model = files.load(path)
    normalize(model)
    return model


def fix_weights(main: ir.Graph) -> bool:
    """Edit in place: weights and biases that are inputs with a default value are constants.

    Returns whether there were any. A caller could have given others, but nobody gives weights.
    """
    fixed = [v for v in main.inputs if v.name in main.initializers and _is_weight(v)]
    for value in fixed:
        main.inputs.remove(value)
    return bool(fixed)


def _is_weight(value: ir.Value) -> bool:
    """Whether an operator that has weights reads the value, itself or behind Identity nodes."""
    return any(
        node.op_type in WEIGHTED or (node.op_type == "Identity" and _is_weight(node.outputs[0]))
        for node in consumers(value)
    )


def _remove_identities(graph: ir.Graph) -> None:
    """Edit in place: readers of an Identity read its input."""
    identities = [n for n in graph if n.op_type == "Identity" and not n.domain]
    for node in identities:
        source, output = node.inputs[0], node.outputs[0]
        if source is not None and not output.is_graph_output():
            output.replace_all_uses_with(source)
            graph.remove(node, safe=True)


def _capture_carried(graph: ir.Graph) -> None:
    """Edit in place: nodes in a Loop read what it carries unchanged from outside.

        Loop(w) { MatMul(s, w_in); w_out = Identity(w_in) }    becomes    Loop { MatMul(s, w) }

    onnxruntime copies a state that is handed on, in every iteration. One that is an output of the
    graph stays, but its readers inside read what is outside.
    """
    for loop in [n for n in graph if n.op_type == "Loop" and not n.domain]:
        states = range(len(loop.inputs) - 2)
        dropped = [state for state in states if _capture(loop, state)]
        if dropped:
            _drop_states(loop, dropped)


def _capture(loop: ir.Node, state: int) -> bool:
    """Edit in place: what reads this state reads what is outside, if the Loop hands it on as it
    came. Returns whether nothing reads it any more.
    """
    body, value = loop.attributes["body"].as_graph(), loop.inputs[2 + state]
    inner, after = body.inputs[2 + state], body.outputs[1 + state]
    if value is None or (after is not inner and not _is_copy(after, inner)):
        return False
    for use in [*inner.uses(), *after.uses()]:
        if use.node is not after.producer():
            use.node.replace_input_with(use.idx, value)
    if loop.outputs[state].is_graph_output():
        return False
    loop.outputs[state].replace_all_uses_with(value)
    others = {*body.outputs[: 1 + state], *body.outputs[2 + state :]}
    return others.isdisjoint((inner, after))


def _drop_states(loop: ir.Node, dropped: list[int]) -> None:
    """Edit in place: a Loop, of which nothing reads these states, does not carry them."""
    body = loop.attributes["body"].as_graph()
    inputs, outputs = list(loop.inputs), list(loop.outputs)
    for state in reversed(dropped):
        del inputs[2 + state], outputs[state]
        copy = body.outputs.pop(1 + state).producer()
        if copy is not None:
            body.remove(copy, safe=True)
        body.inputs.pop(2 + state)
    shorter = ir.Node(
        "", "Loop", inputs, loop.attributes.values(), num_outputs=len(outputs), name=loop.name
    )
    home(loop).insert_before(loop, shorter)
    for old, new in zip(outputs, shorter.outputs, strict=True):
        replace_value(old, new)
    home(loop).remove(loop, safe=True)


def _is_copy(after: ir.Value, before: ir.Value) -> bool:
    """Whether an Identity made the one of the other."""
    node = after.producer()
    return node is not None and node.op_type == "Identity" and node.inputs[0] is before


def _remove_trivial_dilations(node: ir.Node) -> None:
    """Edit in place: an AveragePool whose dilations are all 1 has none."""
    if node.op_type == "AveragePool" and set(attribute(node, "dilations", (0,))) == {1}:
        node.attributes.pop("dilations")
