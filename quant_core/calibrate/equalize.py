"""Cross-layer equalization: scale channels between Convs towards equal ranges, undone in weights.

One scale serves all channels of an activation, so a channel much smaller than the largest gets few
integer levels. A Relu passes every positive factor on, so channel c may be s_c times as large if
the weights that write it are multiplied by s_c and those that read it are divided by s_c; the model
computes the same:

    Conv(W1, b1) -> Relu -> Conv(W2, b2)    becomes    Conv(s * W1, s * b1) -> Relu -> Conv(W2 / s,
    b2)

    s_c = sqrt(max over all channels of |x| / max over channel c of |x|), from 1 to MAX_FACTOR

That goes half the way to equal channels: what activations gain, the reading weights lose, as the
columns of a row of W2 share a scale too.

Source: Nagel et al. 2019, Data-Free Quantization (arXiv 1906.04721), section 4.1. There s_c comes
from the ranges of the two weights, which had one scale each; here every channel of a weight has a
scale of its own, only activations still share one, and s_c comes from measured activations.
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
from quant_core.model.values import values_of
from quant_core.plan.operators import RULES

RECTIFIERS = frozenset({"Relu", "LeakyRelu"})
# operators with f(s x) = s f(x) for s > 0
SCALE_INVARIANT = RECTIFIERS | {"MaxPool", "AveragePool", "GlobalAveragePool"}
METADATA = "quantmill.equalized"  # entry of the model's metadata: JSON, group -> base64 of float16
# Upper bound of a factor: a channel that is nearly always 0 must not be blown up. Not tuned.
MAX_FACTOR = 8.0

Factors = NDArray[np.float32]
Feeds = Iterable[Mapping[str, NDArray[Any]]]


@dataclass(slots=True)
class ScaleGroup:
    """Tensors that must be scaled by the same factors, and the nodes whose weights absorb them.

    tensors  all values of the group, in graph order
    writers  Convs whose outputs are in the group: their weights and biases are multiplied
    readers  Convs, Gemms and MatMuls that read a tensor of the group: their weights are divided
    """

    tensors: list[ir.Value] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)

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
        written = {_weight_shape(n)[0] for n in self.writers}
        read = {_weight_shape(n)[_input_axis(n)] * _groups(n) for n in self.readers}
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

    unscalable: set[ir.Value] = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        data = [v for v in node.inputs if v is not None and not graph.is_constant(v)]
        adds_two = node.op_type == "Add" and len(data) == 2
        if passes_scale(node) or adds_two:  # 1
            for value in data:
                parents[root_of(value)] = root_of(node.outputs[0])
            continue
        if not absorbs_scale(node):  # 2
            unscalable.update(data)
            unscalable.update(node.outputs)
        elif (
            node.op_type != "Conv"
        ):  # the last axis of a Gemm's or MatMul's output is not axis 1 of an image
            unscalable.update(node.outputs)
    for subgraph in model.graph.subgraphs():
        for node in subgraph:
            unscalable.update(v for v in node.inputs if v is not None)

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
    tied = {root_of(value) for value in unscalable}
    found = [g for root, g in groups.items() if root not in tied and g.writers and g.readers]
    return [group for group in found if len(group.channels) == 1]  # 3


def channel_maxima(
    model: ir.Model, tensors: Collection[str], feeds: Feeds
) -> dict[str, NDArray[np.float32]]:
    """Tensor -> largest magnitude of each channel (axis 1), (C,).

    Raises: ModelError if the model does not run.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for values in values_of(model, tensors, feeds):
        for name, x in values.items():
            axes = (0, *range(2, x.ndim))
            largest = np.maximum(x.max(axis=axes), -x.min(axis=axes))
            found[name] = np.maximum(found.get(name, 0), largest)
    return found


def equalize(model: ir.Model, feeds: Feeds) -> tuple[ir.Model, dict[str, Factors]] | None:
    """An equalized copy that computes the same, and the factors (C,) of each scaled tensor.

    None if no tensor can be scaled.
    The copy's metadata holds the factors too, as does that of every model made of it. Raises:
    ModelError if the model
    does not run.
    """
    groups = scale_groups(model)
    if not groups:
        return None
    measured = {tensor for group in groups for tensor in group.quantized_tensors}
    maxima = channel_maxima(model, measured, feeds)
    factors: dict[str, Factors] = {}
    for group in groups:
        peaks = [maxima[tensor] for tensor in group.quantized_tensors]
        if {len(p) for p in peaks} == group.channels:
            factors[group.name] = equalizing_factors(np.array(peaks, np.float64))
    return _scaled(model, groups, factors)


def equalized_like(model: ir.Model, quantized: ir.Model) -> ir.Model:
    """The prepared float model, equalized as the model that `quantized` was made of.

    It is `model` itself if both are equalized alike, or neither is.

    Raises: ModelError if the quantized model's metadata is not about channels of this model.
    """
    text = quantized.metadata_props.get(METADATA)
    if text is None or text == model.metadata_props.get(METADATA):
        return model
    try:
        factors = {name: _decoded(encoded) for name, encoded in json.loads(text).items()}
        groups = scale_groups(model)
        fitting = {g.name for g in groups if g.channels == {len(factors.get(g.name, ()))}}
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{METADATA} in its metadata cannot be read: {error}", hint="Quantize it again"
        ) from error
    missing = factors.keys() - fitting
    if missing:
        tensors = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"was made of a model with other channels of {tensors}", hint="Give its own original"
        )
    return _scaled(model, groups, factors)[0]


def equalizing_factors(peaks: NDArray[np.float64]) -> Factors:
    """(C,) factors, from 1 to MAX_FACTOR, for T tensors with channel maxima (T, C).

    They are the geometric mean of what each tensor alone would get;
    1 for a channel that is always 0 in one of them. They are rounded to float16, so that metadata
    holds them exactly.
    """
    is_active = (peaks > 0).all(0)
    ratios = np.where(is_active, peaks.max(1, keepdims=True) / np.where(is_active, peaks, 1), 1)
    factors = np.clip(np.exp(np.log(ratios).mean(0) / 2), 1, MAX_FACTOR)
    return np.asarray(factors.astype(np.float16), np.float32)


def absorbs_scale(node: ir.Node) -> bool:
    """Whether the node multiplies its first input by a constant weight that no other node reads."""
    operator = RULES.get(node.op_type)
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
    return not graph.attribute(node, "transA", 0) and len(_weight_shape(node)) == 2


def passes_scale(node: ir.Node) -> bool:
    """Whether f(s x) = s f(x) for positive factors s of the channels."""
    if node.op_type == "Flatten":  # (N, C, 1, 1) to (N, C)
        source = graph.value(node.inputs[0]).producer()
        is_pooled = source is not None and source.op_type == "GlobalAveragePool"
        return is_pooled and graph.attribute(node, "axis", 1) == 1
    return node.op_type in SCALE_INVARIANT and len(node.outputs) == 1


def _scaled(
    model: ir.Model, groups: Iterable[ScaleGroup], factors: Mapping[str, Factors]
) -> tuple[ir.Model, dict[str, Factors]]:
    """A copy with these groups scaled, by group name, and the factors of each tensor in them."""
    copy = model.clone()
    copies = {n.name: n for n in copy.graph}
    of_tensors: dict[str, Factors] = {}
    for group in groups:
        if group.name not in factors:
            continue
        s = factors[group.name]
        for value in group.tensors:
            of_tensors[str(value.name)] = s
        for node in group.writers:
            _scale_outputs(copies[node.name], s)
        for node in group.readers:
            _scale_inputs(copies[node.name], s)
    copy.metadata_props[METADATA] = json.dumps({n: _encoded(s) for n, s in factors.items()})
    return copy, of_tensors


def _encoded(factors: Factors) -> str:
    return base64.b64encode(factors.astype("<f2").tobytes()).decode()


def _decoded(text: str) -> Factors:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)


def _weight_shape(node: ir.Node) -> tuple[int, ...]:
    return graph.shape_of(graph.value(node.inputs[1]))


def _groups(node: ir.Node) -> int:
    return int(graph.attribute(node, "group", 1)) if node.op_type == "Conv" else 1


def _input_axis(node: ir.Node) -> int:
    """The axis of the weight along which the input's channels (of one group) lie."""
    return 1 if node.op_type == "Conv" or graph.attribute(node, "transB", 0) else 0


def _scale_outputs(node: ir.Node, s: Factors) -> None:
    """Multiplies the weight and the bias of a Conv by s, channel by channel."""
    for position in (1, 2):
        if len(node.inputs) > position and node.inputs[position] is not None:
            old = graph.array(graph.value(node.inputs[position]))
            _set_constant(node, position, old * s.reshape(-1, *(1,) * (old.ndim - 1)))


def _scale_inputs(node: ir.Node, s: Factors) -> None:
    """Divides the weight of a node by s, along the axis of its input's channels."""
    weight = graph.array(graph.value(node.inputs[1]))
    if _input_axis(node) == 0:
        divisors = s[:, None]
    else:  # (outputs, channels of one group): each group of outputs reads its own channels
        groups = _groups(node)
        divisors = np.repeat(s.reshape(groups, -1), len(weight) // groups, axis=0)
    _set_constant(node, 1, weight / divisors.reshape(*divisors.shape, *(1,) * (weight.ndim - 2)))


def _set_constant(node: ir.Node, position: int, array: NDArray[Any]) -> None:
    value = graph.value(node.inputs[position])
    value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name)
