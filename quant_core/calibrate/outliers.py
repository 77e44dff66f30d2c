"""Outlier channels of what dynamic nodes read: smoothed into the weights, or multiplied in float.

A dynamic node quantizes its whole input with one scale, so a few large channels leave few integer
levels for all others. Two treatments, alone or together, each only where it makes the product
measurably more accurate:

    smooth    Y = (X diag(s)^-1) (diag(s) W^T),    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)
              Source: Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), section 4, equations 3 and
              4; alpha = 0.5
    split     Y = X_O W_O^T in float + X_R W_R^T in int8, with O the few largest channels and R all
              others
              Source: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339), section 3.2; there O are
              the channels with a value above 6, here a fixed share

X is (rows, K), W is (C, K); of a 1x1 Conv the rows are pixels, and K its input channels. Both
treatments of a tensor are written as one vector of factors (K,): s_j, and 0 where channel j is
split off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.observe import MeanKey
from quant_core.calibrate.stats import ChannelMoments
from quant_core.data.samples import Samples, spread
from quant_core.model import graph
from quant_core.model.spill import SpilledArrays
from quant_core.model.values import values_of
from quant_core.numerics.affine import Grid, choose_params, dequantize, quantize
from quant_core.numerics.granularity import PerBlock
from quant_core.numerics.round_nearest import block_width, quantize_int4, quantize_int8
from quant_core.plan.operators import mean_axis, weight_layout
from quant_core.plan.types import NodePlan, OutlierTreatment

Rows = NDArray[Any]

# What a treatment must gain in SQNR for what it costs at run time. Judge a change with `python -m
# tests.bench.accuracy`; not tuned further.
MIN_SMOOTH_GAIN_DB = 1.0  # for a multiplication per element of the input
# For a small float MatMul beside the integer one, of one in so many channels.
MIN_SPLIT_GAINS_DB = {96: 3.0, 24: 6.0}
TREATMENT_FEEDS = 8  # samples on which gains are measured; not tuned
TREATMENT_ROWS = 64  # rows of each of them, at most; not tuned
TREATMENT_OUTPUTS = 256  # outputs of each product, at most; not tuned
MAX_HELD_BYTES = 64 << 20  # of the rows of all tensors; not tuned
MIN_NOISE = 1e-30  # squared error below which a product counts as exact


def treatment_factors(
    treatment: OutlierTreatment, x_max: NDArray[np.float64], weights: Iterable[Rows]
) -> NDArray[np.float32]:
    """(K,) factors that weights (C, K) are multiplied by and the input is divided by.

    0 for a channel that is split off.

    x_max  (K,), the largest magnitude of each input channel
    """
    if treatment.smooth:
        factors = _smoothing_factors(x_max, weights)
    else:
        factors = np.ones(len(x_max), np.float32)
    factors[list(treatment.split)] = 0
    return factors


def reciprocal(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(K,) what the input is multiplied by: 1 / factor, 0 for a channel that is split off."""
    return np.divide(1, factors, out=np.zeros_like(factors), where=factors > 0)


def weights_reading(model: ir.Model, tensor: str, nodes: Iterable[str]) -> dict[str, Rows]:
    """Node -> its weight (C, K), for those of these products that read the tensor."""
    among = set(nodes)
    found = {}
    for node in model.graph:
        if node.name in among and graph.name_of(node.inputs[0]) == tensor:
            weight = graph.value(node.inputs[1])
            found[str(node.name)] = weight_layout(node, weight).matrix(graph.array(weight))
    return found


def choose_treatments(
    model: ir.Model,
    nodes: Iterable[NodePlan],
    means: Mapping[MeanKey, ChannelMoments],
    samples: Samples,
) -> dict[str, OutlierTreatment]:
    """Tensor -> how its outliers are treated, for tensors that these nodes read: MatMul, Gemm, and
    1x1 Convs that compute as products.

    A tensor for which no treatment is worth its cost is missing. So is one whose products share a
    weight with others, as each set of factors would store that again, or do not agree on the axis
    of its channels. Products are computed as dynamic nodes do, with one range for each sample's
    rows, and weights in the bits of their plan.

    Raises: ModelError if the model does not run.
    """
    among = {n.node: n for n in nodes}
    axes = _axes_of_channels(model, among)
    max_abs = {t: means[t, axis].max_abs for t, axis in axes.items() if (t, axis) in means}
    axes = {t: axes[t] for t, found in max_abs.items() if len(found)}
    chosen = {}
    for t, inputs in _rows_of(model, axes, samples):
        weights, possible = weights_reading(model, t, among), possible_treatments(max_abs[t])
        factors = [treatment_factors(how, max_abs[t], weights.values()) for how, _ in possible]
        some = [(among[n], w[spread(TREATMENT_OUTPUTS, len(w))]) for n, w in weights.items()]
        noise = [sum(_product_noise(inputs, *product, f) for product in some) for f in factors]
        chosen[t] = _best(possible, np.array(noise))
    return {t: treatment for t, treatment in chosen.items() if treatment.gain_db > 0}


def _axes_of_channels(model: ir.Model, nodes: Collection[str]) -> dict[str, int]:
    """Tensor that these nodes read -> the axis of its channels, but for tensors whose products
    share weights with others, or differ in that axis.
    """
    axes: dict[str, set[int | None]] = {}
    for node in model.graph:
        if node.name in nodes:
            tensor, readers = node.inputs[0], graph.consumers(graph.value(node.inputs[1]))
            is_own = all(reader.inputs[0] is tensor for reader in readers)
            found = axes.setdefault(graph.name_of(tensor), set())
            found.add(mean_axis(node) if is_own else None)
    return {t: axis for t, (axis, *others) in axes.items() if axis is not None and not others}


def _rows_of(
    model: ir.Model, axes: Mapping[str, int], samples: Samples
) -> Iterator[tuple[str, list[tuple[Rows, Rows]]]]:
    """Each tensor with some rows (n, K) of each sample, and the least and largest value (2, K) of
    its channels.

    axes  tensor -> the axis of its channels
    """
    rows = SpilledArrays(MAX_HELD_BYTES)
    ends: dict[str, list[Rows]] = {t: [] for t in axes}
    for values in values_of(model, list(axes), samples.subsample(TREATMENT_FEEDS), packed=False):
        for t, x in values.items():
            found = np.moveaxis(x, axes[t], -1).reshape(-1, x.shape[axes[t]])
            found = found[np.isfinite(found).all(1)]  # a model may mask the others later
            if found.size:
                rows[f"{t} {len(ends[t])}"] = found[spread(TREATMENT_ROWS, len(found))]
                ends[t].append(np.stack([found.min(0), found.max(0)]))
    for t in axes:
        yield t, [(rows[f"{t} {i}"], both) for i, both in enumerate(ends[t])]


def possible_treatments(x_max: NDArray[np.float64]) -> list[tuple[OutlierTreatment, float]]:
    """The treatments that are tried, without their gains, and what each must gain in dB; the first
    does nothing.

    x_max  (K,), the largest magnitude of each input channel
    """
    order = np.argsort(-x_max, kind="stable").tolist()
    splits: dict[tuple[int, ...], float] = {(): 0.0}
    for share, least_db in MIN_SPLIT_GAINS_DB.items():
        splits.setdefault(tuple(sorted(order[: len(order) // share])), least_db)
    return [
        (OutlierTreatment(smooth, split, 0.0), least_db + MIN_SMOOTH_GAIN_DB * smooth)
        for split, least_db in splits.items()
        for smooth in (False, True)
    ]


def _best(
    possible: Sequence[tuple[OutlierTreatment, float]], noise: NDArray[np.float64]
) -> OutlierTreatment:
    """The treatment that gains most beyond what it must gain, with its gain over the first."""
    floored = np.maximum(noise, MIN_NOISE)
    gains = 10 * np.log10(floored[0] / floored)
    best = int(np.argmax(gains - [least_db for _, least_db in possible]))
    return replace(possible[best][0], gain_db=float(gains[best]))


def _product_noise(
    inputs: Sequence[tuple[Rows, Rows]],
    planned: NodePlan,
    weight: Rows,
    factors: NDArray[np.float32],
) -> float:
    """Squared error of rows @ weight.T in uint8 by the weight's bits; channels that are split off
    have none.

    inputs  rows (n, K) of each sample, and the least and largest value (2, K) of its channels
    """
    is_kept = factors > 0
    s, kept = factors[is_kept], weight[:, is_kept]
    rounded_weight = _rounded(weight * factors, planned)[:, is_kept]
    grid = Grid(8, signed=False, symmetric=False)
    noise = 0.0
    for rows, (lo, hi) in inputs:
        exact = rows[:, is_kept]
        params = choose_params((lo[is_kept] / s).min(), (hi[is_kept] / s).max(), grid)
        rounded = dequantize(quantize(exact / s, params), params)
        error = rounded @ rounded_weight.T - exact @ kept.T
        noise += float(np.square(error, dtype=np.float64).sum())
    return noise


def _rounded(rows: Rows, planned: NodePlan) -> Rows:
    """The weight (C, K) of a node, rounded to nearest as its plan stores it."""
    if not isinstance(planned.granularity, PerBlock):
        return quantize_int8(rows, search_scale=False).values
    block = block_width(rows.shape[1], planned.granularity.size)
    return quantize_int4(rows, block, pair_safe=planned.pair_safe).values


def _smoothing_factors(x_max: NDArray[np.float64], weights: Iterable[Rows]) -> NDArray[np.float32]:
    """s (K,) for alpha = 0.5, sqrt(max|X_j| / max|W_j|); 1 where either is 0."""
    w_max = np.max([np.abs(w).max(0, initial=0.0) for w in weights], axis=0)
    usable = (x_max > 0) & (w_max > 0)
    return np.sqrt(np.where(usable, x_max, 1.0) / np.where(usable, w_max, 1.0)).astype(np.float32)
