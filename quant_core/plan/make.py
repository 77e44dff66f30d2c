"""How each node computes, how its weight is stored, and why: decided before anything is measured or rewritten."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from quant_core.calibrate.outliers import Easing
from quant_core.config import QuantConfig, known_keys
from quant_core.errors import ModelError, RequestError
from quant_core.model import graph
from quant_core.numerics.float16 import HALF, half_constants, why_not_half
from quant_core.plan.operators import CAPS, RULES, Rule, channel_axis, why_not_integer
from quant_core.plan.targets import Target, find_target

FLOAT, STATIC, DYNAMIC, BLOCKS = "float", "static", "dynamic", "blocks"
BETWEEN = "runs on 8-bit data between static neighbours"
INT4_COLUMNS = 32  # with fewer, multipliers and scales eat what 4 bits save, and the error is largest (depthwise)
INT8_SHARE = (
    1 / 64
)  # of all weights: the smallest layers save next to nothing in 4 bits, and the first are among them
STORED_BITS = {32: "float32", 16: HALF, 8: "int8", 4: "int4"}


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What becomes of one node.

    compute  float, static (int8, ranges from calibration), dynamic (int8, ranges at run time) or blocks (int4 weights
             by int8, ranges of blocks at run time: best where the input has one row)
    storage  float32, float16, int8 or int4, of its weights; empty where it has none
    reason   why it does not compute in integers, or what it was fused into
    """

    node: str
    op_type: str
    compute: str
    storage: str = ""
    weights: tuple[str, ...] = ()
    elements: int = 0
    reason: str = ""

    @property
    def is_rounded(self) -> bool:
        """Whether its weights become integers."""
        return self.storage.startswith("int")


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """The whole decision for one model; `to_json` and `from_json` are inverse.

    activations  tensor that is quantized -> tensor whose range and parameters it has (itself, or the one that a
                 node which only moves values took it from)
    eased        input of dynamic nodes whose outliers are kept from spoiling the rest -> how (outliers.py)
    means        input of a node with a weight -> the axis of its channels, whose means correct what rounding shifts
    constants    other constants -> float16, or why they stay float32; empty unless float_storage is float16
    equalized_db by how much evening out the channels between Convs (equalize.py) brought outputs nearer to float's, 0
                 where it was not done
    one_scale    weights of dynamic nodes have one scale each, though others have one per channel
    """

    config: QuantConfig
    target: str
    nodes: tuple[NodePlan, ...]
    activations: Mapping[str, str]
    means: Mapping[str, int]
    eased: Mapping[str, Easing] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    equalized_db: float = 0.0
    one_scale: bool = False

    def of(self, node: str) -> NodePlan | None:
        """The plan of that node, None where nothing happens to it."""
        return next((n for n in self.nodes if n.node == node), None)

    @property
    def in_four_bits(self) -> list[str]:
        """The nodes whose weights are stored in 4 bits."""
        return [n.node for n in self.nodes if n.storage == "int4"]

    def to_dict(self) -> dict[str, Any]:
        nodes = [asdict(n) | {"weights": list(n.weights)} for n in self.nodes]
        tensors = {
            "activations": self.activations,
            "means": self.means,
            "eased": {t: asdict(e) for t, e in self.eased.items()},
            "constants": self.constants,
        }
        own: dict[str, Any] = {"config": self.config.to_dict(), "target": self.target}
        own |= {"equalized_db": self.equalized_db, "one_scale": self.one_scale}
        return own | {"nodes": nodes} | {key: dict(value) for key, value in tensors.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantPlan:
        """Raises: RequestError if this is not a plan."""
        try:
            known_keys(cls, values)
            nodes = tuple(NodePlan(**known_keys(NodePlan, n)) for n in values["nodes"])
            config = QuantConfig.from_dict(values["config"])
            target = find_target(values["target"]).name
            eased = {t: Easing(**known_keys(Easing, e)) for t, e in values["eased"].items()}
            tensors = (
                dict(values["activations"]),
                dict(values["means"]),
                eased,
                dict(values["constants"]),
            )
            return cls(
                config,
                target,
                nodes,
                *tensors,
                float(values["equalized_db"]),
                bool(values["one_scale"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"not a plan: {error}", hint="Write one with --dry-run --format json"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> QuantPlan:
        """Raises: RequestError if the text is not a plan."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise RequestError(
                f"not JSON: {error}", "plan", "Write one with --dry-run --format json"
            ) from error


def make_plan(
    model: ir.Model,
    config: QuantConfig,
    target: Target,
    compute: Mapping[str, str] | None = None,
    *,
    eased: Mapping[str, Easing] | None = None,
    one_scale: bool = False,
) -> QuantPlan:
    """The plan of a prepared model: only what onnxruntime really executes in integers on the target.

    `compute` overrides how single nodes compute (what a search found out); a node that cannot, does not. `eased`: how
    outliers of tensors are treated where dynamic nodes read them. `one_scale`: the weights of dynamic nodes, if
    there are any, have one scale each.

    Raises: ModelError if no node has a weight that can be quantized, or a weight holds NaN or inf.
    """
    wanted = compute or {}
    nodes = list(model.graph)
    weighted = {n.name: _weighted(n, config, target, config.mode, wanted.get(n.name or ""))
                for n in nodes if n.op_type in RULES and _weights(n, RULES[n.op_type])}  # fmt: skip
    inner = [
        n
        for g in model.graph.subgraphs()
        for n in g
        if n.op_type in RULES and _weights(n, RULES[n.op_type])
    ]
    weighted |= {n.name: _weighted(n, config, target, "weight_only", None) for n in inner}
    if not weighted:
        raise ModelError("nothing to quantize: no Conv, Gemm, MatMul, recurrent or embedding weight in float32",
                         hint="A float16 model must be converted to float32 first")  # fmt: skip
    weighted |= {n.node: replace(n, storage="int8", compute=DYNAMIC if n.compute == BLOCKS else n.compute,
                                 reason="; ".join(filter(None, (n.reason, "int8: few weights"))))
                 for n in _few(weighted.values(), config)}  # fmt: skip
    static = _static_nodes(
        nodes, {name for name, n in weighted.items() if n.compute == STATIC}, config, wanted
    )
    plans = [
        weighted.get(n.name) or NodePlan(n.name or "", n.op_type, STATIC, reason=BETWEEN)
        for n in nodes if n.name in weighted or n.name in static
    ]  # fmt: skip
    for node in inner:
        if (found := weighted[node.name]) not in plans:
            plans.append(found)
    means = _means(nodes, weighted, config)
    dynamic = {n.node for n in plans if n.compute == DYNAMIC and n.op_type != "LSTM"}
    read = {graph.name_of(n.inputs[0]) for n in nodes if n.name in dynamic}
    kept = {t: way for t, way in (eased or {}).items() if t in read}
    owned = {name for n in plans for name in n.weights}
    constants = half_constants(model, owned) if config.float_storage == HALF else {}
    one_scale = one_scale and any(n.compute == DYNAMIC for n in plans)
    tensors = _activations(nodes, static), means, kept, constants
    return QuantPlan(config, target.name, tuple(plans), *tensors, one_scale=one_scale)


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


def _weights(node: ir.Node, rule: Rule) -> list[ir.Value]:
    """The constant float weights of the node."""
    values = [node.inputs[i] for i in rule.weights if i < len(node.inputs)]
    found = [v for v in values if v is not None and graph.is_float_weight(v)]
    if node.op_type != "Gather":
        return found
    is_table = graph.attribute(node, "axis", 0) == 0 and all(
        len(graph.shape_of(v)) == 2 for v in found
    )
    return found if is_table else []


def _weighted(
    node: ir.Node, config: QuantConfig, target: Target, mode: str, wanted: str | None
) -> NodePlan:
    """How a node with weights computes and stores them."""
    rule = RULES[node.op_type]
    name = node.name or ""
    weights = _weights(node, rule)
    names = tuple(w.name or "" for w in weights)
    elements = sum(math.prod(graph.shape_of(w)) for w in weights)
    stay = NodePlan(name, node.op_type, FLOAT, config.float_storage, names, elements)
    glob = next((g for g in config.exclude if any(fnmatchcase(n, g) for n in (name, *names))), None)
    if glob is not None:
        return _held(stay, weights, f"excluded by {glob}")
    bits, by_name = config.bits, False
    for pattern, layer_bits in config.layer_bits.items():
        if any(fnmatchcase(n, pattern) for n in (name, *names)):
            bits, by_name = layer_bits, True
    if bits in (32, 16):
        return _held(replace(stay, storage=STORED_BITS[bits]), weights, f"layer_bits {bits}")
    if elements < config.min_elements:
        return _held(
            stay, weights, f"{elements} elements, fewer than min_elements {config.min_elements}"
        )
    for weight in weights:
        finite = np.isfinite(graph.array(weight)).all()
        graph.let_go(weight.const_value)
        if not finite:
            raise ModelError(
                f"weight {weight.name} holds NaN or inf",
                name,
                "Export the model again, or exclude it",
            )
    choice, reason = _choose_compute(node, rule, target, mode, wanted)
    if (
        bits == 4
        and not by_name
        and (columns := min(_columns(node, w) for w in weights)) < INT4_COLUMNS
    ):
        bits, reason = (
            8,
            "; ".join(
                filter(None, (reason, f"int8: {columns} weights a channel are too few for 4 bits"))
            ),
        )
    if bits == 4 and _takes_bytes(node, choice, config, target):
        bits, reason = (
            8,
            "; ".join(filter(None, (reason, f"int8: {node.op_type} takes whole bytes"))),
        )
    if choice == BLOCKS and (bits != 4 or _columns(node, weights[0]) % config.block_size):
        choice = DYNAMIC
    return replace(stay, storage=STORED_BITS[bits], compute=choice, reason=reason)


def _takes_bytes(node: ir.Node, compute: str, config: QuantConfig, target: Target) -> bool:
    """Whether 4 bits are not for this node: rows of tables need whole blocks, and an operator of onnxruntime's own."""
    if node.op_type != "Gather":
        return node.op_type == "LSTM" and compute == DYNAMIC
    whole = graph.shape_of(graph.value(node.inputs[0]))[1] % config.block_size == 0
    return not (whole and target.is_onnxruntime and config.runtime == "folded" and config.symmetric)


def _held(stay: NodePlan, weights: list[ir.Value], reason: str) -> NodePlan:
    """The plan of a node that stays float: in float32 where float16 cannot hold its weights."""
    obstacles = (why_not_half(graph.array(w)) for w in weights if stay.storage == HALF)
    if obstacle := next(filter(None, obstacles), ""):
        return replace(stay, storage="float32", reason=f"{reason}; float32: {obstacle}")
    return replace(stay, reason=reason)


def _few(plans: Iterable[NodePlan], config: QuantConfig) -> list[NodePlan]:
    """The smallest of the nodes in 4 bits, which together hold no more than INT8_SHARE of all weights.

    Where a node's bits were asked for by name, they stay.
    """
    plans = list(plans)
    room = INT8_SHARE * sum(n.elements for n in plans)
    found = []
    for plan in sorted((n for n in plans if n.storage == "int4"), key=lambda n: n.elements):
        room -= plan.elements
        if room < 0:
            break
        if not any(
            fnmatchcase(n, glob) for glob in config.layer_bits for n in (plan.node, *plan.weights)
        ):
            found.append(plan)
    return found


def _columns(node: ir.Node, weight: ir.Value) -> int:
    """Weights of one output channel."""
    shape = graph.shape_of(weight)
    return int(np.prod(shape)) // (
        shape[0] * shape[1]
        if node.op_type in ("LSTM", "GRU", "RNN")
        else shape[channel_axis(node, weight)]
    )


def _choose_compute(
    node: ir.Node, rule: Rule, target: Target, mode: str, wanted: str | None
) -> tuple[str, str]:
    """(compute, reason): what was wanted if the node can, else what the mode asks for, else float."""
    obstacle = why_not_integer(node)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is not None and source.op_type == "AveragePool" and why_not_integer(source):
        # a Q behind the pool would make it a QLinearAveragePool, whatever the plan says of the pool
        obstacle = obstacle or f"behind {source.name}: {why_not_integer(source)}"
    if node.op_type == "LSTM" and not target.is_onnxruntime:
        obstacle = f"DynamicQuantizeLSTM is onnxruntime's own, not for {target.name}"
    can = {FLOAT}
    if not obstacle:
        can |= {STATIC} if rule.kind == "anchor" else set()
        can |= {DYNAMIC} if rule.dynamic else set()
        can |= (
            {BLOCKS} if rule.dynamic and node.op_type != "LSTM" and target.is_onnxruntime else set()
        )
    if wanted in can:
        return wanted, "" if wanted != FLOAT else "computes in float: found better"
    if mode == "weight_only":
        return FLOAT, "weight-only"
    order = {"static": (STATIC,), "dynamic": (DYNAMIC,), "auto": (STATIC, DYNAMIC)}[mode]
    chosen = next((c for c in order if c in can), FLOAT)
    if chosen == FLOAT:
        reason = (
            obstacle
            or f"{node.op_type} has no {' or '.join(order)} integer kernel that is faster than float"
        )
        return FLOAT, reason
    return chosen, ""


def _static_nodes(
    nodes: list[ir.Node], anchors: set[str | None], config: QuantConfig, wanted: Mapping[str, str]
) -> set[str | None]:
    """The nodes that read and write 8-bit tensors.

    1. Anchors that compute static do.
    2. Start with every elementwise and moving operator as well; drop one if an input is not 8-bit anyway (written by
       a static node that requantizes, or read by a static anchor), or if nobody static reads its output. Repeat.
    """
    movers = {
        n.name for n in nodes
        if n.op_type in RULES and RULES[n.op_type].kind in ("elementwise", "moves") and not why_not_integer(n)
        and wanted.get(n.name or "") != FLOAT
        and not any(fnmatchcase(n.name or "", g) for g in config.exclude)
    }  # fmt: skip
    by_name = {n.name: n for n in nodes}
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
            n.name for n in live
            if n.name in movers and data_inputs(n) and capped_output(n) in read
            and all(v in written or v in read_by_anchor for v in data_inputs(n))
        }  # fmt: skip
        if kept == movers:
            return static
        movers = kept


def _activations(nodes: list[ir.Node], static: set[str | None]) -> dict[str, str]:
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
    nodes: list[ir.Node], weighted: Mapping[str | None, NodePlan], config: QuantConfig
) -> dict[str, int]:
    """Input tensor -> channel axis, for the nodes whose bias will be corrected."""
    return {
        str(n.inputs[0].name): 1 if n.op_type == "Conv" else -1  # type: ignore[union-attr]
        for n in nodes
        if config.bias_correction and n.name in weighted and weighted[n.name].is_rounded
        and RULES[n.op_type].kind == "anchor" and not graph.is_constant(n.inputs[0]) and not why_not_integer(n)
    }  # fmt: skip
