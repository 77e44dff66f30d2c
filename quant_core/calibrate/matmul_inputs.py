"""Where the weights of products and convolutions meet their inputs, and the rows of these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.data.samples import spread
from quant_core.model import graph
from quant_core.numerics.output_noise import parts_of
from quant_core.plan.operators import RULES, why_not_integer
from quant_core.plan.types import QuantPlan


@dataclass(frozen=True, slots=True)
class MatmulInput:
    """Where a weight meets its input: which rows the kernel multiplies the weight's columns by.

    tensor    the input's name
    groups    G of a grouped convolution, else 1
    columns   K, inputs of one output channel
    centered  whether a bias takes up the mean of the rounding error
    kernel, strides, dilations, pads  of a convolution; empty for a matrix product
    """

    tensor: str
    groups: int
    columns: int
    centered: bool
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        """P, into how many Gram matrices the K columns are split; 0 if they cannot be."""
        return parts_of(self.columns)

    @property
    def gram_shape(self) -> tuple[int, int, int, int]:
        """(G, P, k, k) of the Gram matrices, with k = K / P."""
        k = self.columns // self.parts
        return self.groups, self.parts, k, k


def matmul_input(node: ir.Node, shape: tuple[int, ...]) -> MatmulInput | None:
    """The input of a Conv, Gemm or MatMul with a weight of this shape.

    None if its rows cannot be taken: batched weights, and padding that depends on the input's size.
    """
    tensor = graph.name_of(node.inputs[0])
    if node.op_type != "Conv":
        if len(shape) != 2:
            return None
        columns = shape[1] if graph.attribute(node, "transB", 0) else shape[0]
        return MatmulInput(tensor, 1, columns, centered=node.op_type == "Gemm")
    if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    rank = len(shape) - 2
    ones, zeros = (1,) * rank, (0,) * (2 * rank)
    return MatmulInput(
        tensor,
        groups=graph.attribute(node, "group", 1),
        columns=int(np.prod(shape[1:])),
        centered=True,
        kernel=tuple(shape[2:]),
        strides=tuple(graph.attribute(node, "strides", ones)),
        dilations=tuple(graph.attribute(node, "dilations", ones)),
        pads=tuple(graph.attribute(node, "pads", zeros)),
    )


def matmul_inputs(model: ir.Model, plan: QuantPlan) -> dict[str, MatmulInput]:
    """Node -> the input of its weight, for every product and convolution that the plan rounds."""
    rounded = {n.node for n in plan.nodes if n.is_rounded}
    found = {}
    for node in model.graph:
        if node.name not in rounded or not RULES[node.op_type].has_gram:
            continue
        if why_not_integer(node):
            continue
        source = matmul_input(node, graph.shape_of(graph.value(node.inputs[1])))
        if source is not None and source.parts:
            found[str(node.name)] = source
    return found


def inputs_of_weights(model: ir.Model, plan: QuantPlan) -> dict[str, MatmulInput]:
    """As `matmul_inputs`, but nodes that share a weight have the input of the first of them alone,
    which their integers are made for.
    """
    inputs = matmul_inputs(model, plan)
    first: dict[tuple[ir.Value, MatmulInput], MatmulInput] = {}
    for node in model.graph:
        if (source := inputs.get(str(node.name))) is not None:
            alike = graph.value(node.inputs[1]), replace(source, tensor="")
            inputs[str(node.name)] = first.setdefault(alike, source)
    return inputs


def input_rows(x: NDArray[Any], source: MatmulInput, wanted: int) -> NDArray[np.float32]:
    """(G, n, K): at most `wanted` evenly spread rows of `x`, or of its im2col matrix.

    The K columns of an im2col row lie in the order (kernel..., C), as the weight's columns do
    (numerics/layout.py).
    """
    if not source.kernel:
        flat = x.reshape(-1, x.shape[-1])
        return np.asarray(flat[spread(wanted, len(flat))][None], np.float32)
    at, inside = _taps(x.shape, source, wanted)
    rows = x[at]  # (n, kernel..., C)
    if not inside.all():
        rows[~inside] = 0
    rows = rows.reshape(len(rows), -1, source.groups, x.shape[1] // source.groups)
    ordered = rows.transpose(2, 0, 1, 3).reshape(source.groups, len(rows), -1)
    return np.ascontiguousarray(ordered, np.float32)


def split_columns(rows: NDArray[Any], parts: int) -> NDArray[Any]:
    """Rows (G, n, K) as (G, P, n, k): the columns of each of P Gram matrices."""
    groups, n, columns = rows.shape
    return rows.reshape(groups, n, parts, columns // parts).transpose(0, 2, 1, 3)


def _taps(
    shape: tuple[int, ...], source: MatmulInput, wanted: int
) -> tuple[tuple[Any, ...], NDArray[np.bool_]]:
    """Which elements of an input of this shape the kernel covers at evenly spread positions.

    The first is an index whose result is (n, kernel..., C), the second (n, kernel...) tells which
    elements are of the input; all others are padding.
    """
    rank, sizes = len(source.kernel), shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(source.kernel, source.dilations, strict=True)]
    padded = np.add(sizes, np.add(source.pads[:rank], source.pads[rank:]))
    positions = (padded - reach) // source.strides + 1
    chosen = spread(wanted, shape[0] * int(np.prod(positions)))
    sample, *position = np.unravel_index(chosen, (shape[0], *positions))
    ones = (1,) * rank
    at: list[Any] = [sample.reshape(-1, *ones), slice(None)]
    inside = np.ones((len(chosen), *ones), bool)
    for axis, size in enumerate(sizes):
        first = position[axis] * source.strides[axis] - source.pads[axis]
        taps = first[:, None] + np.arange(source.kernel[axis]) * source.dilations[axis]
        taps = taps.reshape(-1, *ones[:axis], source.kernel[axis], *ones[axis + 1 :])
        inside = inside & (taps >= 0) & (taps < size)
        at.append(taps.clip(0, size - 1))
    return tuple(at), inside
