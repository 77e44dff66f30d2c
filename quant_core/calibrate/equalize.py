"""Channels of one tensor made more alike, so that one scale serves them all; the weights before and after take it up.

Between two Convs a Relu passes every positive factor on, so channel c of a tensor may be f_c times as large, if the
weights that write it are multiplied by f_c and those that read it divided. Here f_c = sqrt(max of all channels / max of
channel c): half way to equal channels, since what activations gain the reading weights lose, which share a scale too.

Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1, which equalizes the weights of two layers; where every
channel of a weight has a scale of its own, only activations still share one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.model.session import values_of

RECTIFIERS = frozenset({"Relu", "LeakyRelu"})
PASSING = RECTIFIERS | {"MaxPool", "AveragePool", "GlobalAveragePool"}
METADATA = "quantmill.equalized"
MOST = 8.0  # a channel that hardly ever speaks is not made louder than this

Factors = NDArray[np.float32]


@dataclass(slots=True)
class Bond:
    """Tensors whose channels can only be scaled together, and the nodes whose weights take it up."""

    tensors: list[ir.Value] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.tensors[0].name)

    @property
    def heard(self) -> list[str]:
        """The tensors of which a quantized model would keep integers: not those that a Relu alone reads."""
        return [
            str(v.name)
            for v in self.tensors
            if {n.op_type for n in graph.consumers(v)} - RECTIFIERS
        ]

    @property
    def channels(self) -> set[int]:
        """How many channels the weights around have: one number, or they cannot be scaled."""
        read = {
            graph.shape_of(graph.value(n.inputs[1]))[_reading_axis(n)] * _groups(n)
            for n in self.readers
        }
        return read | {graph.shape_of(graph.value(n.inputs[1]))[0] for n in self.writers}


def bonds(model: ir.Model) -> list[Bond]:
    """Those of the graph whose channels are free: every operator around them passes a factor on or takes it up."""
    root: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        while root.setdefault(value, value) is not value:
            value = root[value]
        return value

    fixed: set[ir.Value] = set(model.graph.inputs) | set(model.graph.outputs)
    for node in model.graph:
        data = [v for v in node.inputs if v is not None and not graph.is_constant(v)]
        if _passes(node) or (node.op_type == "Add" and len(data) == 2):
            for value in data:
                root[find(value)] = find(node.outputs[0])
        elif node.op_type != "Conv" or not _takes_up(node):
            fixed |= {*node.outputs, *(() if _takes_up(node) else data)}
    for inner in model.graph.subgraphs():
        fixed |= {v for node in inner for v in node.inputs if v is not None}
    tied = {find(value) for value in fixed}
    found: dict[ir.Value, Bond] = {}
    for node in model.graph:
        for value in node.outputs:
            found.setdefault(find(value), Bond()).tensors.append(value)
        if node.op_type == "Conv" and _takes_up(node):
            found[find(node.outputs[0])].writers.append(node)
        if _takes_up(node) and (source := find(graph.value(node.inputs[0]))) in found:
            found[source].readers.append(node)
    return [b for value, b in found.items() if value not in tied and b.writers and b.readers]


def channel_maxima(
    model: ir.Model, tensors: Collection[str], feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, NDArray[np.float32]]:
    """Tensor -> largest magnitude of each channel, its axis 1, (C,). Raises: ModelError if the model does not run."""
    found: dict[str, NDArray[np.float32]] = {}
    for values in values_of(model, tensors, feeds):
        for name in tensors:
            x = values[name]
            peak = np.maximum(
                x.max(axis=(0, *range(2, x.ndim))), -x.min(axis=(0, *range(2, x.ndim)))
            )
            found[name] = np.maximum(found.get(name, 0), peak)
    return found


def equalized(
    model: ir.Model, feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> tuple[ir.Model, dict[str, Factors]] | None:
    """A copy that computes the same, with channels more alike wherever they are free; None where none is.

    Beside it, by how much (C,) each tensor that is not as it was has grown. The copy's metadata tells as well, and so
    does that of what is made of it. Raises: ModelError if the model does not run.
    """
    free = bonds(model)
    if not free:
        return None
    maxima = channel_maxima(model, {t for b in free for t in b.heard}, feeds)
    factors: dict[str, Factors] = {}
    for bond in free:
        peaks = [maxima[t] for t in bond.heard]
        if {len(p) for p in peaks} == bond.channels:
            factors[bond.name] = _factors(np.array(peaks, np.float64))
    return _scaled(model, free, factors)


def as_equalized(model: ir.Model, quantized: ir.Model) -> ir.Model:
    """The prepared float model with its channels as those of a model that was made of it; itself if they are.

    Raises: ModelError if the quantized model tells of channels that this one lacks.
    """
    told = quantized.metadata_props.get(METADATA)
    if told is None or told == model.metadata_props.get(METADATA):
        return model
    try:
        factors = {name: _decoded(text) for name, text in json.loads(told).items()}
        free = bonds(model)
        missing = factors.keys() - {
            b.name for b in free if b.channels == {len(factors.get(b.name, ()))}
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{METADATA} in its metadata cannot be read: {error}", hint="Quantize it again"
        ) from error
    if missing:
        tensors = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"was made of a model with other channels of {tensors}", hint="Give its own original"
        )
    return _scaled(model, free, factors)[0]


def _scaled(
    model: ir.Model, free: Iterable[Bond], factors: Mapping[str, Factors]
) -> tuple[ir.Model, dict[str, Factors]]:
    copy = model.clone()
    twins = {n.name: n for n in copy.graph}
    grown: dict[str, Factors] = {}
    for bond in free:
        if bond.name in factors:
            grown |= {str(v.name): factors[bond.name] for v in bond.tensors}
            for node in bond.writers:
                _scale_outputs(twins[node.name], factors[bond.name])
            for node in bond.readers:
                _scale_inputs(twins[node.name], factors[bond.name])
    copy.metadata_props[METADATA] = json.dumps(
        {name: _encoded(found) for name, found in factors.items()}
    )
    return copy, grown


def _encoded(factors: Factors) -> str:
    return base64.b64encode(factors.astype("<f2").tobytes()).decode()


def _decoded(text: str) -> Factors:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)


def _takes_up(node: ir.Node) -> bool:
    """Whether the node multiplies its first input by a constant weight of its own, of which a copy can be scaled."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or graph.is_constant(node.inputs[0]):
        return False
    constants = list(node.inputs[1:])
    alone = all(v is None or (graph.is_constant(v) and len(v.uses()) == 1) for v in constants)
    return alone and graph.is_float_weight(constants[0]) and (
        node.op_type == "Conv" or (not graph.attribute(node, "transA", 0) and len(graph.value(constants[0]).shape) == 2)  # type: ignore[arg-type]
    )  # fmt: skip


def _passes(node: ir.Node) -> bool:
    """Whether the operator makes of channels f times as large a result f times as large, channel by channel."""
    if node.op_type == "Flatten":  # (N, C, 1, 1) to (N, C)
        source = graph.value(node.inputs[0]).producer()
        return (
            source is not None
            and source.op_type == "GlobalAveragePool"
            and graph.attribute(node, "axis", 1) == 1
        )
    return node.op_type in PASSING and len(node.outputs) == 1


def _factors(peaks: NDArray[np.float64]) -> Factors:
    """(C,), at least 1: of several tensors (T, C) the geometric mean; 1 for a channel that never speaks in one.

    float16 holds them, so that metadata can.
    """
    speaks = (peaks > 0).all(0)
    ratios = np.where(speaks, peaks.max(1, keepdims=True) / np.where(speaks, peaks, 1), 1)
    factors = np.clip(np.exp(np.log(ratios).mean(0) / 2), 1, MOST)
    return np.asarray(factors.astype(np.float16), np.float32)


def _groups(node: ir.Node) -> int:
    return int(graph.attribute(node, "group", 1)) if node.op_type == "Conv" else 1


def _reading_axis(node: ir.Node) -> int:
    """The axis of the weight along which it meets the input's channels (of one group)."""
    return 1 if node.op_type == "Conv" or graph.attribute(node, "transB", 0) else 0


def _scale_outputs(node: ir.Node, factors: Factors) -> None:
    for position in (1, 2):
        if len(node.inputs) > position and node.inputs[position] is not None:
            old = graph.array(graph.value(node.inputs[position]))
            _set(node, position, old * factors.reshape(-1, *(1,) * (old.ndim - 1)))


def _scale_inputs(node: ir.Node, factors: Factors) -> None:
    weight, axis, groups = (
        graph.array(graph.value(node.inputs[1])),
        _reading_axis(node),
        _groups(node),
    )
    rows = (
        np.repeat(factors.reshape(groups, -1), len(weight) // groups, axis=0)
        if axis
        else factors[:, None]
    )
    _set(node, 1, weight / rows.reshape(*rows.shape, *(1,) * (weight.ndim - 2)))


def _set(node: ir.Node, position: int, array: NDArray[Any]) -> None:
    value = graph.value(node.inputs[position])
    value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name)
