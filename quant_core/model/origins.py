"""Which nodes and weights of the original model a node of the prepared one stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase

import onnx_ir as ir

from quant_core.model import graph

METADATA = "quantmill.origins"  # of a prepared model: JSON, node -> names in the original


def matches(glob: str, *names: str) -> bool:
    """Whether one of the names is the glob, or matches it; brackets may stand for themselves."""
    literal = glob.replace("[", "[[]")
    return any(
        name == glob or fnmatchcase(name, glob) or fnmatchcase(name, literal) for name in names
    )


def origins_of(model: ir.Model) -> Mapping[str, list[str]]:
    """Node of a prepared model -> other names of the original that mean it, if there are any."""
    found: Mapping[str, list[str]] = json.loads(model.metadata_props.get(METADATA, "{}"))
    return found


def record_origins(prepared: ir.Model, original: ir.Model, former: Mapping[str, str]) -> None:
    """Edit `prepared` in place: its metadata tells what of the original each node stands for.

    former  value of both models -> its name in the file, for those that were renamed

    A node stands for all of the original that lies between its outputs and what others compute for
    it, also for what its constants were computed of:

        MatMul "fc" -> Add "bias"    becomes    Gemm "fc/MatMulAddFusion", which stands for both

    Its weights are among that, as rewrites may replace them by others. The Identity of a weight
    that others carry (carried.py) stands for the nodes that read it, and each node of a local
    function that was inlined for the node that called it.
    """
    producers = _producers(original)
    constants = {str(value.name) for value in graph.initializers_of(original)}
    nodes = list(graph.nodes_of(prepared))
    written = {str(v.name) for node in nodes for v in node.outputs if v.name}
    called_by = _calls(prepared, original, producers)
    found = {}
    for node in nodes:
        inputs = [v for v in node.inputs if v is not None]
        read = {str(v.name) for v in inputs}
        computed = {str(v.name) for v in inputs if not graph.is_constant(v)}
        names = _between(node, (computed, written), producers, constants)
        names -= read | {str(node.name)}
        names |= {str(v.name) for v in inputs if graph.is_float_weight(v)}
        if node.op_type == "Identity":  # a weight set apart: what reads it
            names |= {str(reader.name) for reader in graph.consumers(node.outputs[0])}
        names |= called_by.get(node, set())
        names |= {former[name] for name in names | read if name in former}
        if names:
            found[str(node.name)] = sorted(names)
    if found:
        prepared.metadata_props[METADATA] = json.dumps(found)


def _producers(original: ir.Model) -> dict[str, ir.Node]:
    """Value of the original -> the node that makes it, in whichever graph."""
    nodes = graph.nodes_of(original)
    return {str(value.name): node for node in nodes for value in node.outputs if value.name}


def _calls(
    prepared: ir.Model, original: ir.Model, producers: Mapping[str, ir.Node]
) -> dict[ir.Node, set[str]]:
    """Node of the prepared model -> names of the nodes that called the function it was inlined of.

    producers  value of the original -> the node that makes it
    """
    calls = {
        name: str(node.name)
        for name, node in producers.items()
        if node.op_identifier() in original.functions
    }
    called_by: dict[ir.Node, set[str]] = {}
    if calls:
        _find_calls(prepared.graph, set(), calls, set(producers), called_by)
    return called_by


def _find_calls(
    inside: ir.Graph,
    around: set[str],
    calls: Mapping[str, str],
    known: set[str],
    called_by: dict[ir.Node, set[str]],
) -> None:
    """Add to `called_by`, for each node of this graph, the names of the nodes that called it.

    around  the names for the node that holds the graph
    calls   value of the original that a local function makes -> name of the node that called it
    known   values of the original. Those inside functions have other names: they lead to the others
    """
    for node in reversed(inside):
        names: set[str] = set()
        for value in node.outputs:
            if value.name in known:
                names |= {calls[value.name]} if value.name in calls else set()
                continue
            names |= around if value.is_graph_output() else set()
            for reader in graph.consumers(value):
                names |= called_by.get(reader, set())
        called_by[node] = names
        for inner in graph.graphs_in(node):
            _find_calls(inner, names, calls, known, called_by)


def _between(
    node: ir.Node,
    ends: tuple[set[str], ...],
    producers: Mapping[str, ir.Node],
    constants: set[str],
) -> set[str]:
    """The names of the nodes and constants of the original from this node's outputs back to the
    values of these sets.
    """
    names: set[str] = set()
    seen: set[str] = set()
    waiting = [str(v.name) for v in node.outputs if v.name]
    is_first = set(waiting)
    while waiting:
        tensor = waiting.pop()
        is_end = any(tensor in values for values in ends)  # joined anew, the sets take square time
        if tensor in seen or (is_end and tensor not in is_first):
            continue
        seen.add(tensor)
        if tensor in constants:
            names.add(tensor)
        if tensor in producers:
            source = producers[tensor]
            names.add(str(source.name or ""))
            if not source.inputs:  # a Constant
                names.add(tensor)
            waiting += [str(v.name) for v in source.inputs if v is not None]
    return names - {""}
