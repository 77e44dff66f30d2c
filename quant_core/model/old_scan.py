"""Scan of opset 8, which runs over a batch as well, as Scans of later opsets.

    Scan8(states (N, ...), inputs (N, T, ...))

becomes a Scan over the batch, whose body is the Scan over the steps:

    Scan(states, inputs) { Scan(states (...), inputs (T, ...)) { body } }

ONNX's converter would drop the batch from the shapes and leave the operator as it is. So the new
Scans are of a domain that it does not know until it is done, and their bodies are converted alone.

Source: ONNX, operators Scan-8 and Scan-9.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import AttributeProto, helper

from quant_core.errors import ModelError

OPSET = 9  # the first of these later opsets
HELD = "quantmill.held"  # the domain of the new Scans
HINT = f"Export the model with opset {OPSET} or newer"


def convert(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The model at that opset, by ONNX's converter; `model` may be edited.

    Raises: ModelError if a Scan of opset 8 has no counterpart; whatever the converter raises.
    """
    scans = []
    if _opset(model) < OPSET:
        scans = [n for n in _nodes(model.graph.node) if n.op_type == "Scan" and not n.domain]
    known = {info.name: info for info in (*model.graph.input, *model.graph.value_info)}
    for tensor in model.graph.initializer:
        known[tensor.name] = helper.make_tensor_value_info(
            tensor.name, tensor.data_type, tensor.dims
        )
    for scan in reversed(scans):  # a body before the node that it is part of
        _split(scan, known, _opset(model), version)
    if scans:
        model.opset_import.append(helper.make_opsetid(HELD, 1))
    made = onnx.version_converter.convert_version(model, version)
    if scans:
        for node in _nodes(made.graph.node):
            node.domain = "" if node.domain == HELD else node.domain
        kept = [helper.make_opsetid(i.domain, i.version) for i in made.opset_import]
        del made.opset_import[:]
        made.opset_import.extend(i for i in kept if i.domain != HELD)
    return made


def _opset(model: onnx.ModelProto) -> int:
    versions = (i.version for i in model.opset_import if i.domain in ("", "ai.onnx"))
    return int(next(versions, OPSET))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, each before those inside it."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g.node)


def _split(
    node: onnx.NodeProto, known: Mapping[str, onnx.ValueInfoProto], opset: int, version: int
) -> None:
    """Edit in place: the Scan is one over the batch."""
    lengths, *inputs = node.input
    if lengths:
        raise ModelError("a Scan of opset 8 has sequence_lens, later ones not", node.name, HINT)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if "directions" in attributes:
        attributes["scan_input_directions"] = attributes.pop("directions")
    attributes["body"] = _converted(attributes["body"], known, opset, version, node.name)
    prefix = f"{node.name or node.output[0]}_sample"
    rows = [f"{prefix}_in{i}" for i in range(len(inputs))]
    made = [f"{prefix}_out{i}" for i in range(len(node.output))]
    steps = helper.make_node("Scan", rows, made, prefix, domain=HELD, **attributes)
    inputs_inside = [onnx.ValueInfoProto(name=name) for name in rows]
    outputs_inside = [onnx.ValueInfoProto(name=name) for name in made]
    body = helper.make_graph([steps], prefix, inputs_inside, outputs_inside)
    number = len(inputs)
    whole = helper.make_node(
        "Scan", inputs, node.output, node.name, domain=HELD, body=body, num_scan_inputs=number
    )
    whole.doc_string = node.doc_string
    node.CopyFrom(whole)


def _converted(
    body: onnx.GraphProto,
    known: Mapping[str, onnx.ValueInfoProto],
    opset: int,
    version: int,
    where: str,
) -> onnx.GraphProto:
    """The body at that opset: while it is converted, what it reads from outside are inputs."""
    made = {output for node in body.node for output in node.output}
    made |= {info.name for info in (*body.input, *body.initializer)}
    read = dict.fromkeys(name for node in body.node for name in node.input if name)
    outside = [name for name in read if name not in made]
    if any(name not in known for name in outside):
        raise ModelError("the body of a Scan of opset 8 reads what others compute", where, HINT)
    whole = onnx.GraphProto()
    whole.CopyFrom(body)
    whole.input.extend(known[name] for name in outside)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(HELD, 1)]
    model = helper.make_model(whole, opset_imports=imports, ir_version=4)
    found = onnx.version_converter.convert_version(model, version).graph
    inputs = [info for info in found.input if info.name not in outside]
    del found.input[:]
    found.input.extend(inputs)
    return found
