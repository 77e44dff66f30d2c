"""The noise that quantization adds to the output of each node, measured by running both models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.equalize import equalized_like
from quant_core.data.samples import Samples
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.evaluate.sensitivity import NodeNoise, Sensitivity, sensitivities
from quant_core.model import graph
from quant_core.model.session import Feed, open_session
from quant_core.model.subgraph import nodes_before, producers_of, reads
from quant_core.model.values import PartwiseRunner, Piece, parts_of
from quant_core.plan.flat_ends import EVERYWHERE, flat_ends
from quant_core.plan.operators import rule_of

Feeds = Samples | Sequence[Feed]

# Suffix of a tensor that the quantized model computes; see `_isolated`. No model has such a name.
_COMPUTED = " (computed by quantmill)"
_CHUNK = 1 << 15  # values at a time
ENOUGH_S = 5.0  # of a slow model one feed tells what a report needs; not tuned


def measure_sensitivity(model: ir.Model, quantized: ir.Model, feeds: Feeds) -> list[Sensitivity]:
    """The sensitivity of each node over all feeds. Arguments and errors are `measure_noise`'s."""
    return sensitivities([measure_noise(model, quantized, feeds)])


def isolated_db(model: ir.Model, quantized: ir.Model, feeds: Feeds) -> dict[str, float]:
    """Node -> SQNR of what it adds alone, in dB: `Sensitivity.isolated_db`, without running the
    quantized model as a whole. Arguments and errors are `measure_noise`'s.
    """
    found = sensitivities([_measure(model, quantized, feeds, is_cumulative=False)])
    return {node.node: node.isolated_db for node in found}


def measure_noise(
    model: ir.Model, quantized: ir.Model, feeds: Feeds, deadline: Deadline = NO_DEADLINE
) -> list[NodeNoise]:
    """One row for each node with a float output that both models have, in graph order.

    model      the prepared float model, which names tensors as the quantized one does
    quantized  the model made from it; its metadata hold the scale factors of equalized channels
    deadline   when it should end, after ENOUGH_S at the latest: then it is of fewer feeds, at least
               of one

    For each feed the quantized model runs twice: as it is, for the cumulative noise, and with every
    shared tensor replaced by the float model's values, for the isolated noise. An output is
    compared as its readers see it: rounded where they read integers, and clipped to its flat ends.

    Raises: ModelError if a model does not run, or if `quantized` was not made from `model`.
    """
    until = deadline.at_most(ENOUGH_S)
    return _measure(model, quantized, feeds, is_cumulative=True, deadline=until)


def _measure(
    model: ir.Model,
    quantized: ir.Model,
    feeds: Feeds,
    *,
    is_cumulative: bool,
    deadline: Deadline = NO_DEADLINE,
) -> list[NodeNoise]:
    """As `measure_noise`; unless `is_cumulative`, the isolated noise counts as cumulative too."""
    model = equalized_like(model, quantized)
    nodes = {str(graph.first_output(n).name): n for n in model.graph if rule_of(n)}
    shared = _shared_tensors(model, quantized, nodes.keys())
    if not shared or not len(feeds):
        return []
    ends = {name: flat_ends(graph.first_output(nodes[name])) for name in shared}
    squares: dict[str, list[tuple[float, float, float]]] = {name: [] for name in shared}
    found = _outputs(
        model, quantized, shared, feeds, is_cumulative=is_cumulative, deadline=deadline
    )
    for name, values in found:
        if len({x.shape for x in values}) > 1:
            continue
        if ends[name] != EVERYWHERE:
            values = [np.clip(x, *ends[name]) for x in values]
        known = np.isfinite(values[0])
        exact, *changed = (x.ravel() if known.all() else x[known] for x in values)
        noises = [_noise(exact, x) for x in changed]
        squares[name].append((_square(exact), noises[0], noises[-1]))
    return [
        NodeNoise(str(node.name), node.op_type, *zip(*squares[name], strict=True))
        for name, node in nodes.items()
        if squares.get(name)
    ]


def _outputs(
    model: ir.Model,
    quantized: ir.Model,
    tensors: list[str],
    feeds: Feeds,
    *,
    is_cumulative: bool,
    deadline: Deadline,
) -> Iterator[tuple[str, list[NDArray[Any]]]]:
    """Each of these tensors for each feed: its name, its values in float, with the noise of its
    node alone and, if `is_cumulative`, with the noise of all before it.

    The models run part by part; a tensor that the cut model does not compute is left out.
    """
    parts = parts_of(model, tensors, feeds[0])
    pieces = _isolated(quantized, tensors, parts)
    given = {i.name for i in model.graph.inputs}
    read = [
        [*dict.fromkeys((*part, *(name for name in _read_by(piece) if name not in given)))]
        for part, piece in zip(parts, pieces, strict=True)
    ]
    in_float = PartwiseRunner(model, read, packed=False)
    made = {str(v.name): v for node in quantized.graph for v in node.outputs}
    as_read = {name: str(_as_read(made[name]).name) for name in tensors}
    whole_parts = [[as_read[name] for name in part] if is_cumulative else [] for part in parts]
    in_integers = PartwiseRunner(quantized, whole_parts, packed=False)
    for feed in deadline.limit(feeds):
        runs = zip(in_float.run(feed), in_integers.run(feed), strict=True)
        for part, (exact, whole), piece in zip(parts, runs, pieces, strict=True):
            alone = piece.run(dict(feed) | exact)
            for name in part:
                if name + _COMPUTED in alone:
                    cumulative = [whole[as_read[name]]] if is_cumulative else []
                    yield name, [exact[name], alone[name + _COMPUTED], *cumulative]


def _shared_tensors(model: ir.Model, quantized: ir.Model, names: Iterable[str]) -> list[str]:
    """The names of float tensors that both models compute, inner tensors first and outputs last."""
    wanted = set(names)
    computed = [v for node in quantized.graph for v in node.outputs if v.name in wanted]
    shared = [str(v.name) for v in computed if not v.is_graph_output()]
    shared += [str(v.name) for v in quantized.graph.outputs if v.name in wanted]
    visible = {str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)}
    inner = [name for name in shared if name not in visible]
    # onnxruntime alone knows the types of tensors whose types the file does not tell.
    found = open_session(model, outputs=inner, optimize=False).get_outputs()
    in_float = {output.name for output in found if output.type == "tensor(float)"}
    return [name for name in shared if name in in_float]


def _isolated(quantized: ir.Model, tensors: list[str], parts: list[list[str]]) -> list[Piece]:
    """What computes each part of the tensors in the model that is cut at each of them, so that no
    node reads what another one computes.

    Before:  node_1 -> t -> node_2
    After:   node_1 -> t (computed by quantmill), an output;  t (an input) -> node_2
    """
    copy = quantized.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    for name in tensors:
        computed = _as_read(values[name])
        values[name].name = f"{name}/exact"
        computed.name = name + _COMPUTED
        given = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
        for use in list(computed.uses()):
            use.node.replace_input_with(use.idx, given)
        copy.graph.inputs.append(given)
        computed.type = ir.TensorType(ir.DataType.FLOAT)
    producers = producers_of(copy)
    pieces = []
    for part in parts:
        outputs = {name + _COMPUTED for name in part}
        before = nodes_before(outputs, producers, ())
        nodes = [node for node in copy.graph if node in before]
        pieces.append(Piece(copy, nodes, outputs, partial(open_session, packed=False)))
    return pieces


def _read_by(piece: Piece) -> list[str]:
    """The names of the inputs of the cut model that the piece reads, each once."""
    read = dict.fromkeys(v for node in piece.nodes for v in reads(node))
    return [str(v.name) for v in read if v.is_graph_input() and v.const_value is None]


def _as_read(value: ir.Value) -> ir.Value:
    """What all readers get of the value: rounded, where a node that computes in integers writes it
    and one DequantizeLinear reads it.
    """
    producer = value.producer()
    readers = graph.consumers(value)
    if producer is None or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return value
    if not any(graph.is_dequantized(read) for read in producer.inputs):
        return value
    back = graph.consumers(readers[0].outputs[0])
    return back[0].outputs[0] if len(back) == 1 else value


def _noise(exact: NDArray[Any], found: NDArray[Any]) -> float:
    """Sum of squared changes of finite values; infinite if one is not finite."""
    square = 0.0
    for part in _parts(exact):
        change = np.subtract(found[part], exact[part], dtype=np.float64)
        square += float(np.dot(change, change))
    return square if math.isfinite(square) else math.inf


def _square(x: NDArray[Any]) -> float:
    """Sum of squares in float64."""
    wide = (x[part].astype(np.float64) for part in _parts(x))
    return sum(float(np.dot(values, values)) for values in wide)


def _parts(x: NDArray[Any]) -> Iterator[slice]:
    """Slices of a flat tensor, of which what is computed stays in the cache."""
    return (slice(start, start + _CHUNK) for start in range(0, x.size, _CHUNK))
