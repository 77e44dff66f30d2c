"""Sequential rounding (GPTAQ): each weight is rounded for the inputs that rounded layers give it.

Rounding a layer for the float model's inputs leaves the errors of the layers before it as they are.
Here each layer sees two inputs for the same samples: X of the float model and X' of the model whose
activations and earlier layers are rounded. What is rounded is then not W but the W' whose outputs
for X' come nearest to the float outputs W X, held to W by a ridge:

    W' = argmin  |W' X' - W X|^2 / n  +  ridge |W' - W|^2

    (W' - W) (X' X'^T / n + ridge I)  =  W (X - X') X'^T / n

The second line is the normal equation, which `_target` solves. X and X' are (K, n), one row of the
input for each of their n columns. Inputs with a bias are taken about their means, and the bias
corrects the difference of the mean outputs. GPTQ then rounds W' with the Gram matrix of X'.

A few dozen samples say little about how a thousand inputs vary together. So the share of X' X'^T
that is chance (the shrinkage intensity) makes the ridge larger, and is replaced in the Gram matrix
by that of independent inputs with the same mean variance: with their own variances, other samples
than these get more noise. An input that is 0 in all n samples, as a word that none of them has, is
in the next one with probability 1 / (n + 2): so much of the mean variance counts as its own.

Source: Li et al. 2025, GPTAQ (arXiv 2504.02692), for the asymmetric calibration; there W is
corrected while GPTQ rounds it column by column, here in closed form before. Schaefer and Strimmer
2005, A Shrinkage Approach to Large-Scale Covariance Matrix Estimation, for the shrinkage intensity.
Ledoit and Wolf 2004, A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices, for
what is shrunk towards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.gram import RoundingTarget, gram_matrices
from quant_core.calibrate.matmul_inputs import MatmulInput, input_rows, matmul_inputs, split_columns
from quant_core.calibrate.observe import Statistics
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.model import graph
from quant_core.model.layerwise import Feeds, LayerwiseRunner
from quant_core.plan.convolutions import is_depthwise
from quant_core.plan.operators import RULES, layout_of
from quant_core.plan.types import NodePlan, QuantPlan, Storage
from quant_core.rewrite.apply import apply_plan
from quant_core.rewrite.rounding import Rounding
from quant_core.rewrite.weight_cache import WeightCache

# How many pairs of rows are taken for each column of one matrix, and at least. More than for a Gram
# matrix alone (gram.py), since fitting W' to too few rows fits their noise. Judge a change with
# `python -m tests.bench.int4`; not tuned further.
PAIRED_ROWS_PER_COLUMN = 24
MIN_PAIRED_ROWS = 2048
# Batches of rows whose Gram matrices are compared by `shrinkage`: one for each sample, or so many
# if there are fewer samples, so that a variance can be estimated. Not tuned.
MIN_BATCHES = 16
# ridge = RIDGE * shrinkage * mean diagonal of X' X'^T / n; larger holds W' closer to W. Judge a
# change with `python -m tests.bench.int4`; not tuned further.
RIDGE = 4.0
# Share of the time for targets that the Gram matrices of the weights without one may take. A Gram
# matrix takes a tenth of what a target does. Not tuned.
OVERTIME = 0.25


def round_sequentially(
    model: ir.Model,
    plan: QuantPlan,
    stats: Statistics,
    feeds: Feeds,
    weights: WeightCache | None = None,
    deadline: Deadline = NO_DEADLINE,
) -> Statistics:
    """The statistics with a rounding target for each weight whose inputs can be taken as rows.

    deadline  when it should end: the last weights then have none, but Gram matrices of the float
              model if they are not most by far: GPTQ for these takes about as long as it took

    Both models run once, layer by layer; the float one and `stats` stay as they are. Depthwise
    weights in 8 bits have no target: they are nearly exact, and each meets only a few inputs.
    `weights` keeps the rounded ones, for the plans that are then applied.

    Raises: ModelError if a part of the model does not run by itself.
    """
    targets: dict[str, RoundingTarget] = {}
    stats = replace(stats, rounding_targets=targets)  # which grow from layer to layer
    rounding = Rounding(plan, stats, weights)
    inputs = matmul_inputs(model, plan)
    planned = {n.node: n for n in plan.nodes}
    waiting = [n for n in model.graph if n.name in inputs and _has_target(n, planned[str(n.name)])]
    rounded = apply_plan(model, _in_float(plan, {str(n.name) for n in waiting}), stats)
    exact_runner = LayerwiseRunner(model, feeds)
    rounded_runner = LayerwiseRunner(rounded.model, feeds)
    batches = max(MIN_BATCHES, len(exact_runner.states))
    while waiting and not deadline.is_over:
        ready = _independent(waiting, inputs, exact_runner)
        waiting = [n for n in waiting if n not in ready]
        exact_runner.run_until({inputs[str(n.name)].tensor for n in ready})
        rounded_runner.run_until(
            {graph.name_of(rounded.written[str(n.name)].inputs[0]) for n in ready}
        )
        for node in ready:
            name = str(node.name)
            copy, source = rounded.written[name], inputs[name]
            weight = graph.value(node.inputs[1])
            rows = layout_of(node, len(graph.shape_of(weight))).matrix(graph.array(weight))
            tensor = graph.name_of(copy.inputs[0])
            exact, found = _pairs(exact_runner, rounded_runner, source, tensor)
            if found.shape[2]:  # some are of experts that no sample reaches
                targets[name] = _target(rows, source, exact, found, batches)
            _round(copy, node, planned[name], rounding)
    left = {str(n.name): inputs[str(n.name)] for n in waiting}
    if not left or len(left) > 2 * len(targets):
        return stats
    grams = gram_matrices(model, left, feeds, deadline.overtime(OVERTIME))
    return replace(stats, gram_matrices=grams)


def _in_float(plan: QuantPlan, nodes: Collection[str]) -> QuantPlan:
    """The plan with the weights of these nodes in float; activations are rounded as before."""
    changed = (
        replace(n, storage=Storage.FLOAT32, granularity=None) if n.node in nodes else n
        for n in plan.nodes
    )
    return replace(plan, nodes=tuple(changed))


def shrinkage(rows: NDArray[Any], gram: NDArray[Any], batches: int) -> NDArray[np.float64]:
    """(G, P): which share of the off-diagonal elements of a Gram matrix is chance, from 0 to 1.

    rows     (G, P, n, k), centered already where their mean does not count
    gram     (G, P, k, k), S = X X^T / n of the same rows
    batches  m, into how many batches of consecutive rows they are split

    With S_b of batch b, it is the estimated variance of the elements of S over their squares:

        lambda = sum_{i != j} Var(S_ij) / sum_{i != j} S_ij^2  =  (m share - 1) / (m - 1)
        share  = sum_b sum_{i != j} (n_b S_b)_ij^2 / sum_{i != j} (n S)_ij^2

    0 if all batches agree, 1 if they have nothing in common or nothing lies off the diagonal.
    Source: Schaefer and Strimmer 2005, table 2, target D (unequal variances on the diagonal), with
    batches in place of single rows.
    """
    n, k = rows.shape[2:]
    batches = min(batches, n)
    squares = np.zeros(gram.shape[:2])
    for batch in np.array_split(rows, batches, axis=2):
        turned = batch.swapaxes(2, 3)
        # X^T X and X X^T have the same sum of squares: the smaller one is computed
        products = turned @ batch if k < batch.shape[2] else batch @ turned
        diagonal = np.square(batch).sum(2)
        # In float64: activations of 1e17, whose squares float32 still holds, have such sums.
        squares += np.einsum("gpij,gpij->gp", products, products, dtype=np.float64)
        squares -= np.square(diagonal, dtype=np.float64).sum(2)
    diagonal = n * np.einsum("gpkk->gpk", gram)
    whole = np.square(n * gram).sum((2, 3)) - np.square(diagonal).sum(2)
    share = np.divide(squares, whole, out=np.ones_like(whole), where=whole > 0)
    return np.asarray(np.clip((batches * share - 1) / max(batches - 1, 1), 0.0, 1.0))


def _has_target(node: ir.Node, planned: NodePlan) -> bool:
    return not is_depthwise(node) or planned.storage is not Storage.INT8


def _independent(
    waiting: list[ir.Node], inputs: Mapping[str, MatmulInput], runner: LayerwiseRunner
) -> list[ir.Node]:
    """The waiting nodes whose input does not depend on another of them."""
    names = {n.name for n in waiting}
    found = []
    for node in waiting:
        before = {n.name for n in runner.pending({inputs[str(node.name)].tensor})}
        if not names & before:
            found.append(node)
    return found


def _pairs(
    exact: LayerwiseRunner, rounded: LayerwiseRunner, source: MatmulInput, tensor: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(G, P, n, k) each: as many rows as a target needs of what the node reads in the float model,
    and the same ones in the rounded model.

    Where nodes choose rows, the models may choose other ones: then both are of the rounded model.
    """
    total = max(MIN_PAIRED_ROWS, PAIRED_ROWS_PER_COLUMN * source.gram_shape[-1])
    wanted = -(-total // len(exact.states))
    rows: tuple[list[NDArray[np.float32]], ...] = ([], [])
    # one sample at a time: its tensors may be large, and are read from files
    for before, after in zip(exact.states, rounded.states, strict=True):
        x, y = before[source.tensor], after[tensor]
        for of_model, values in zip(rows, (x if x.shape == y.shape else y, y), strict=True):
            of_model.append(input_rows(values, source, wanted))
    found_exact, found = (split_columns(np.concatenate(r, axis=1), source.parts) for r in rows)
    return found_exact, found


def _target(
    weight: NDArray[Any],
    source: MatmulInput,
    exact: NDArray[np.float32],
    found: NDArray[np.float32],
    batches: int,
) -> RoundingTarget:
    """Solves the normal equation for W', each part of the columns by itself.

    weight        W, (C, K)
    exact, found  X^T and X'^T, (G, P, n, k); overwritten, as both are as large as memory allows
    """
    groups, parts, k, _ = source.gram_shape
    n = exact.shape[2]
    exact_means = exact.mean(2) * np.float32(source.centered)
    found_means = found.mean(2) * np.float32(source.centered)

    difference = exact
    difference -= found
    difference -= (exact_means - found_means)[:, :, None]
    found -= found_means[:, :, None]
    gram = np.empty(source.gram_shape)  # X' X'^T / n
    cross = np.empty(source.gram_shape)  # (X - X') X'^T / n
    for at in np.ndindex(groups, parts):  # one by one: numpy hands only plain matrices to BLAS
        gram[at] = found[at].T @ found[at] / n
        cross[at] = difference[at].T @ found[at] / n

    chance = shrinkage(found, gram, batches)
    variance = np.einsum("gpkk->gp", gram)
    square = variance + np.square(found_means, dtype=np.float64).sum(2)
    # What float32 leaves of rows that are all alike, less their mean, is no input.
    ridge = np.maximum(RIDGE * chance / k * variance, np.finfo(np.float32).eps * square)
    ridge = np.where(ridge > 0, ridge, 1.0)
    damped = gram + ridge[..., None, None] * np.eye(k)
    w = weight.astype(np.float64).reshape(groups, -1, parts, k).transpose(0, 2, 1, 3)
    right = (w @ cross).transpose(0, 1, 3, 2)
    moved = w + np.linalg.solve(damped, right).transpose(0, 1, 3, 2)  # `damped` is symmetric

    diagonal = np.einsum("gpkk->gpk", gram)  # a view
    mean = (variance / k)[..., None]
    unseen = diagonal <= np.finfo(np.float32).eps * mean
    gram *= 1 - chance[..., None, None]
    diagonal += np.where(unseen, mean / (batches + 2), chance[..., None] * mean)
    return RoundingTarget(
        weight=moved.transpose(0, 2, 1, 3).reshape(weight.shape).astype(np.float32),
        gram=gram.astype(np.float32),
        output_means=np.einsum("gpok,gpk->go", w, exact_means).reshape(-1),
        input_means=found_means.reshape(groups, -1),
    )


def _round(copy: ir.Node, node: ir.Node, planned: NodePlan, rounding: Rounding) -> None:
    """Edit in place: the copy of a node gets its rounded weight, and the bias beside it."""
    weight = graph.value(node.inputs[1])
    rounded = rounding.integers(node, weight, planned)
    values = rounded.layout.tensor(rounded.integers.values, rounded.shape)
    home = graph.home(copy)
    copy.replace_input_with(1, graph.initializer(home, f"{node.name}_weight_rounded", values))
    position, bias = RULES[node.op_type].bias, rounding.corrected_bias(node, weight, rounded)
    if position is not None and bias is not None:
        value = graph.initializer(home, f"{node.name}_bias_rounded", bias.astype(np.float32))
        graph.set_input(copy, position, value)
