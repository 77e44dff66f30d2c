"""How each node computes, how its weight is stored, and why: decided before anything is measured or
rewritten.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from quant_core.config import Mode, QuantConfig
from quant_core.model import graph
from quant_core.model.origins import matches, origins_of
from quant_core.model.qat import respects_pairs
from quant_core.model.to_float32 import stores_float16
from quant_core.optimize.applied import Applied, former_names
from quant_core.plan.nothing_to_quantize import nothing_to_quantize
from quant_core.plan.operators import float_weights, has_weights, is_dynamic_product, mean_axis
from quant_core.plan.other_constants import made_weights, other_constants
from quant_core.plan.routers import routers
from quant_core.plan.shared import unify_weights
from quant_core.plan.static_nodes import activations, static_nodes
from quant_core.plan.targets import TARGETS, Target
from quant_core.plan.tied import is_product
from quant_core.plan.types import (
    Compute,
    NodeChoice,
    NodePlan,
    OutlierTreatment,
    QuantPlan,
    Storage,
)
from quant_core.plan.weighted_nodes import (
    NO_CHOICE,
    SMALL_SHARE_IN_FLOAT,
    WeightedNodes,
    kept_in_float,
)

BETWEEN = "runs on 8-bit data between static neighbours"
FEW_WEIGHTS = "int8: few weights"
FEW_IN_FLOAT = "16 bits: few weights, in float anyway"
RANKS = "few weights, by whose results others are chosen"


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
    2. Nodes with weights in branches and loops store them in fewer bits. They compute in float, or
    products dynamically: ranges of what branches and loops compute are not measured.
    3. Of the nodes in 4 bits, the smallest go back to 8; small products that only rank have 16, and
    so have, where nothing has 4, the smallest of what computes in float. Nodes that share a weight
    agree on its form (shared.py).
    4. Nodes without weights run on 8-bit data where their neighbours do.
    5. Activations that are quantized, and the inputs whose means or outliers matter.
    6. Other constants that are stored as float16, and why large ones are not.

    Raises: ModelError if no node has a weight that can be quantized.
    """
    nodes = list(model.graph)
    inner = [n for g in graph.graphs_inside(model.graph) for n in g if has_weights(n)]
    choices = _possible_choices(inner, choices or {})
    known_as = _known_as(model, rewrites)
    decide = WeightedNodes(config, target, choices, stores_float16(model), known_as)
    ranking = routers(graph.nodes_of(model))
    own = [n for n in nodes if has_weights(n)]
    weighted = _plan_weights(own, inner, ranking, decide)  # 1 to 3
    unify_weights([*own, *inner], model.graph.outputs, weighted, decide)  # 3
    if not weighted and not respects_pairs(model) and not made_weights(model):
        raise nothing_to_quantize(model)

    anchors = {name for name, n in weighted.items() if n.compute is Compute.STATIC}
    static = static_nodes(nodes, anchors, config, choices, known_as, target)  # 4
    between = (n for n in nodes if n.name in static and n.name not in weighted)
    planned = weighted | {
        str(n.name): NodePlan(str(n.name), n.op_type, Compute.STATIC, reason=BETWEEN)
        for n in between
    }
    plans = [planned[str(n.name)] for n in nodes if n.name in planned]
    plans += [weighted[name] for name in dict.fromkeys(str(n.name) for n in inner)]

    read_dynamically = _read_dynamically(nodes, weighted)
    return QuantPlan(
        config=config,
        target=target.name,
        nodes=tuple(plans),
        activations=activations(nodes, static, target),  # 5
        means=_means(nodes, weighted, config),
        outliers={t: how for t, how in (outliers or {}).items() if t in read_dynamically},
        constants=other_constants(model, plans, config),  # 6
        stored={node: choice.storage for node, choice in choices.items() if choice.storage},
        rewrites=tuple(rewrites),
        idle_globs=_idle_globs(model, config, rewrites),
    )


def replan(model: ir.Model, plan: QuantPlan, changes: Mapping[str, NodeChoice]) -> QuantPlan:
    """The plan anew with these changes; what was chosen for all other nodes stays, and of what
    model and samples weights are made. Biases are not tuned. Raises: as `make_plan`.
    """
    choices = {
        n.node: NodeChoice(n.compute, plan.stored.get(n.node), n.granularity) for n in plan.weighted
    }
    for node, change in changes.items():
        before = choices.get(node, NO_CHOICE)
        choices[node] = NodeChoice(
            change.compute or before.compute,
            change.storage or before.storage,
            change.granularity or before.granularity,
        )
    changed = make_plan(
        model,
        plan.config,
        TARGETS[plan.target],
        choices,
        outliers=plan.outliers,
        rewrites=plan.rewrites,
    )
    return replace(
        changed,
        equalized_db=plan.equalized_db,
        holdout=plan.holdout,
        rounding_samples=plan.rounding_samples,
    )


def with_choice(
    model: ir.Model, plan: QuantPlan, nodes: Iterable[str], choice: NodeChoice
) -> QuantPlan:
    """The plan anew with this choice for each of these nodes. Raises: as `make_plan`."""
    return replan(model, plan, dict.fromkeys(nodes, choice))


def named_nodes(model: ir.Model, plan: QuantPlan) -> set[str]:
    """The nodes whose bits the config's `layer_bits` gives by name."""
    known_as = _known_as(model, plan.rewrites)
    names = {n.node: (n.node, *known_as.get(n.node, ()), *n.weights) for n in plan.weighted}
    globs = plan.config.layer_bits
    return {node for node, own in names.items() if any(matches(glob, *own) for glob in globs)}


def _possible_choices(
    inner: Iterable[ir.Node], choices: Mapping[str, NodeChoice]
) -> dict[str, NodeChoice]:
    """The choices, without ways of computing that nodes in branches and loops lack (step 2)."""
    possible = dict(choices)
    for node in inner:
        name = str(node.name)
        is_dynamic = possible.get(name, NO_CHOICE).compute is Compute.DYNAMIC
        if name in possible and not (is_dynamic and is_product(node)):
            possible[name] = replace(possible[name], compute=None)
    return possible


def _plan_weights(
    own: Sequence[ir.Node],
    inner: Sequence[ir.Node],
    ranking: Collection[str],
    decide: WeightedNodes,
) -> dict[str, NodePlan]:
    """Steps 1 to 3: node -> its plan, for the nodes with weights.

    own, inner  those of the main graph, and those in branches and loops
    ranking     names of the products that only rank
    """
    nodes = [*own, *inner]
    plans = {str(n.name): decide.node(n, decide.config.mode) for n in own}  # 1
    for node in inner:  # 2
        is_dynamic = decide.config.mode == Mode.DYNAMIC and is_product(node)
        mode = Mode.DYNAMIC if is_dynamic else Mode.WEIGHT_ONLY
        plans[str(node.name)] = decide.node(node, mode)
    by_name = {str(n.name): n for n in nodes}  # 3
    in_four_bits = [n for n in plans.values() if n.storage is Storage.INT4]
    for few in decide.smallest(plans.values(), in_four_bits):
        plans[few.node] = decide.changed(by_name[few.node], few, FEW_WEIGHTS, storage=Storage.INT8)
    rounded = [n for n in plans.values() if n.node in ranking and n.is_rounded]
    for few in decide.smallest(plans.values(), rounded):
        plans[few.node] = _in_16_bits(few, by_name[few.node], RANKS)
    if not in_four_bits:
        in_float = [n for n in plans.values() if n.is_rounded and n.compute is Compute.FLOAT]
        for few in decide.smallest(plans.values(), in_float, SMALL_SHARE_IN_FLOAT):
            plans[few.node] = _in_16_bits(few, by_name[few.node], FEW_IN_FLOAT)
    return plans


def _in_16_bits(planned: NodePlan, node: ir.Node, reason: str) -> NodePlan:
    """The plan of a rounded node that stores its weights as float16 instead, for this reason."""
    return kept_in_float(planned.in_float(Storage.FLOAT16), float_weights(node), reason)


def _idle_globs(
    model: ir.Model, config: QuantConfig, rewrites: Sequence[Applied]
) -> tuple[str, ...]:
    """Each key of the config, with its globs that match no node and no value of the model."""
    globs = [("exclude", glob) for glob in config.exclude]
    globs += [("layer_bits", glob) for glob in config.layer_bits]
    if not globs:
        return ()
    nodes = list(graph.nodes_of(model))
    names = {str(node.name) for node in nodes}
    names.update(str(value.name) for node in nodes for value in node.inputs if value is not None)
    names.update(name for change in rewrites for name in change.absorbed)
    names.update(name for found in origins_of(model).values() for name in found)
    return tuple(f"{key} {glob}" for key, glob in globs if not matches(glob, *names))


def _known_as(model: ir.Model, rewrites: Iterable[Applied]) -> dict[str, Sequence[str]]:
    """Node -> the other names by which a glob can mean it: of what rewrites made it of, and of what
    all these were in the file.
    """
    former, origins = former_names(rewrites), origins_of(model)
    found: dict[str, Sequence[str]] = {}
    for node in (*origins, *former):
        before = former.get(node, ())
        in_file = (name for known in (node, *before) for name in origins.get(known, ()))
        found[node] = (*before, *in_file)
    return found


def _read_dynamically(nodes: Iterable[ir.Node], weighted: Mapping[str, NodePlan]) -> set[str]:
    """The tensors that products quantize at run time (step 5)."""
    return {
        graph.name_of(n.inputs[0])
        for n in nodes
        if n.name in weighted and is_dynamic_product(weighted[str(n.name)])
    }


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
