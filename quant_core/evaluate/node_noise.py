"""The noise that quantization adds to the output of each node, measured by running both models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quant_core.calibrate.equalize import equalized_like
from quant_core.data.samples import Samples
from quant_core.errors import ModelError
from quant_core.evaluate.sensitivity import NodeNoise, Sensitivity, sensitivities
from quant_core.model import graph
from quant_core.model.session import open_session, run, sizes_of
from quant_core.plan.operators import RULES

Feed = Mapping[str, NDArray[Any]]
Feeds = Samples | Sequence[Feed]

# Of the tensors that are measured at a time, for one feed; small beside what onnxruntime takes.
MAX_PART_BYTES = 32 << 20
UNKNOWN_BYTES = MAX_PART_BYTES >> 5  # of a tensor whose size shapes do not tell
_COMPUTED = "/computed"  # suffix of a tensor that the quantized model computes; see `_isolated`


def measure_sensitivity(model: ir.Model, quantized: ir.Model, feeds: Feeds) -> list[Sensitivity]:
    """The sensitivity of each node over all feeds. Arguments and errors are `measure_noise`'s."""
    return sensitivities([measure_noise(model, quantized, feeds)])


def measure_noise(model: ir.Model, quantized: ir.Model, feeds: Feeds) -> list[NodeNoise]:
    """One row for each node with a float output that both models have, in graph order.

    model      the prepared float model, which names tensors as the quantized one does
    quantized  the model made from it; its metadata hold the scale factors of equalized channels
    feeds      they are read once for each part

    For each feed the quantized model runs twice: as it is, for the cumulative noise, and with every
    shared tensor replaced by the float model's values, for the isolated noise. Where the tensors of
    a feed are large, part of them is measured at a time.

    Raises: ModelError if a model does not run, or if `quantized` was not made from `model`.
    """
    model = equalized_like(model, quantized)
    nodes = {str(graph.first_output(n).name): n for n in model.graph if n.op_type in RULES}
    shared = _shared_tensors(quantized, nodes.keys())
    visible = {str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)}
    inner = [name for name in shared if name not in visible]
    float_session = open_session(model, outputs=inner, packed=False)
    cumulative_session = open_session(quantized, outputs=inner, packed=False)
    types = {output.name: output.type for output in float_session.get_outputs()}
    shared = [name for name in shared if types[name] == "tensor(float)"]
    if not shared or not len(feeds):
        return []
    squares: dict[str, list[tuple[float, float, float]]] = {name: [] for name in shared}
    for part in _parts(model, feeds[0], shared):
        isolated_session = open_session(_isolated(quantized, shared, part), packed=False)
        cut = [i.name for i in isolated_session.get_inputs()]
        read = dict.fromkeys([*part, *(name for name in cut if name in types)])
        for feed in feeds:
            exact = _run_by_name(float_session, feed, [*read])
            inputs = {name: x for name, x in (dict(feed) | exact).items() if name in cut}
            isolated = _run_by_name(isolated_session, inputs)
            cumulative = _run_by_name(cumulative_session, feed, part)
            for name in part:
                x, alone, whole = exact[name], isolated.get(name + _COMPUTED), cumulative[name]
                if alone is None or not alone.shape == x.shape == whole.shape:
                    continue
                signal = _square(x[np.isfinite(x)])
                squares[name].append((signal, _noise(x, alone), _noise(x, whole)))

    return [
        NodeNoise(str(node.name), node.op_type, *zip(*squares[name], strict=True))
        for name, node in nodes.items()
        if squares.get(name)
    ]


def _shared_tensors(quantized: ir.Model, names: Iterable[str]) -> list[str]:
    """Those of the names that the quantized model computes: inner tensors, then its outputs."""
    wanted = set(names)
    computed = [v for node in quantized.graph for v in node.outputs if v.name in wanted]
    inner = [str(v.name) for v in computed if not v.is_graph_output()]
    return inner + [str(v.name) for v in quantized.graph.outputs if v.name in wanted]


def _parts(model: ir.Model, feed: Feed, tensors: list[str]) -> list[list[str]]:
    """The tensors in parts of at most MAX_PART_BYTES for this feed, or of one tensor."""
    sizes: Mapping[str, int | None] = {}
    with suppress(ModelError):  # shapes that contradict the feed tell nothing
        sizes = sizes_of(model, tensors, feed)
    parts: list[list[str]] = []
    left = 0
    for name in tensors:
        size_bytes = sizes.get(name)
        if size_bytes is None:
            size_bytes = UNKNOWN_BYTES
        if size_bytes > left:
            parts.append([])
            left = MAX_PART_BYTES
        parts[-1].append(name)
        left -= size_bytes
    return parts


def _isolated(quantized: ir.Model, tensors: list[str], part: list[str]) -> ir.Model:
    """The model cut at each of these tensors, so that no node reads what another one computes; it
    computes those of one part.

    Before:  node_1 -> t -> node_2
    After:   node_1 -> t/computed (an output);  t (an input) -> node_2
    """
    copy = quantized.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    outputs = []
    for name in tensors:
        computed = values[name]
        computed.name = name + _COMPUTED
        given = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
        for use in list(computed.uses()):
            use.node.replace_input_with(use.idx, given)
        if given.uses():
            copy.graph.inputs.append(given)
        computed.type = ir.TensorType(ir.DataType.FLOAT)
        if name in part:
            outputs.append(computed)
    copy.graph.outputs[:] = outputs
    graph.drop_unused(copy)
    for value in [v for v in copy.graph.inputs if not v.uses()]:
        copy.graph.inputs.remove(value)
    return copy


def _run_by_name(
    session: ort.InferenceSession, feed: Feed, names: list[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The outputs of these names, or all."""
    wanted = [output.name for output in session.get_outputs()] if names is None else names
    return dict(zip(wanted, run(session, feed, outputs=wanted), strict=True))


def _noise(exact: NDArray[Any], found: NDArray[Any]) -> float:
    """Sum of squared changes where the float model's values are finite; infinite if one is not."""
    known = np.isfinite(exact)
    change = found[known].astype(np.float64) - exact[known]
    return _square(change) if np.isfinite(change).all() else math.inf


def _square(x: NDArray[Any]) -> float:
    """Sum of squares in float64."""
    return float(np.square(x, dtype=np.float64).sum())
