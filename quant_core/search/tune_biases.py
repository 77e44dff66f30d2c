"""Empirical bias correction: each bias absorbs the mean error that the quantized model really has.

The closed form (rewrite/bias_correction.py) knows what rounding a weight does to mean outputs. It
knows neither what rounding and clipping the inputs does, nor what the layers before leave. Here the
quantized model runs layer by layer:

    b  <-  b + E[float output] - E[quantized output]        per channel, over the samples

and the next layer is measured with the biases before it corrected already. Of a mean over few
samples much is chance, which all layers together would add up to more noise than they take away:
each is shrunk by the share of its square that its variance between samples explains.

Source: Nagel et al. 2019, Data-Free Quantization (arXiv 1906.04721), section 4.2 and its appendix
on empirical bias correction. Here means are those of calibration samples, b moves by whole steps of
its int32 scale, and a clone of the model is corrected. Whether outputs come nearer to the float
model's is judged by whoever asks for it. Shrinking means by what is chance in them is James and
Stein 1961, Estimation with Quadratic Loss, for each channel by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.data.samples import Samples
from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.model.layerwise import LayerwiseRunner
from quant_core.model.values import values_of
from quant_core.plan.operators import RULES
from quant_core.plan.types import Compute, QuantPlan
from quant_core.rewrite.apply import Quantized
from quant_core.rewrite.static_nodes import INT32_MAX


@dataclass(frozen=True, slots=True, eq=False)
class IntegerBias:
    """A bias as constants of the model: int32 values (C,) and their float scale, (C,) or ()."""

    values: ir.Value
    scale: ir.Value


def tune_biases(
    model: ir.Model, quantized: Quantized, plan: QuantPlan, samples: Samples
) -> Quantized | None:
    """A copy of the quantized model with corrected int32 biases; `model` is its float original.

    None if no node has such a bias, or a part of the model does not run by itself.

    Raises: ModelError if the float model does not run.
    """
    copy = quantized.model.clone()
    biases = _integer_biases(copy, {n.node for n in plan.nodes if n.compute == Compute.STATIC})
    if not biases:
        return None
    try:
        _correct(model, copy, biases, samples)
    except ModelError:  # a part that does not run by itself, such as an operator between sequences
        return None
    copies = {n.name: n for n in graph.nodes_of(copy)}
    written = {planned: copies[node.name] for planned, node in quantized.written.items()}
    return replace(quantized, model=copy, written=written)


def _correct(
    model: ir.Model, copy: ir.Model, biases: Mapping[ir.Node, IntegerBias], samples: Samples
) -> None:
    """Corrects the biases of the copy in graph order, each by whole steps of its scale."""
    # by the node's name: the name of its output may stand behind a QuantizeLinear in the copy
    float_outputs = {n.name: str(n.outputs[0].name) for n in model.graph}
    float_means = _sample_means(model, [float_outputs[n.name] for n in biases], samples)
    runner = LayerwiseRunner(copy, samples)
    for node, bias in biases.items():
        output = str(node.outputs[0].name)
        runner.run_until({output})
        found = np.stack([_channel_means(state[output]) for state in runner.states])
        scale = graph.array(bias.scale)
        old = graph.array(bias.values).astype(np.float64)
        steps = np.rint(_shrunk_mean(float_means[float_outputs[node.name]] - found) / scale)
        new = np.clip(old + steps, -INT32_MAX, INT32_MAX)
        bias.values.const_value = ir.tensor(new.astype(np.int32), name=bias.values.name)

        # this node has run already, so that its output is corrected too
        shift = ((new - old) * scale).astype(np.float32)
        for state in runner.states:
            spatial = (1,) * (state[output].ndim - 2)
            state[output] = state[output] + shift.reshape(-1, *spatial)


def _integer_biases(model: ir.Model, static: set[str]) -> dict[ir.Node, IntegerBias]:
    """Node -> its bias, in graph order, where a DequantizeLinear of constants makes it."""
    found = {}
    for node in model.graph:
        if node.name not in static or not node.outputs[0].name:
            continue
        bias = graph.input_at(node, RULES[node.op_type].bias)
        source = bias.producer() if bias is not None else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        values, scale = graph.value(source.inputs[0]), graph.value(source.inputs[1])
        if graph.is_constant(values) and graph.is_constant(scale):
            found[node] = IntegerBias(values, scale)
    return found


def _sample_means(
    model: ir.Model, tensors: Collection[str], samples: Samples
) -> dict[str, NDArray[np.float64]]:
    """Tensor -> the mean of each channel in each sample, (samples, C)."""
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in tensors}
    for values in values_of(model, tensors, samples):
        for name, x in values.items():
            found[name].append(_channel_means(x))
    return {name: np.stack(rows) for name, rows in found.items()}


def _channel_means(x: NDArray[Any]) -> NDArray[np.float64]:
    """(C,) of a tensor (N, C, ...)."""
    axes = (0, *range(2, x.ndim))
    return np.asarray(x.mean(axes, dtype=np.float64))


def _shrunk_mean(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """(C,): the means over samples (n, C), each less by the share of its square that is chance."""
    n = len(differences)
    mean = differences.mean(0)
    chance = differences.var(0, ddof=1) / n if n > 1 else np.zeros_like(mean)
    square = np.square(mean)
    share = np.divide(chance, square, out=np.ones_like(mean), where=square > 0)
    return np.asarray(mean * np.maximum(0.0, 1.0 - share))
