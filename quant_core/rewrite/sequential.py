"""What each weight should become, layer after layer, once the layers before it are rounded.

Rounding a layer for the inputs that the float model gives it leaves the errors of the layers before it as they are.
Here each layer sees both the float model's inputs X and those X' that the layers already rounded really leave it: what
is then rounded is the W' for which W' X' comes nearest to W X, and the bias gives back the difference of the means.
A few dozen samples say little of how a thousand inputs vary together: the less they agree, the less is made of it.

Source: Li et al. 2025, GPTAQ (arXiv 2504.02692), whose asymmetric calibration this is, in closed form; Schaefer and
Strimmer 2005, A Shrinkage Approach to Large-Scale Covariance Matrix Estimation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.gram import Aim, Site, rows_of, sites_of
from quant_core.calibrate.observe import Statistics
from quant_core.model import graph, subgraph
from quant_core.model.session import open_session
from quant_core.model.session import run as run_session
from quant_core.model.subgraph import reads
from quant_core.numerics.weights import layout_of
from quant_core.plan.operators import RULES, is_depthwise
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, QuantPlan, Storage
from quant_core.rewrite.rounding import Rounding, flat_bias

ROWS_PER_COLUMN, LEAST_ROWS = 12, 2048  # of both inputs, as they vary: fewer are fitted too closely
LEAST_SPANS = 16  # of the rows, which are compared to see what is chance; one for each sample
RIDGE = 4.0  # of the mean diagonal times what is chance: how strongly W' is held to W
HELD_BYTES = (
    768 << 20
)  # of tensors between layers, of all samples; above, every second sample is let go

Arrays = dict[str, NDArray[Any]]


def follow(
    model: ir.Model, plan: QuantPlan, stats: Statistics, feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> Statistics:
    """The statistics with an aim for each weight of the plan whose inputs can be taken as rows.

    Depthwise weights in 8 bits are left as they are: they are all but exact, and each meets only a few inputs. Both
    models run once, cut where a layer must be rounded before its output is known. Raises: ModelError if a part of the
    model does not run by itself.
    """
    aims: dict[str, Aim] = {}
    stats = replace(
        stats, aims=aims, memo=dict(stats.memo)
    )  # what it holds by now does not depend on aims
    rounding, sites, planned = (
        Rounding(plan.config, stats),
        sites_of(model, plan),
        {n.node: n for n in plan.nodes},
    )
    copy = model.clone()
    walk, twins = Walk((model, copy), feeds), {n.name: n for n in copy.graph}
    spans = max(LEAST_SPANS, len(walk.states[0]))
    waiting = [
        n for n in model.graph
        if n.name in sites and not (is_depthwise(n) and planned[str(n.name)].storage is Storage.INT8)
    ]  # fmt: skip
    while waiting:
        blocked = {n.name for n in waiting}
        ready = [
            n
            for n in waiting
            if not blocked & {a.name for a in walk.ahead({sites[str(n.name)].tensor})}
        ]
        waiting = [n for n in waiting if n not in ready]
        walk.advance({sites[str(n.name)].tensor for n in ready})
        for node in ready:
            name, weight = str(node.name), graph.value(node.inputs[1])
            layout = layout_of(node, len(graph.shape_of(weight)))
            aims[name] = _aim(
                layout.matrix(graph.array(weight)), sites[name], walk.pairs(sites[name]), spans
            )
            compute, storage = planned[name].compute, planned[name].weight_storage
            safe = (
                TARGETS[plan.target].saturates
                and compute != Compute.FLOAT
                and not is_depthwise(node)
            )
            rounded = rounding.integers(node, weight, storage, safe=safe)
            values = rounded.layout.tensor(rounded.integers.values, rounded.shape)
            position, bias = RULES[node.op_type].bias, None
            if position is not None:
                old = node.inputs[position] if len(node.inputs) > position else None
                flat = flat_bias(old, len(rounded.integers.q))
                bias = (
                    rounding.bias(node, flat, weight, rounded)
                    if old is None or flat is not None
                    else None
                )
            _replace(copy, twins[node.name], values, position, bias)
    return stats


class Walk:
    """Models with the same nodes, advanced side by side over all samples while their constants change."""

    def __init__(
        self, models: tuple[ir.Model, ...], feeds: Iterable[Mapping[str, NDArray[Any]]]
    ) -> None:
        self.models = models
        self.producers = {v.name: n for n in models[0].graph for v in n.outputs}
        self.done: set[ir.Node] = set()
        first = [dict(f) for f in feeds]
        self.states: tuple[list[Arrays], ...] = tuple([dict(f) for f in first] for _ in models)

    def ahead(self, tensors: set[str]) -> set[ir.Node]:
        """The nodes that must still run before these tensors are known."""
        found: set[ir.Node] = set()
        open_ends = list(tensors)
        while open_ends:
            node = self.producers.get(open_ends.pop())
            if node is not None and node not in self.done and node not in found:
                found.add(node)
                open_ends += [str(v.name) for v in reads(node)]
        return found

    def advance(self, tensors: set[str]) -> None:
        """Run all models until these tensors are known; keep only what later nodes read."""
        now = self.ahead(tensors)
        self.done |= now
        later = {
            str(v.name) for n in self.models[0].graph if n not in self.done for v in reads(n)
        } | tensors
        for model, states in zip(self.models, self.states, strict=True):
            part = [
                n for n, twin in zip(model.graph, self.models[0].graph, strict=True) if twin in now
            ]
            if part:
                _run(model, part, later, states)
            for state in states:
                for name in state.keys() - later:
                    del state[name]
        while len(self.states[0]) > 1 and self._held() > HELD_BYTES:
            for states in self.states:
                del states[1::2]

    def _held(self) -> int:
        return sum(x.nbytes for states in self.states for state in states for x in state.values())

    def pairs(self, site: Site) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same rows of the site's input in the float and the rounded model, (G, P, n, k) each."""
        wanted = -(-max(LEAST_ROWS, ROWS_PER_COLUMN * site.shape[-1]) // len(self.states[0]))
        found = [
            np.concatenate([rows_of(f[site.tensor], site, wanted) for f in s], axis=1)
            for s in self.states
        ]
        split = [x.reshape(*x.shape[:2], site.parts, -1).transpose(0, 2, 1, 3) for x in found]
        return split[0], split[1]


def _replace(
    model: ir.Model,
    node: ir.Node,
    weight: NDArray[Any],
    position: int | None,
    bias: NDArray[Any] | None,
) -> None:
    """The weight, and the bias if there is one, of a node."""
    node.replace_input_with(
        1, graph.initializer(model.graph, f"{node.name}_weight_rounded", weight)
    )
    if position is not None and bias is not None:
        value = graph.initializer(model.graph, f"{node.name}_bias_rounded", bias.astype(np.float32))
        graph.set_input(node, position, value)


def _run(model: ir.Model, part: list[ir.Node], later: set[str], states: list[Arrays]) -> None:
    """Run these nodes on each state and add what is read later to it."""
    session = open_session(subgraph.extract(model, part, later, states[0]).SerializeToString())
    inputs, outputs = (
        [v.name for v in values] for values in (session.get_inputs(), session.get_outputs())
    )
    for state in states:
        state.update(
            zip(outputs, run_session(session, {name: state[name] for name in inputs}), strict=True)
        )


def _aim(
    rows: NDArray[Any],
    site: Site,
    pair: tuple[NDArray[np.float32], NDArray[np.float32]],
    spans: int,
) -> Aim:
    """W' = W + W (X X'^T - X' X'^T) (X' X'^T + ridge)^-1, each part of the columns by itself; spoils the pair."""
    (exact, found), (groups, parts, k, _) = pair, site.shape
    n = exact.shape[2]
    means = [x.mean(2) * np.float32(site.centered) for x in pair]
    exact -= found
    found -= means[1][:, :, None]
    exact -= (means[0] - means[1])[:, :, None]  # in place, as both are as large as memory allows
    gram, drift = np.empty(site.shape), np.empty(site.shape)
    for g in np.ndindex(groups, parts):  # one by one: numpy hands only plain matrices to BLAS
        gram[g] = found[g].T @ found[g] / n
        drift[g] = exact[g].T @ found[g] / n
    chance = _chance(found, gram, spans)
    ridge = RIDGE * chance * np.einsum("gpkk->gp", gram) / k
    damped = gram + np.where(ridge > 0, ridge, 1.0)[..., None, None] * np.eye(k)
    split = rows.astype(np.float64).reshape(groups, -1, parts, k).transpose(0, 2, 1, 3)
    moved = split + np.linalg.solve(damped, (split @ drift).transpose(0, 1, 3, 2)).transpose(
        0, 1, 3, 2
    )
    gram *= np.where(np.eye(k), 1.0, 1 - chance[..., None, None])
    outputs = np.einsum("gpok,gpk->go", split, means[0]).reshape(-1)
    target = moved.transpose(0, 2, 1, 3).reshape(rows.shape).astype(np.float32)
    return Aim(target, gram.astype(np.float32), outputs, means[1].reshape(groups, -1))


def _chance(x: NDArray[np.float32], gram: NDArray[np.float64], spans: int) -> NDArray[np.float64]:
    """(G, P): variance of what lies beside the diagonal over its square, 0 if all spans of rows x agree, 1 at most."""
    n, k = x.shape[2:]
    spans = min(spans, n)
    squares = np.zeros(gram.shape[:2])
    for span in np.array_split(x, spans, axis=2):
        turned = span.swapaxes(2, 3)
        products = (
            turned @ span if k < span.shape[2] else span @ turned
        )  # both have the same sum of squares
        squares += np.square(products).sum((2, 3)) - np.square(np.square(span).sum(2)).sum(2)
    whole = np.square(n * gram).sum((2, 3)) - np.square(n * np.einsum("gpkk->gpk", gram)).sum(2)
    share = np.divide(squares, whole, out=np.ones_like(whole), where=whole > 0)
    return np.asarray(np.clip((spans * share - 1) / max(spans - 1, 1), 0.0, 1.0))
