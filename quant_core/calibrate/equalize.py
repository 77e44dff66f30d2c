"""Cross-layer equalization: scale channels between Convs towards equal ranges, undone in weights.

One scale serves all channels of an activation, so a channel much smaller than the largest gets few
integer levels. A Relu passes every positive factor on, so channel c may be s_c times as large if
the weights that write it are multiplied by s_c and those that read it are divided by s_c; the model
computes the same:

    before  Conv(W1, b1) -> Relu -> Conv(W2, b2)
    after   Conv(s * W1, s * b1) -> Relu -> Conv(W2 / s, b2)

    s_c = sqrt(max over all channels of |x| / max over channel c of |x|), from 1 to MAX_FACTOR

That goes half the way to equal channels: what activations gain, the reading weights lose, as the
columns of a row of W2 share a scale too.

In transformers, what a LayerNormalization writes has the most unequal channels. Its scale and bias
take up the factors if products alone read it; otherwise one multiplication does (`multiplied`):

    before  LayerNormalization(g, b) -> MatMul(W)
    after   LayerNormalization(s * g, s * b) -> MatMul(W / s)

Source: Nagel et al. 2019, Data-Free Quantization (arXiv 1906.04721), section 4.1. There s_c comes
from the ranges of the two weights, which had one scale each; here every channel of a weight has a
scale of its own, only activations still share one, and s_c comes from measured activations. Li et
al. 2023, RepQ-ViT (arXiv 2212.08254), section 3.2, for LayerNormalization; there channels become
all equal, each with a zero point of its own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.scale_groups import (
    ScaleGroup,
    conv_groups,
    input_axis,
    product_groups,
    scale_groups,
)
from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.model.session import Feed
from quant_core.model.values import values_of
from quant_core.optimize.edit import replace_constant
from quant_core.plan.tied import tied_products

METADATA = "quantmill.equalized"  # entry of the model's metadata: JSON, group -> base64 of float16
# What a multiplication must gain in SQNR of a product's input. Judge a change with `python -m
# tests.bench.accuracy --tools "quantmill static"`; not tuned further.
MIN_MULTIPLIED_GAIN_DB = 3.0
# Upper bound of a factor: a channel that is nearly always 0 must not be blown up. Not tuned.
MAX_FACTOR = 8.0

Factors = NDArray[np.float32]
Feeds = Iterable[Feed]


def channel_maxima(
    model: ir.Model, axes: Mapping[str, int], feeds: Feeds
) -> dict[str, NDArray[np.float32]]:
    """Tensor -> largest magnitude of each of its channels, (C,).

    axes  tensor -> the axis of its channels

    Raises: ModelError if the model does not run.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for values in values_of(model, axes, feeds):
        for name, x in values.items():
            rows = np.moveaxis(x, axes[name], -1).reshape(-1, x.shape[axes[name]])
            largest = np.maximum(rows.max(0), -rows.min(0))
            found[name] = np.maximum(found.get(name, 0), largest)
    return found


def equalize(
    model: ir.Model, feeds: Feeds, multiplied: Collection[str] = ()
) -> tuple[ir.Model, dict[str, Factors]] | None:
    """An equalized copy that computes the same, and the factors (C,) of each scaled tensor.

    multiplied  inputs of products that may be scaled by a multiplication, where that gains enough

    None if no tensor can be scaled. The copy's metadata holds the factors too, as does that of
    every model made of it.

    Raises: ModelError if the model does not run.
    """
    tied = tied_products(model.graph)  # scaled, they would be no table any longer
    of_products = [
        group
        for group in product_groups(model)
        if (group.writers or group.name in multiplied)
        and tied.isdisjoint(str(node.name) for node in group.readers)
    ]
    groups = scale_groups(model) + of_products
    measured = {tensor: group.axis for group in groups for tensor in group.quantized_tensors}
    maxima = channel_maxima(model, measured, feeds)
    factors: dict[str, Factors] = {}
    for group in groups:
        peaks = [maxima[tensor] for tensor in group.quantized_tensors]
        if {len(p) for p in peaks} != group.channels:
            continue
        found = equalizing_factors(np.array(peaks, np.float64))
        if group.writers or multiplied_gain_db(group.readers, found) >= MIN_MULTIPLIED_GAIN_DB:
            factors[group.name] = found
    return _scaled(model, groups, factors) if factors else None


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
        groups = scale_groups(model) + product_groups(model)
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

    They are the geometric mean of what each tensor alone would get; 1 for a channel that is always
    0 in one of them. They are rounded to float16, so that metadata holds them exactly.
    """
    is_active = (peaks > 0).all(0)
    ratios = np.where(is_active, peaks.max(1, keepdims=True) / np.where(is_active, peaks, 1), 1)
    factors = np.clip(np.exp(np.log(ratios).mean(0) / 2), 1, MAX_FACTOR)
    return np.asarray(factors.astype(np.float16), np.float32)


def multiplied_gain_db(readers: Iterable[ir.Node], s: Factors) -> float:
    """The dB by which the noise of an input's rounding shrinks in the products that read it, once
    the input is multiplied by s and their weights W (C, K) are divided by it.

    The steps of the rounding stay the same, so that is sum of W^2 over sum of (W / s)^2.
    """
    squares = np.zeros(len(s))
    for node in readers:
        weight = graph.array(graph.value(node.inputs[1]))
        squares += np.square(weight, dtype=np.float64).sum(1 - input_axis(node))
    after = np.sum(squares / np.square(s, dtype=np.float64))
    return float(10 * np.log10(squares.sum() / after)) if after > 0 else 0.0


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
        readers = [copies[node.name] for node in group.readers]
        for node in readers:
            _scale_inputs(node, s)
        if not group.writers:
            _multiply_input(readers, s)
    copy.metadata_props[METADATA] = json.dumps({n: _encoded(s) for n, s in factors.items()})
    return copy, of_tensors


def _encoded(factors: Factors) -> str:
    return base64.b64encode(factors.astype("<f2").tobytes()).decode()


def _decoded(text: str) -> Factors:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)


def _scale_outputs(node: ir.Node, s: Factors) -> None:
    """Multiplies the weight and the bias of a Conv by s, channel by channel."""
    for position in (1, 2):
        value = graph.input_at(node, position)
        if value is not None:
            old = graph.array(value)
            replace_constant(value, old * s.reshape(-1, *(1,) * (old.ndim - 1)))


def _scale_inputs(node: ir.Node, s: Factors) -> None:
    """Divides the weight of a node by s, along the axis of its input's channels."""
    value = graph.value(node.inputs[1])
    weight = graph.array(value)
    if input_axis(node) == 0:
        divisors = s[:, None]
    else:  # (outputs, channels of one group): each group of outputs reads its own channels
        groups = conv_groups(node)
        divisors = np.repeat(s.reshape(groups, -1), len(weight) // groups, axis=0)
    replace_constant(value, weight / divisors.reshape(*divisors.shape, *(1,) * (weight.ndim - 2)))


def _multiply_input(readers: list[ir.Node], s: Factors) -> None:
    """Multiplies what these nodes read by s along its last axis.

    The product takes the name of the tensor, as plans and statistics name what products read.
    """
    value = graph.value(readers[0].inputs[0])
    source, name = value.producer(), str(value.name)
    assert source is not None
    assert source.graph is not None
    factors = graph.initializer(source.graph, f"{name}_factors", s)
    multiply = ir.Node("", "Mul", [value, factors], name=f"{name}_multiplied")
    value.name = f"{name}_unequal"
    product = multiply.outputs[0]
    product.name, product.type, product.shape = name, value.type, value.shape
    for node in readers:
        node.replace_input_with(0, product)
    source.graph.insert_after(source, multiply)
