"""Which node costs how much: what each adds by itself, and what has added up by then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.equalize import equalized_like
from quant_core.evaluate.power import NodeDamage, NodePower, damage_of
from quant_core.model import graph
from quant_core.model.session import open_session, run
from quant_core.plan.operators import RULES


def damage(
    model: ir.Model, quantized: ir.Model, feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> list[NodeDamage]:
    """What `powers` finds, in dB. Raises: as it does."""
    return damage_of([powers(model, quantized, feeds)])


def powers(
    model: ir.Model, quantized: ir.Model, feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> list[NodePower]:
    """One row per node whose output both models have, in graph order.

    model      the prepared float model, which names tensors as the quantized one does
    quantized  its child, whose metadata tells what became of channels (equalize.py). It is run twice: as it is, and
               cut at every shared tensor, so that each node gets what float would give it; both in one pass

    Raises: ModelError if a model does not run, or they are not of one making.
    """
    model = equalized_like(model, quantized)
    nodes = {str(n.outputs[0].name): n for n in model.graph if n.op_type in RULES}
    shared = [
        str(v.name)
        for n in quantized.graph
        for v in n.outputs
        if v.name in nodes and not v.is_graph_output()
    ]
    shared += [str(v.name) for v in quantized.graph.outputs if v.name in nodes]
    known = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
    inner = [t for t in shared if t not in known]
    float_session = open_session(model, outputs=inner, packed=False)
    whole = open_session(quantized, outputs=inner, packed=False)
    kinds = {o.name: o.type for o in float_session.get_outputs()}
    shared = [t for t in shared if kinds[t] == "tensor(float)"]
    cut = open_session(_cut(quantized, shared), packed=False)
    wanted_inputs = {i.name for i in cut.get_inputs()}
    found: dict[str, list[tuple[float, float, float]]] = {t: [] for t in shared}
    for feed in feeds:
        exact = _values(float_session, feed)
        inputs = {k: v for k, v in (dict(feed) | exact).items() if k in wanted_inputs}
        alone = {k.removesuffix(_MADE): v for k, v in _values(cut, inputs).items()}
        so_far = _values(whole, feed)
        for t in shared:
            if t in alone and alone[t].shape == exact[t].shape == so_far[t].shape:
                x = exact[t]
                found[t].append((_square(x), _square(alone[t] - x), _square(so_far[t] - x)))
    order = [t for t in nodes if found.get(t)]
    return [
        NodePower(str(nodes[t].name), nodes[t].op_type, *zip(*found[t], strict=True)) for t in order
    ]


_MADE = "/made"


def _cut(quantized: ir.Model, tensors: list[str]) -> ir.Model:
    """The model with each of these tensors read from outside, and what it makes of them given under NAME/made."""
    copy = quantized.clone()
    made = {str(v.name): v for n in copy.graph for v in n.outputs}
    outputs = []
    for name in tensors:
        value = made[name]
        value.name = f"{name}{_MADE}"
        outside = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, outside)
        if outside.uses():
            copy.graph.inputs.append(outside)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        outputs.append(value)
    copy.graph.outputs[:] = outputs
    graph.drop_unused(copy)
    for value in [v for v in copy.graph.inputs if not v.uses()]:
        copy.graph.inputs.remove(value)
    return copy


def _values(session: Any, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return dict(zip((o.name for o in session.get_outputs()), run(session, feed), strict=True))


def _square(x: NDArray[Any]) -> float:
    return float(np.square(x, dtype=np.float64).sum())
