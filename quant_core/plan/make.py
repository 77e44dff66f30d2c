"""How each node computes, how its weight is stored, and why: decided before anything is measured or
rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from quant_core.config import QuantConfig
from quant_core.errors import ModelError
from quant_core.model import files, graph
from quant_core.model.compact import made_of_constants
from quant_core.model.origins import matches, origins_of
from quant_core.model.qat import respects_pairs
from quant_core.model.to_float32 import stores_float16
from quant_core.numerics.float16 import FLOAT16, float16_constants, is_float16, why_not_float16
from quant_core.numerics.gptq import parts_of
from quant_core.numerics.granularity import Granularity, PerBlock, PerChannel, PerTensor
from quant_core.numerics.round_nearest import block_width
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.optimize.applied import Applied, former_names
from quant_core.plan.operators import (
    CAPS,
    KERNEL_BLOCKS,
    RULES,
    DynamicPattern,
    Kind,
    is_depthwise,
    mean_axis,
    weight_layout,
    weight_positions,
    why_not_integer,
)
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
BIAS_BYTES = 8  # of one channel's bias: int32 and its scale
# Of the bytes of a weight in int8: copies of its bias that take more are worth a common range. Not
# tuned: the steps of an unrolled loop are far above it, heads of a detector far below.
LARGE_BIASES = 0.125
BETWEEN = "runs on 8-bit data between static neighbours"
# Weights of an output channel: with fewer, multipliers and scales take the bytes that 4 bits save,
# and the rounding error is largest (depthwise). Judge a change with `python -m tests.bench.int4`.
MIN_INT4_COLUMNS = 32
# Of all weights: the smallest layers together save next to nothing in 4 bits, and the first are
# among them.
INT8_SHARE = 1 / 64
LARGE_SHARE = 0.01  # of all constants: one that stays float has its reason in the plan
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
    rewrites: Sequence[Applied] = (),
) -> QuantPlan:
    """The plan of a prepared model: only what onnxruntime really executes in integers on the
    target.

    choices   node -> what a search chose for it; a choice that the node cannot follow has no effect
    outliers  tensor -> how its outliers are treated, where dynamic nodes read it
    rewrites  how the model was rewritten before: globs of the config may name what it was made of

    1. Each node with weights: how it computes, how its weights are stored, rounded and shared out
    to scales.
    2. Nodes with weights in branches store them in fewer bits, and compute in float.
    3. Of the nodes in 4 bits, the smallest go back to 8. No weight is stored as integers and float.
    4. Nodes without weights run on 8-bit data where their neighbours do.
    5. Activations that are quantized, and the inputs whose means or outliers matter.
    6. Other constants that are stored as float16, and why large ones stay as they are.

    Raises: ModelError if no node has a weight that can be quantized.
    """
    nodes = list(model.graph)
    own = [n for n in nodes if has_weights(n)]
    inner = [n for g in model.graph.subgraphs() for n in g if has_weights(n)]
    choices = dict(choices or {})
    for name in choices.keys() & {str(n.name) for n in inner}:
        choices[name] = replace(choices[name], compute=None)  # branches compute in float
    known_as = _known_as(former_names(rewrites), origins_of(model))
    decide = _Decider(config, target, choices, stores_float16(model), known_as)

    weighted = {str(n.name): decide.node(n, config.mode) for n in own}  # 1
    weighted |= {str(n.name): decide.node(n, "weight_only") for n in inner}  # 2
    if not weighted and not respects_pairs(model) and not _made_weights(model):
        raise _nothing_to_quantize(model)
    smallest = decide.smallest(weighted.values())  # 3
    weighted |= {
        str(n.name): decide.in_int8(n, weighted) for n in own + inner if n.name in smallest
    }
    _keep_shared_in_float(own + inner, weighted)

    anchors = {name for name, n in weighted.items() if n.compute is Compute.STATIC}
    static = _static_nodes(nodes, anchors, config, choices, known_as)  # 4
    plans = [
        weighted.get(str(n.name))
        or NodePlan(str(n.name), n.op_type, Compute.STATIC, reason=BETWEEN)
        for n in nodes
        if n.name in weighted or n.name in static
    ]
    plans += [weighted[name] for name in dict.fromkeys(str(n.name) for n in inner)]

    read_dynamically = {  # 5
        graph.name_of(n.inputs[0]) for n in nodes if n.name in weighted and _is_dynamic(weighted, n)
    }
    planned = {name for n in plans for name in n.weights}
    float16 = config.float_storage == FLOAT16
    constants = {}
    if float16 or stores_float16(model):
        constants = float16_constants(model, planned, exactly=not float16)  # 6
    constants = _why_constants_stay(model, planned) | constants
    return QuantPlan(
        config=config,
        target=target.name,
        nodes=tuple(plans),
        activations=_activations(nodes, static),
        means=_means(nodes, weighted, config),
        outliers={t: how for t, how in (outliers or {}).items() if t in read_dynamically},
        constants=constants,
        stored={node: choice.storage for node, choice in choices.items() if choice.storage},
        rewrites=tuple(rewrites),
    )


def _why_constants_stay(model: ir.Model, planned: set[str]) -> dict[str, str]:
    """Large float constants that are no node's weight -> why they stay float32.

    Weights that nodes make of fewer bytes are among them.
    """
    inner = list(graph.graphs_of(model))
    constants = [v for g in inner for v in g.initializers.values() if graph.is_float_weight(v)]
    least = LARGE_SHARE * files.constant_bytes(model)
    found = {}
    for value in constants:
        assert value.const_value is not None
        if value.name not in planned and value.const_value.nbytes >= least:
            readers = sorted({node.op_type for node in graph.consumers(value)})
            of = " and ".join(readers) or "nothing"
            found[str(value.name)] = f"float32: an operand of {of}, not a weight"
    for name in _made_weights(model):
        found[name] = "float32: nodes make it of fewer bytes than its integers have"
    return found


def replan(
    model: ir.Model, plan: QuantPlan, changes: Mapping[str, NodeChoice] | None = None
) -> QuantPlan:
    """The plan anew with these changes; what was chosen for all other nodes stays. Raises: as
    `make_plan`.
    """
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
    return make_plan(
        model,
        plan.config,
        TARGETS[plan.target],
        choices,
        outliers=plan.outliers,
        rewrites=plan.rewrites,
    )


def _nothing_to_quantize(model: ir.Model) -> ModelError:
    """Why no node of the model has a weight that can be quantized."""
    nodes = [node for g in graph.graphs_of(model) for node in g]
    if graph.is_quantized(model):
        return ModelError("the model is quantized already", hint="Start from its float original")
    trees = next((n.op_type for n in nodes if n.op_type.startswith("TreeEnsemble")), None)
    if trees is not None:
        return ModelError(
            f"nothing to quantize: {trees} compares with thresholds, and multiplies nothing",
            hint="Trees are small and fast as they are",
        )
    left = next((n for n in nodes if n.op_type == "Gemm" and _is_on_left(n)), None)
    if left is not None:
        return ModelError(
            f"nothing to quantize: the weight of {left.op_type} is its left operand",
            str(left.name),
            "Weights are quantized as right operands: transpose the product",
        )
    others = sorted({n.op_type for n in nodes})
    shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
    return ModelError(
        f"nothing to quantize: none of its operators ({shown}) has a weight of its own",
        hint=f"Weights are constants of {', '.join(n for n in RULES if RULES[n].weights)}",
    )


def _made_weights(model: ir.Model) -> list[str]:
    """The weights that nodes make of constants, which take fewer bytes (model/compact.py)."""
    if graph.is_quantized(model):
        return []
    nodes = [n for inside in graph.graphs_of(model) for n in inside if n.op_type in RULES]
    operands = [v for n in nodes for i in weight_positions(n) for v in n.inputs[i : i + 1]]
    made = made_of_constants(model)
    carried: set[ir.Value] = set()  # of a weight that has a node of its own
    for value, node in made.items():
        if node.op_type == "Identity" or not carried.isdisjoint(v for v in node.inputs if v):
            carried.add(value)
    return list(dict.fromkeys(str(v.name) for v in operands if v in made and v not in carried))


def _is_on_left(node: ir.Node) -> bool:
    return graph.is_float_weight(node.inputs[0])


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that carry activations and are not constants."""
    rule = RULES[node.op_type]
    positions: Iterable[int] = rule.data or range(len(node.inputs))
    values = (node.inputs[i] for i in positions if i < len(node.inputs))
    return [v for v in values if v is not None and not graph.is_constant(v)]


def capped_output(node: ir.Node) -> ir.Value:
    """The output of the node or, where a Relu or Clip(0, ...) alone reads it, of that: what will be
    quantized.
    """
    out = node.outputs[0]
    readers = graph.consumers(out)
    if RULES[node.op_type].kind is Kind.MOVES:
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
    rule = RULES[node.op_type]
    values = [node.inputs[i] for i in weight_positions(node) if i < len(node.inputs)]
    found = [v for v in values if v is not None and graph.is_float_weight(v)]
    if not rule.is_table:
        return found
    are_rows = graph.attribute(node, "axis", 0) == 0
    return found if are_rows else []


def is_folded(config: QuantConfig, target: Target) -> bool:
    """Whether weights of float operators become float32 once, when onnxruntime loads the model.

    Otherwise they are behind the standard DequantizeLinear, which other runtimes know as well.
    """
    return target.is_onnxruntime and config.runtime == "folded" and config.symmetric


def _is_dynamic(weighted: Mapping[str, NodePlan], node: ir.Node) -> bool:
    """Whether the node is written as products of integers whose input is quantized at run time."""
    is_matmul = RULES[node.op_type].dynamic_pattern is DynamicPattern.MATMUL
    return is_matmul and weighted[str(node.name)].compute is Compute.DYNAMIC


@dataclass(frozen=True, slots=True)
class _Decider:
    """Phases 1 to 3: what becomes of nodes with weights.

    former  node -> names of nodes of the original model that it stands for
    """

    config: QuantConfig
    target: Target
    choices: Mapping[str, NodeChoice]
    keeps_float16: bool
    former: Mapping[str, Sequence[str]]

    def choice(self, node: str) -> NodeChoice:
        return self.choices.get(node, NO_CHOICE)

    def node(self, node: ir.Node, mode: str) -> NodePlan:
        """How a node with weights computes and stores them, where `mode` asks for a way of
        computing.
        """
        config, choice = self.config, self.choice(str(node.name))
        weights = _weights(node)
        names = tuple(str(w.name) for w in weights)
        elements = sum(math.prod(graph.shape_of(w)) for w in weights)
        in_float = NodePlan(
            str(node.name),
            node.op_type,
            Compute.FLOAT,
            self._float_storage(weights),
            names,
            elements,
        )
        known_as = self._names(in_float)
        excluded = next((g for g in config.exclude if matches(g, *known_as)), None)
        if excluded is not None:
            return _in_float(in_float, weights, f"excluded by {excluded}")
        named = self._named_bits(in_float)
        storage = choice.storage or Storage.of_bits(config.bits if named is None else named)
        if not storage.is_integer:
            reason = "in float: found better" if named is None else f"layer_bits {storage.bits}"
            return _in_float(replace(in_float, storage=storage), weights, reason)
        if elements < config.min_elements:
            reason = f"{elements} elements, fewer than min_elements {config.min_elements}"
            return _in_float(in_float, weights, reason)
        broken = next((w for w in weights if not _is_finite(w)), None)
        if broken is not None:
            return _in_float(in_float, weights, f"{broken.name} holds NaN or inf")
        compute, reason = _choose_compute(node, self.target, mode, choice.compute)
        if storage is Storage.INT4:
            is_named = named is not None or choice.storage is not None
            obstacle = self._why_not_int4(node, weights, compute, is_named=is_named)
            if obstacle:
                storage, reason = Storage.INT8, _joined(reason, f"int8: {obstacle}")
        return self._rounded(
            replace(in_float, compute=compute, reason=reason), node, storage, choice
        )

    def _float_storage(self, weights: list[ir.Value]) -> Storage:
        """How weights that stay float are stored: float16 if the config or their file says so."""
        if self.keeps_float16 and all(is_float16(graph.array(w)) for w in weights):
            return Storage.FLOAT16
        return Storage(self.config.float_storage)

    def smallest(self, plans: Iterable[NodePlan]) -> set[str]:
        """The smallest nodes in 4 bits, which together hold no more than INT8_SHARE of all weights.

        Where a node's bits were chosen by name, they stay.
        """
        plans = list(plans)
        left = INT8_SHARE * sum(n.elements for n in plans)
        found = set()
        in_four_bits = [n for n in plans if n.storage is Storage.INT4]
        for planned in sorted(in_four_bits, key=lambda n: n.elements):
            left -= planned.elements
            if left < 0:
                break
            if self._named_bits(planned) is None and self.choice(planned.node).storage is None:
                found.add(planned.node)
        return found

    def in_int8(self, node: ir.Node, weighted: Mapping[str, NodePlan]) -> NodePlan:
        """The plan of a node whose 4 bits save next to nothing."""
        planned = weighted[str(node.name)]
        reason = _joined(planned.reason, "int8: few weights")
        return self._rounded(replace(planned, reason=reason), node, Storage.INT8, NO_CHOICE)

    def _named_bits(self, planned: NodePlan) -> int | None:
        """The bits that layer_bits gives the node or one of its weights; the last match counts."""
        names = self._names(planned)
        bits = [bits for glob, bits in self.config.layer_bits.items() if matches(glob, *names)]
        return bits[-1] if bits else None

    def _names(self, planned: NodePlan) -> tuple[str, ...]:
        """The names by which a glob can mean the node: its own, former ones, its weights'."""
        return (planned.node, *self.former.get(planned.node, ()), *planned.weights)

    def _rounded(
        self, planned: NodePlan, node: ir.Node, storage: Storage, choice: NodeChoice
    ) -> NodePlan:
        """The plan with its weights rounded to this storage: blocks only where their kernel takes
        them.
        """
        compute = planned.compute
        granularity = self._granularity(node, storage, compute, choice)
        # blocks that gave way to other divisors of the columns are narrower or wider than asked
        is_as_asked = granularity == PerBlock(self.config.block_size)
        if compute is Compute.BLOCKS and not (is_as_asked and granularity in KERNEL_BLOCKS):
            compute = Compute.DYNAMIC
            granularity = self._granularity(node, storage, compute, choice)
        adds_pairs = compute in (Compute.STATIC, Compute.DYNAMIC) and not is_depthwise(node)
        return replace(
            planned,
            compute=compute,
            storage=storage,
            granularity=granularity,
            pair_safe=adds_pairs and self.target.saturates,
        )

    def _granularity(
        self, node: ir.Node, storage: Storage, compute: Compute, choice: NodeChoice
    ) -> Granularity:
        """How many of the node's weights share a scale in 8 bits: fewer than the config says where
        that was chosen, more only if the node is dynamic.
        """
        config, weights = self.config, _weights(node)
        is_per_channel = config.per_channel or choice.granularity == PerChannel()
        by_config: Granularity = PerChannel() if is_per_channel else PerTensor()
        is_table = RULES[node.op_type].is_table
        if compute is Compute.FLOAT and not is_table and not is_folded(config, self.target):
            has_matrices = RULES[node.op_type].dynamic_pattern is DynamicPattern.MATMUL
            if storage is Storage.INT4 and has_matrices:
                columns = _columns(node, weights[0])
                divides = columns % config.block_size == 0
                return PerBlock(config.block_size if divides else columns)
            return by_config
        if storage is Storage.INT4:
            widths = {self._block_width(node, w) for w in weights}
            return PerBlock(widths.pop() if len(widths) == 1 else config.block_size)
        if compute is Compute.DYNAMIC and choice.granularity == PerTensor():
            return PerTensor()
        return by_config

    def _block_width(self, node: ir.Node, weight: ir.Value) -> int:
        """The divisor of the columns nearest to the config's block size; of those of one Gram
        matrix, if there are several.
        """
        columns = _columns(node, weight)
        if RULES[node.op_type].has_gram and WEIGHT_METHODS[self.config.weight_method].uses_gram:
            columns //= parts_of(columns) or 1
        return block_width(columns, self.config.block_size)

    def _why_not_int4(
        self, node: ir.Node, weights: list[ir.Value], compute: Compute, *, is_named: bool
    ) -> str:
        """Why 4 bits are not for this node, "" if they are; few columns matter only if nobody named
        it.
        """
        rule, config = RULES[node.op_type], self.config
        columns = min(_columns(node, w) for w in weights)
        if columns < MIN_INT4_COLUMNS and not is_named:
            return f"{columns} weights a channel are too few for 4 bits"
        if compute is Compute.DYNAMIC and rule.dynamic_pattern is DynamicPattern.LSTM:
            return f"{node.op_type} takes whole bytes"
        if compute.is_integer and not self.target.decodes_int4:
            return f"integer kernels of {self.target.name} take whole bytes"
        if rule.is_table:  # GatherBlockQuantized is onnxruntime's own, and takes whole blocks
            whole_blocks = columns % config.block_size == 0
            is_matrix = len(graph.shape_of(weights[0])) == 2
            if not (is_matrix and whole_blocks and is_folded(config, self.target)):
                return f"{node.op_type} takes whole bytes"
        return ""


def _is_finite(weight: ir.Value) -> bool:
    finite = np.isfinite(graph.array(weight)).all()
    files.release(weight.const_value)
    return bool(finite)


def _known_as(
    former: Mapping[str, Sequence[str]], origins: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """Node -> the other names by which a glob can mean it: of what rewrites made it of, and of what
    all these were in the file.
    """
    found: dict[str, Sequence[str]] = {}
    for node in (*origins, *former):
        before = former.get(node, ())
        in_file = (name for known in (node, *before) for name in origins.get(known, ()))
        found[node] = (*before, *in_file)
    return found


def _keep_shared_in_float(nodes: list[ir.Node], weighted: dict[str, NodePlan]) -> None:
    """Edit `weighted` in place: a weight that one node reads in float, or that is an output of the
    model, is stored as float for all, as integers beside it would only add bytes.
    """
    in_float: dict[ir.Value, str] = {}
    while True:
        for node in nodes:
            planned = weighted[str(node.name)]
            for weight in _weights(node):
                if _is_output(weight):
                    in_float.setdefault(weight, "an output of the model")
                elif not planned.is_rounded:
                    in_float.setdefault(weight, f"read in float by {planned.node}")
        changed = False
        for node in nodes:
            planned, weights = weighted[str(node.name)], _weights(node)
            shared = next((w for w in weights if w in in_float), None)
            if shared is not None and planned.is_rounded:
                stays = replace(
                    planned,
                    compute=Compute.FLOAT,
                    storage=Storage.FLOAT32,
                    granularity=None,
                    pair_safe=False,
                )
                reason = f"its weight {shared.name} is {in_float[shared]}"
                weighted[planned.node] = _in_float(stays, weights, reason)
                changed = True
        if not changed:
            return


def _is_output(weight: ir.Value) -> bool:
    """Whether the weight, or a copy of it, is an output of a graph."""
    copies = [n.outputs[0] for n in graph.consumers(weight) if n.op_type == "Identity"]
    return any(value.is_graph_output() for value in (weight, *copies))


def _in_float(planned: NodePlan, weights: list[ir.Value], reason: str) -> NodePlan:
    """The plan of a node that stays float: in float32 where float16 cannot hold its weights."""
    if planned.storage is Storage.FLOAT16:
        obstacles = (why_not_float16(graph.array(w)) for w in weights)
        obstacle = next(filter(None, obstacles), "")
        if obstacle:
            reason = f"{reason}; float32: {obstacle}"
            return replace(planned, storage=Storage.FLOAT32, reason=reason)
    return replace(planned, reason=reason)


def _columns(node: ir.Node, weight: ir.Value) -> int:
    """Weights of one output channel."""
    return weight_layout(node, weight).columns(graph.shape_of(weight))


def _choose_compute(
    node: ir.Node, target: Target, mode: str, chosen: Compute | None
) -> tuple[Compute, str]:
    """(compute, reason): what was chosen if the node can, else what the mode wants, else float."""
    rule, obstacle = RULES[node.op_type], why_not_integer(node)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is not None and source.op_type == "AveragePool" and why_not_integer(source):
        # a Q behind the pool would make it a QLinearAveragePool, whatever the plan says of the pool
        obstacle = obstacle or f"behind {source.name}: {why_not_integer(source)}"
    if rule.dynamic_pattern is DynamicPattern.LSTM and not target.is_onnxruntime:
        obstacle = f"{rule.dynamic_pattern} is onnxruntime's own, not for {target.name}"
    kernel = "depthwise Conv" if is_depthwise(node) else node.op_type
    if kernel in target.slow_in_integers:
        obstacle = obstacle or f"{kernel} is slower in integers on {target.name}"
    possible = {Compute.FLOAT}
    if not obstacle:
        possible.update(compute for compute in rule.computes if compute in target.times)
    if chosen in possible and len(possible) > 1:
        return chosen, "" if chosen.is_integer else "computes in float: found better"
    if mode == "weight_only":
        return Compute.FLOAT, "weight-only"
    wanted = _MODES[mode]
    best = next((compute for compute in wanted if compute in possible), None)
    if best is not None:
        return best, ""
    kernels = " or ".join(wanted)
    no_kernel = f"{node.op_type} has no {kernels} integer kernel that is faster than float"
    if any(compute in rule.computes for compute in wanted):
        no_kernel += f" on {target.name}"
    return Compute.FLOAT, obstacle or no_kernel


def _joined(*reasons: str) -> str:
    """The reasons that there are, as one."""
    return "; ".join(filter(None, reasons))


def _static_nodes(
    nodes: list[ir.Node],
    anchors: set[str],
    config: QuantConfig,
    choices: Mapping[str, NodeChoice],
    known_as: Mapping[str, Sequence[str]],
) -> set[str]:
    """The nodes that read and write 8-bit tensors.

    1. Anchors that compute static do.
    2. Start with every elementwise and moving operator as well; drop one if an input is not 8-bit
    anyway (written by
       a static node that requantizes, or read by a static anchor), or if nobody static reads its
       output. Repeat.
    """
    movers = {str(n.name) for n in nodes if _may_move(n, config, choices, known_as)}
    by_name = {str(n.name): n for n in nodes}
    while True:
        static = anchors | movers
        live = [by_name[name] for name in by_name if name in static]
        written = {
            capped_output(n)
            for n in live
            if RULES[n.op_type].kind is not Kind.ANCHOR or RULES[n.op_type].needs_q
        }
        read_by_anchor = {v for n in live if n.name in anchors for v in data_inputs(n)}
        read = {v for n in live for v in data_inputs(n)}
        is_8_bit = written | read_by_anchor
        kept = {
            str(n.name)
            for n in live
            if n.name in movers and capped_output(n) in read and _all_in(data_inputs(n), is_8_bit)
        }
        if kept == movers:
            return static
        movers = kept


def _may_move(
    node: ir.Node,
    config: QuantConfig,
    choices: Mapping[str, NodeChoice],
    known_as: Mapping[str, Sequence[str]],
) -> bool:
    """Whether an operator without weights could run on 8-bit data, and nobody forbids it."""
    if node.op_type not in RULES or why_not_integer(node):
        return False
    name = str(node.name)
    return (
        RULES[node.op_type].kind in (Kind.ELEMENTWISE, Kind.MOVES)
        and choices.get(name, NO_CHOICE).compute is not Compute.FLOAT
        and not any(matches(glob, name, *known_as.get(name, ())) for glob in config.exclude)
    )


def _all_in(values: list[ir.Value], found: set[ir.Value]) -> bool:
    """Whether there are values, and all are found."""
    return bool(values) and all(v in found for v in values)


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
        if rule.kind is Kind.MOVES:
            found[out] = found[str(data_inputs(node)[0].name)]
        elif rule.needs_q:
            found.setdefault(out, out)
    return _with_shared_steps(found, [n for n in nodes if n.name in static])


def _with_shared_steps(found: Mapping[str, str], static: Iterable[ir.Node]) -> dict[str, str]:
    """The same with one range for all inputs of nodes that share their weight and bias, as the
    steps of an unrolled loop do.

    A bias in int32 lies on the grid of its node's products: with a range for each step, each would
    store one of its own. Where these are small beside the weight, ranges stay apart.
    """
    shared: dict[tuple[ir.Value, ir.Value], list[str]] = {}
    for node in static:
        position = RULES[node.op_type].bias
        bias = node.inputs[position] if position and position < len(node.inputs) else None
        if bias is not None and graph.is_constant(bias):
            key = graph.value(node.inputs[1]), bias
            shared.setdefault(key, []).append(graph.name_of(node.inputs[0]))
    roots = dict(found)
    for (weight, bias), tensors in shared.items():
        apart = list(dict.fromkeys(roots[tensor] for tensor in tensors))
        stored = BIAS_BYTES * graph.array(bias).size * (len(apart) - 1)
        if stored > LARGE_BIASES * math.prod(graph.shape_of(weight)):
            roots = {t: apart[0] if root in apart else root for t, root in roots.items()}
    return roots


def _means(
    nodes: list[ir.Node], weighted: Mapping[str, NodePlan], config: QuantConfig
) -> dict[str, tuple[int, ...]]:
    """Input tensor -> channel axes, for the nodes whose bias will be corrected."""
    found: dict[str, tuple[int, ...]] = {}
    if not config.bias_correction:
        return found
    for node in nodes:
        if str(node.name) not in weighted or not weighted[str(node.name)].is_rounded:
            continue
        axis, tensor = mean_axis(node), graph.name_of(node.inputs[0])
        if axis is not None and axis not in found.get(tensor, ()):
            found[tensor] = (*found.get(tensor, ()), axis)
    return found
