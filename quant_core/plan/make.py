"""How each node computes, how its weight is stored, and why: decided before anything is measured or rewritten."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from quant_core.config import QuantConfig
from quant_core.errors import ModelError
from quant_core.model import files, graph
from quant_core.numerics.float16 import HALF, half_constants, why_not_half
from quant_core.numerics.granularity import Granularity, PerBlock, PerChannel, PerTensor
from quant_core.plan.operators import CAPS, RULES, channel_axis, why_not_integer
from quant_core.plan.targets import TARGETS, Target
from quant_core.plan.types import (
    Compute,
    NodeChoice,
    NodePlan,
    OutlierTreatment,
    QuantPlan,
    Storage,
)

NO_CHOICE = NodeChoice()
BETWEEN = "runs on 8-bit data between static neighbours"
# With fewer columns, multipliers and scales eat what 4 bits save, and the error is largest (depthwise).
INT4_COLUMNS = 32
# Of all weights: the smallest layers save next to nothing in 4 bits, and the first are among them.
INT8_SHARE = 1 / 64
_MODES = {
    "static": (Compute.STATIC,),
    "dynamic": (Compute.DYNAMIC,),
    "auto": (Compute.STATIC, Compute.DYNAMIC),
}


def make_plan(
    model: ir.Model,
    config: QuantConfig,
    target: Target,
    choices: Mapping[str, NodeChoice] | None = None,
    *,
    outliers: Mapping[str, OutlierTreatment] | None = None,
) -> QuantPlan:
    """The plan of a prepared model: only what onnxruntime really executes in integers on the target.

    choices   node -> what a search found out for it; a node that cannot compute or be stored so, is not
    outliers  tensor -> how its outliers are treated, where dynamic nodes read it

    Raises: ModelError if no node has a weight that can be quantized, or a weight holds NaN or inf.
    """
    choices = choices or {}
    nodes = list(model.graph)
    weighted = {
        str(n.name): _weighted(n, config, target, config.mode, choices.get(str(n.name), NO_CHOICE))
        for n in nodes
        if has_weights(n)
    }
    inner = [n for g in model.graph.subgraphs() for n in g if has_weights(n)]
    for node in inner:
        choice = replace(choices.get(str(node.name), NO_CHOICE), compute=None)
        weighted[str(node.name)] = _weighted(node, config, target, "weight_only", choice)
    if not weighted:
        raise ModelError(
            "nothing to quantize: no Conv, Gemm, MatMul, recurrent or embedding weight in float32",
            hint="A float16 model must be converted to float32 first",
        )
    weighted |= {n.node: _in_int8(n, config) for n in _few(weighted.values(), config, choices)}
    anchors = {name for name, n in weighted.items() if n.compute is Compute.STATIC}
    static = _static_nodes(nodes, anchors, config, choices)
    plans = [
        weighted.get(str(n.name))
        or NodePlan(str(n.name), n.op_type, Compute.STATIC, reason=BETWEEN)
        for n in nodes
        if n.name in weighted or n.name in static
    ]
    plans += [weighted[name] for name in dict.fromkeys(str(n.name) for n in inner)]
    dynamic = {n.node for n in plans if n.compute is Compute.DYNAMIC and n.op_type != "LSTM"}
    read_dynamically = {graph.name_of(n.inputs[0]) for n in nodes if n.name in dynamic}
    planned = {name for n in plans for name in n.weights}
    return QuantPlan(
        config=config,
        target=target.name,
        nodes=tuple(plans),
        activations=_activations(nodes, static),
        means=_means(nodes, weighted, config),
        outliers={t: how for t, how in (outliers or {}).items() if t in read_dynamically},
        constants=half_constants(model, planned) if config.float_storage == HALF else {},
        stored={node: choice.storage for node, choice in choices.items() if choice.storage},
    )


def replan(
    model: ir.Model, plan: QuantPlan, changes: Mapping[str, NodeChoice] | None = None
) -> QuantPlan:
    """The plan anew with these changes; what was chosen for all other nodes stays. Raises: as `make_plan`."""
    choices = {
        n.node: NodeChoice(n.compute, plan.stored.get(n.node), n.granularity)
        for n in plan.nodes
        if n.weights
    }
    for node, change in (changes or {}).items():
        before = choices.get(node, NO_CHOICE)
        choices[node] = NodeChoice(
            change.compute or before.compute,
            change.storage or before.storage,
            change.granularity or before.granularity,
        )
    return make_plan(model, plan.config, TARGETS[plan.target], choices, outliers=plan.outliers)


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that carry activations and are not constants."""
    rule = RULES[node.op_type]
    positions: Iterable[int] = rule.data or range(len(node.inputs))
    values = (node.inputs[i] for i in positions if i < len(node.inputs))
    return [v for v in values if v is not None and not graph.is_constant(v)]


def capped_output(node: ir.Node) -> ir.Value:
    """The output of the node or, where a Relu or Clip(0, ...) alone reads it, of that: what will be quantized."""
    out = node.outputs[0]
    readers = graph.consumers(out)
    if RULES[node.op_type].kind == "moves":
        return out  # it has the parameters of its input, which no cap made
    alone = len(readers) == 1 and not out.is_graph_output() and readers[0].graph is node.graph
    if alone and _caps_at_zero(readers[0]):
        return readers[0].outputs[0]
    return out


def _caps_at_zero(node: ir.Node) -> bool:
    if node.op_type not in CAPS:
        return False
    if node.op_type == "Relu":
        return True
    low = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    high = node.inputs[2] if len(node.inputs) > 2 else None
    return low is not None and float(low) == 0 and (high is None or graph.is_constant(high))


def has_weights(node: ir.Node) -> bool:
    """Whether the node has a constant float weight that can be quantized."""
    return node.op_type in RULES and bool(_weights(node))


def _weights(node: ir.Node) -> list[ir.Value]:
    """The constant float weights of the node."""
    positions = RULES[node.op_type].weights
    values = [node.inputs[i] for i in positions if i < len(node.inputs)]
    found = [v for v in values if v is not None and graph.is_float_weight(v)]
    if node.op_type != "Gather":
        return found
    is_table = graph.attribute(node, "axis", 0) == 0 and all(
        len(graph.shape_of(v)) == 2 for v in found
    )
    return found if is_table else []


def _weighted(
    node: ir.Node, config: QuantConfig, target: Target, mode: str, choice: NodeChoice
) -> NodePlan:
    """How a node with weights computes and stores them."""
    name, weights = str(node.name), _weights(node)
    names = tuple(str(w.name) for w in weights)
    elements = sum(math.prod(graph.shape_of(w)) for w in weights)
    stay = NodePlan(
        name, node.op_type, Compute.FLOAT, Storage(config.float_storage), names, elements
    )
    glob = next((g for g in config.exclude if _matches(g, name, *names)), None)
    if glob is not None:
        return _in_float(stay, weights, f"excluded by {glob}")
    named = [bits for glob, bits in config.layer_bits.items() if _matches(glob, name, *names)]
    storage = choice.storage or Storage.of_bits(named[-1] if named else config.bits)
    if not storage.is_integer:
        reason = f"layer_bits {storage.bits}" if named else "in float: found better"
        return _in_float(replace(stay, storage=storage), weights, reason)
    if elements < config.min_elements:
        reason = f"{elements} elements, fewer than min_elements {config.min_elements}"
        return _in_float(stay, weights, reason)
    for weight in weights:
        _check_finite(weight, name)
    compute, reason = _choose_compute(node, target, mode, choice.compute)
    if storage is Storage.INT4:
        is_named = bool(named) or choice.storage is not None
        if obstacle := _why_not_int4(node, weights, compute, config, target, is_named=is_named):
            storage, reason = Storage.INT8, _joined(reason, f"int8: {obstacle}")
    if compute is Compute.BLOCKS:
        whole_blocks = _columns(node, weights[0]) % config.block_size == 0
        if storage is not Storage.INT4 or not whole_blocks:
            compute = Compute.DYNAMIC
    return replace(
        stay,
        storage=storage,
        compute=compute,
        reason=reason,
        granularity=_granularity(storage, compute, config, choice),
    )


def _granularity(
    storage: Storage, compute: Compute, config: QuantConfig, choice: NodeChoice
) -> Granularity:
    """How many of the node's weights share a scale: a choice counts for dynamic nodes in 8 bits."""
    if storage is Storage.INT4:
        return PerBlock(config.block_size)
    if compute is Compute.DYNAMIC and choice.granularity == PerTensor():
        return PerTensor()
    return PerChannel() if config.per_channel else PerTensor()


def _in_int8(planned: NodePlan, config: QuantConfig) -> NodePlan:
    """The plan of a node whose 4 bits save next to nothing."""
    was_blocks = planned.compute is Compute.BLOCKS
    compute = Compute.DYNAMIC if was_blocks else planned.compute
    return replace(
        planned,
        storage=Storage.INT8,
        compute=compute,
        granularity=_granularity(Storage.INT8, compute, config, NO_CHOICE),
        reason=_joined(planned.reason, "int8: few weights"),
    )


def _why_not_int4(
    node: ir.Node,
    weights: list[ir.Value],
    compute: Compute,
    config: QuantConfig,
    target: Target,
    *,
    is_named: bool,
) -> str:
    """Why 4 bits are not for this node, "" if they are; few columns matter only if nobody named it."""
    columns = min(_columns(node, w) for w in weights)
    if columns < INT4_COLUMNS and not is_named:
        return f"{columns} weights a channel are too few for 4 bits"
    if node.op_type == "LSTM" and compute is Compute.DYNAMIC:
        return "LSTM takes whole bytes"
    if node.op_type == "Gather":  # rows of tables need whole blocks, and onnxruntime's operator
        whole_blocks = graph.shape_of(weights[0])[1] % config.block_size == 0
        folds = target.is_onnxruntime and config.runtime == "folded" and config.symmetric
        if not (whole_blocks and folds):
            return "Gather takes whole bytes"
    return ""


def _check_finite(weight: ir.Value, node: str) -> None:
    """Raises: ModelError if the weight holds NaN or inf."""
    finite = np.isfinite(graph.array(weight)).all()
    files.release(weight.const_value)
    if not finite:
        raise ModelError(
            f"weight {weight.name} holds NaN or inf", node, "Export the model again, or exclude it"
        )


def _in_float(stay: NodePlan, weights: list[ir.Value], reason: str) -> NodePlan:
    """The plan of a node that stays float: in float32 where float16 cannot hold its weights."""
    if stay.storage is Storage.FLOAT16:
        obstacles = (why_not_half(graph.array(w)) for w in weights)
        if obstacle := next(filter(None, obstacles), ""):
            reason = f"{reason}; float32: {obstacle}"
            return replace(stay, storage=Storage.FLOAT32, reason=reason)
    return replace(stay, reason=reason)


def _few(
    plans: Iterable[NodePlan], config: QuantConfig, choices: Mapping[str, NodeChoice]
) -> list[NodePlan]:
    """The smallest nodes in 4 bits, which together hold no more than INT8_SHARE of all weights.

    Where a node's bits were chosen by name, they stay.
    """
    plans = list(plans)
    left = INT8_SHARE * sum(n.elements for n in plans)
    found = []
    in_four_bits = (n for n in plans if n.storage is Storage.INT4)
    for planned in sorted(in_four_bits, key=lambda n: n.elements):
        left -= planned.elements
        if left < 0:
            break
        names = (planned.node, *planned.weights)
        is_named = any(_matches(glob, *names) for glob in config.layer_bits)
        if not is_named and choices.get(planned.node, NO_CHOICE).storage is None:
            found.append(planned)
    return found


def _columns(node: ir.Node, weight: ir.Value) -> int:
    """Weights of one output channel."""
    shape = graph.shape_of(weight)
    is_recurrent = node.op_type in ("LSTM", "GRU", "RNN")
    channels = shape[0] * shape[1] if is_recurrent else shape[channel_axis(node, weight)]
    return math.prod(shape) // channels


def _choose_compute(
    node: ir.Node, target: Target, mode: str, chosen: Compute | None
) -> tuple[Compute, str]:
    """(compute, reason): what was chosen if the node can, else what the mode wants, else float."""
    rule, obstacle = RULES[node.op_type], why_not_integer(node)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is not None and source.op_type == "AveragePool" and why_not_integer(source):
        # a Q behind the pool would make it a QLinearAveragePool, whatever the plan says of the pool
        obstacle = obstacle or f"behind {source.name}: {why_not_integer(source)}"
    if node.op_type == "LSTM" and not target.is_onnxruntime:
        obstacle = f"DynamicQuantizeLSTM is onnxruntime's own, not for {target.name}"
    possible = {Compute.FLOAT}
    if not obstacle and rule.kind == "anchor":
        possible.add(Compute.STATIC)
    if not obstacle and rule.dynamic:
        possible.add(Compute.DYNAMIC)
        if node.op_type != "LSTM" and target.is_onnxruntime:
            possible.add(Compute.BLOCKS)
    if chosen in possible and len(possible) > 1:
        return chosen, "" if chosen.is_integer else "computes in float: found better"
    if mode == "weight_only":
        return Compute.FLOAT, "weight-only"
    wanted = _MODES[mode]
    best = next((compute for compute in wanted if compute in possible), None)
    if best is not None:
        return best, ""
    kernels = " or ".join(wanted)
    return (
        Compute.FLOAT,
        obstacle or f"{node.op_type} has no {kernels} integer kernel that is faster than float",
    )


def _matches(glob: str, *names: str) -> bool:
    """Whether one of the names matches the glob."""
    return any(fnmatchcase(name, glob) for name in names)


def _joined(*reasons: str) -> str:
    """The reasons that there are, as one."""
    return "; ".join(filter(None, reasons))


def _static_nodes(
    nodes: list[ir.Node], anchors: set[str], config: QuantConfig, choices: Mapping[str, NodeChoice]
) -> set[str]:
    """The nodes that read and write 8-bit tensors.

    1. Anchors that compute static do.
    2. Start with every elementwise and moving operator as well; drop one if an input is not 8-bit anyway (written by
       a static node that requantizes, or read by a static anchor), or if nobody static reads its output. Repeat.
    """
    movers = {
        str(n.name) for n in nodes
        if n.op_type in RULES and RULES[n.op_type].kind in ("elementwise", "moves") and not why_not_integer(n)
        and choices.get(str(n.name), NO_CHOICE).compute is not Compute.FLOAT
        and not any(_matches(glob, str(n.name)) for glob in config.exclude)
    }  # fmt: skip
    by_name = {str(n.name): n for n in nodes}
    while True:
        static = anchors | movers
        live = [by_name[name] for name in by_name if name in static]
        written = {
            capped_output(n)
            for n in live
            if RULES[n.op_type].kind != "anchor" or RULES[n.op_type].needs_q
        }
        read_by_anchor = {v for n in live if n.name in anchors for v in data_inputs(n)}
        read = {v for n in live for v in data_inputs(n)}
        kept = {
            str(n.name) for n in live
            if n.name in movers and data_inputs(n) and capped_output(n) in read
            and all(v in written or v in read_by_anchor for v in data_inputs(n))
        }  # fmt: skip
        if kept == movers:
            return static
        movers = kept


def _activations(nodes: list[ir.Node], static: set[str]) -> dict[str, str]:
    """Tensor that gets a Q/DQ pair -> tensor whose parameters it has, in graph order."""
    found: dict[str, str] = {}
    for node in nodes:
        if node.name not in static:
            continue
        rule = RULES[node.op_type]
        for value in data_inputs(node):
            found.setdefault(str(value.name), str(value.name))
        out = str(capped_output(node).name)
        if rule.kind == "moves":
            found[out] = found[str(data_inputs(node)[0].name)]
        elif rule.needs_q:
            found.setdefault(out, out)
    return found


def _means(
    nodes: list[ir.Node], weighted: Mapping[str, NodePlan], config: QuantConfig
) -> dict[str, int]:
    """Input tensor -> channel axis, for the nodes whose bias will be corrected."""
    return {
        str(n.inputs[0].name): 1 if n.op_type == "Conv" else -1  # type: ignore[union-attr]
        for n in nodes
        if config.bias_correction and n.name in weighted and weighted[str(n.name)].is_rounded
        and RULES[n.op_type].kind == "anchor" and not graph.is_constant(n.inputs[0]) and not why_not_integer(n)
    }  # fmt: skip
