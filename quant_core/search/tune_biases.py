"""What each bias must still give back, as the quantized model really runs.

The closed form (correct.py) knows what rounding a weight does to a mean, but neither what rounding and clipping its
inputs does nor what layers before it leave. Here the quantized model runs, layer after layer, and each bias takes up
what is left of its channels' mean shift before the next layer is looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.data.samples import Samples
from quant_core.errors import ModelError
from quant_core.evaluate.fidelity import compare, run_all, run_each
from quant_core.model import graph
from quant_core.model.session import open_session, values_of
from quant_core.plan.operators import RULES
from quant_core.plan.types import Compute, QuantPlan
from quant_core.rewrite.apply import INT32_MAX, Quantized
from quant_core.rewrite.sequential import Walk

CLOSE_DB = 40.0  # a hundredth of the signal: nobody would see what is left


def settled(
    model: ir.Model, quantized: Quantized, plan: QuantPlan, samples: Samples
) -> Quantized | None:
    """A copy of the quantized model with other int32 biases; `model` is its float original.

    None if there are no such biases, outputs are close to float's already, a part of the model does not run by itself,
    or outputs come no nearer.
    """
    copy = quantized.model.clone()
    biases = _biases(copy, {n.node for n in plan.nodes if n.compute == Compute.STATIC})
    if not biases:
        return None
    reference = run_all(open_session(model), samples)
    before = _sqnr_db(quantized.model, reference, samples)
    if before > CLOSE_DB:
        return None
    try:
        _settle(model, copy, biases, samples)
    except ModelError:  # an operator between sequences, say
        return None
    if _sqnr_db(copy, reference, samples) <= before:
        return None
    twins = {n.name: n for g in graph.graphs_of(copy) for n in g}
    written = {planned: twins[node.name] for planned, node in quantized.written.items()}
    return replace(quantized, model=copy, written=written)


def _settle(
    model: ir.Model,
    copy: ir.Model,
    biases: Mapping[ir.Node, tuple[ir.Value, ir.Value]],
    samples: Samples,
) -> None:
    """Move the biases of the copy, in graph order."""
    twins = {
        n.name: str(n.outputs[0].name) for n in model.graph
    }  # an output's name may have moved behind its Q
    wanted = _means(model, [twins[n.name] for n in biases], samples)
    walk = Walk((copy,), samples)
    kept = np.arange(len(samples))
    for node, (q, scale) in biases.items():
        out = str(node.outputs[0].name)
        walk.advance({out})
        (states,) = walk.states
        while len(kept) > len(states):
            kept = kept[::2]
        shift = wanted[twins[node.name]][kept].mean(0) - np.mean(
            [_mean(s[out]) for s in states], axis=0
        )
        steps = np.rint(shift / graph.array(scale))
        old = graph.array(q).astype(np.float64)
        new = np.clip(old + steps, -INT32_MAX, INT32_MAX)
        q.const_value = ir.tensor(new.astype(np.int32), name=q.name)
        moved = ((new - old) * graph.array(scale)).astype(np.float32)
        for state in states:
            state[out] = state[out] + moved.reshape(-1, *[1] * (state[out].ndim - 2))


def _biases(model: ir.Model, static: set[str]) -> dict[ir.Node, tuple[ir.Value, ir.Value]]:
    """Node -> the integers of its bias and their scale, where both are constants."""
    found = {}
    for node in model.graph:
        position = RULES[node.op_type].bias if node.name in static else None
        bias = (
            node.inputs[position] if position is not None and len(node.inputs) > position else None
        )
        source = bias.producer() if bias is not None else None
        if source is not None and source.op_type == "DequantizeLinear" and node.outputs[0].name:
            q, scale = graph.value(source.inputs[0]), graph.value(source.inputs[1])
            if graph.is_constant(q) and graph.is_constant(scale):
                found[node] = q, scale
    return found


def _means(
    model: ir.Model, tensors: Collection[str], samples: Samples
) -> dict[str, NDArray[np.float64]]:
    """Tensor -> the mean of each channel in each sample (samples, C)."""
    rows = [
        {name: _mean(values[name]) for name in tensors}
        for values in values_of(model, tensors, samples)
    ]
    return {name: np.stack([row[name] for row in rows]) for name in tensors}


def _sqnr_db(model: ir.Model, reference: list[list[NDArray[Any]]], samples: Samples) -> float:
    session = open_session(model)
    found = compare(
        reference, run_each(session, samples), [o.name for o in session.get_outputs()]
    ).sqnr_db
    return -np.inf if found is None else found


def _mean(x: NDArray[Any]) -> NDArray[np.float64]:
    """Of each channel, axis 1."""
    return np.asarray(x.mean((0, *range(2, x.ndim)), dtype=np.float64))
