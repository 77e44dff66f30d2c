"""Convs with few output channels compute neighbouring pixels as channels."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize import convolution
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.convolution import ACTIVATIONS, Convolution
from quant_core.optimize.edit import put_before, remove
from quant_core.optimize.facts import Facts

LANES = 16  # channels that onnxruntime's widest blocked kernels compute at once
BLOCKS = (4, 2)  # side of the square of pixels that become channels, the largest first


def stack_outputs(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """A Conv with o <= 4 outputs becomes one with o b b outputs and strides b times as long.

        Conv(o outputs)   =>   Conv(o b b outputs, strides * b) -> DepthToSpace(b)

    1. The kernel is shifted by one stride for each neighbour, so it gets longer and has zeros.
    2. b is the largest of 4 and 2 that leaves at most 16 channels and divides both sizes of the
       result, which are known. Where onnxruntime has no operator that puts pixels back in place
       (b rows by another number of columns), putting them back was measured to cost more.
    3. An activation that alone reads the result comes before the pixels are put back.
    """
    applied = []
    for node in graph.nodes_of(model, "Conv"):
        if not chosen(str(node.name)):
            continue
        conv = convolution.read(node)
        if conv is None or conv.groups != 1 or facts.rank(node.outputs[0]) != 4:
            continue
        block = _block(conv, [facts.size(node.outputs[0], axis) for axis in (2, 3)])
        if block is not None and prod(conv.taps) > 1 and set(conv.dilations) == {1}:
            _write(graph.home(node), node, conv, block)
            applied.append(Applied("stack_outputs", str(node.name), ()))
    return applied


def _block(conv: Convolution, sizes: list[int | None]) -> int | None:
    """The side of the square of pixels that become channels, None if there is none."""
    for block in BLOCKS:  # 2.
        divides = all(size is not None and size % block == 0 for size in sizes)
        if divides and conv.outputs * block * block <= LANES:
            return block
    return None


def _stacked(conv: Convolution, block: int) -> Convolution:
    """The Conv whose channel (o, i, j) is output o of the pixel i rows down and j columns on."""
    (rows, columns), (down, on) = conv.taps, conv.strides
    taps = (rows + (block - 1) * down, columns + (block - 1) * on)
    weight = np.zeros((conv.outputs, block, block, conv.inputs, *taps))
    for i in range(block):
        for j in range(block):
            top, left = i * down, j * on  # 1.
            weight[:, i, j, :, top : top + rows, left : left + columns] = conv.weight
    return replace(
        conv,
        weight=weight.reshape(-1, conv.inputs, *taps),
        bias=np.repeat(conv.bias, block * block),
        strides=(down * block, on * block),
    )


def _write(inside: ir.Graph, node: ir.Node, conv: Convolution, block: int) -> None:
    name, end = str(node.name), node
    stacked = convolution.make(inside, name, graph.value(node.inputs[0]), _stacked(conv, block))
    inside.insert_before(node, stacked)
    last, gone = stacked.outputs[0], [node]
    reader = graph.only_reader(node.outputs[0])
    if reader is not None and reader.op_type in ACTIVATIONS and not reader.domain:  # 3.
        inputs, attributes = [last, *reader.inputs[1:]], list(reader.attributes.values())
        copy = ir.Node("", reader.op_type, inputs, attributes, name=reader.name)
        last, end = put_before(reader, copy, str(reader.name)), reader
        gone.append(reader)
    square = [ir.AttrInt64("blocksize", block), ir.AttrString("mode", "CRD")]
    last = put_before(end, ir.Node("", "DepthToSpace", [last], square), f"{name}_back")
    graph.replace_value(end.outputs[0], last)
    remove(gone)
