"""Hard sigmoids that exporters spell out become the one operator that onnxruntime computes at once.

    clip(x + a, 0, h) / h = HardSigmoid(x) with alpha = 1 / h, beta = a / h

It occurs alone (squeeze and excitation) or within x * clip(x + 3, 0, 6) / 6, the hard swish of
MobileNetV3. onnxruntime merges a HardSigmoid into the Conv before it; spelled out, it takes four
passes over the tensor.

Source: Howard et al. 2019, "Searching for MobileNetV3", arXiv 1905.02244, section 5.2.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from quant_core.model import graph

TOLERANCE = 1e-6  # of the divisor: exporters round 1 / 6 to float32


def fuse_hard_sigmoid(model: ir.Model) -> None:
    """Edit the model in place: every spelled-out hard sigmoid becomes a HardSigmoid.

    1. Without a product:

           x -> Add(a) -> Clip(0, h) -> Div(h) -> y
        =  x -> HardSigmoid(1 / h, a / h) -> y

    2. With a product between Clip and Div, by any tensor z (often x itself):

           x -> Add(a) -> Clip(0, h) -> c;   Mul(z, c) -> Div(h) -> y
        =  x -> HardSigmoid(1 / h, a / h) -> c;   Mul(z, c) -> y

    Div(h) may be Mul(1 / h). Bounds and constants must be single float32 numbers, and no other node
    may read what the removed nodes write. The tensor y keeps its name.
    """
    for clip in graph.nodes_of(model, "Clip"):
        _fuse(graph.home(clip), clip)


def _fuse(inside: ir.Graph, clip: ir.Node) -> None:
    """Edit in place, if the Clip belongs to a hard sigmoid."""
    high = _upper_bound(clip)
    add = _shift_before(clip)
    reader = graph.only_reader(clip.outputs[0])
    if high is None or add is None or reader is None:
        return
    source, shift = _split_constant(add)
    if source is None or shift is None:
        return
    product, division = _product_and_division(clip, reader)
    if division is None or abs(_divisor(division) / high - 1) > TOLERANCE:
        return
    attributes = [ir.AttrFloat32("alpha", 1 / high), ir.AttrFloat32("beta", shift / high)]
    fused = ir.Node("", "HardSigmoid", [source], attributes, name=clip.name)
    fused.outputs[0].name = f"{clip.outputs[0].name}_gate"
    fused.outputs[0].type = clip.outputs[0].type
    inside.insert_before(clip, fused)
    last = fused
    if product is not None:
        clip.outputs[0].replace_all_uses_with(fused.outputs[0])
        last = product
    graph.replace_value(division.outputs[0], last.outputs[0])
    inside.remove([division, clip, add], safe=True)


def _upper_bound(clip: ir.Node) -> float | None:
    """h of Clip(0, h), None if the bounds are others."""
    low, high = graph.clip_bounds(clip) or (0.0, 0.0)
    return high if low == 0 < high < math.inf else None


def _shift_before(clip: ir.Node) -> ir.Node | None:
    """The Add that only this Clip reads."""
    shifted = clip.inputs[0]
    add = shifted.producer() if shifted is not None else None
    if add is None or add.op_type != "Add" or graph.only_reader(add.outputs[0]) is not clip:
        return None
    return add


def _split_constant(add: ir.Node) -> tuple[ir.Value | None, float | None]:
    """x and a of Add(x, a) or Add(a, x), None if not exactly one of its inputs is a number."""
    first, second = add.inputs
    numbers = _scalar(first), _scalar(second)
    if (numbers[0] is None) == (numbers[1] is None):
        return None, None
    return (second, numbers[0]) if numbers[1] is None else (first, numbers[1])


def _product_and_division(clip: ir.Node, reader: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """The Mul after the Clip, if there is one, and the node that divides after both."""
    if reader.op_type != "Mul" or any(graph.is_constant(value) for value in reader.inputs):
        return None, reader
    if list(reader.inputs).count(clip.outputs[0]) != 1:
        return None, None
    return reader, graph.only_reader(reader.outputs[0])


def _divisor(node: ir.Node) -> float:
    """The number that the node divides its one input by, 0 if it does something else."""
    if len(node.inputs) != 2:
        return 0.0
    first, second = (_scalar(value) for value in node.inputs)
    if node.op_type == "Div" and first is None and second:
        return second
    if node.op_type == "Mul" and (first is None) != (second is None):
        factor = first or second
        return 1 / factor if factor else 0.0
    return 0.0


def _scalar(value: ir.Value | None) -> float | None:
    """The number behind a float32 constant that broadcasts to any shape, None for another value."""
    found = graph.number(value)
    return found if found is not None and len(graph.shape_of(graph.value(value))) <= 1 else None
