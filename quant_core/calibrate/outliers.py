"""How the outliers of what a dynamic node reads are kept from spoiling everything else.

Two ways, alone or together, each only where it makes the product measurably more exact:
smooth  channel j is divided by s_j = sqrt(max|x_j| / max|w_j|) and its weights are multiplied by it.
        Source: Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), section 4, with a migration strength of 0.5
split   the few largest channels are multiplied in float, the others in int8, and the products added.
        Source: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339), section 3.2
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.stats import ChannelMoments
from quant_core.data.samples import Samples
from quant_core.model import graph
from quant_core.model.session import values_of
from quant_core.numerics.affine import Grid, choose_params, dequantize, quantize
from quant_core.numerics.weights import layout_of, quantize_int8
from quant_core.plan.types import OutlierTreatment

Rows = NDArray[Any]

SMOOTH_GAIN_DB, SPLIT_GAIN_DB = (
    1.0,
    3.0,
)  # what a multiplication per element, and a small float MatMul, must gain
SPLIT_SHARE = 96  # one in so many channels is split off
FEEDS = 8  # on whose rows gains are measured


def factors_of(
    treatment: OutlierTreatment, x_max: NDArray[np.float64], weights: Iterable[Rows]
) -> NDArray[np.float32]:
    """(K,) that weights (C, K) are multiplied by and the input is divided by; 0 where a channel is split off."""
    factors = _smoothing(x_max, weights) if treatment.smooth else np.ones(len(x_max), np.float32)
    factors[list(treatment.split)] = 0
    return factors


def weights_reading(model: ir.Model, tensor: str, nodes: Iterable[str]) -> list[Rows]:
    """The weights (C, K) by which those of these MatMul and Gemm nodes that read the tensor multiply it."""
    among = set(nodes)
    readers = [n for n in model.graph if n.name in among and graph.name_of(n.inputs[0]) == tensor]
    weights = [graph.array(graph.value(n.inputs[1])) for n in readers]
    return [layout_of(n, 2).matrix(w) for n, w in zip(readers, weights, strict=True)]


def easings(
    model: ir.Model, nodes: Sequence[str], means: Mapping[str, ChannelMoments], samples: Samples
) -> dict[str, OutlierTreatment]:
    """Tensor -> how to ease it, for what these MatMul and Gemm nodes read, where that is worth its cost.

    Each feed's rows are quantized with their own range, as dynamic nodes do.
    """
    among = set(nodes)
    tensors = [
        t
        for t in dict.fromkeys(graph.name_of(n.inputs[0]) for n in model.graph if n.name in among)
        if t in means
    ]
    weights = {t: weights_reading(model, t, nodes) for t in tensors}
    ways = {t: _ways(means[t].max_abs) for t in tensors}
    noise = {t: np.zeros(len(ways[t])) for t in tensors}
    for values in values_of(model, tensors, samples.subsample(FEEDS), packed=False):
        for t in tensors:
            rows = values[t].reshape(-1, values[t].shape[-1])
            for i, way in enumerate(ways[t]):
                factors = factors_of(way, means[t].max_abs, weights[t])
                noise[t][i] += sum(_noise(rows, w, factors) for w in weights[t])
    chosen = {t: _choose(ways[t], noise[t]) for t in tensors}
    return {t: way for t, way in chosen.items() if way.gain_db > 0}


def inverse(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the input is multiplied by: 1 / factor, 0 for a channel that is split off."""
    return np.divide(1, factors, out=np.zeros_like(factors), where=factors > 0)


def _ways(x_max: NDArray[np.float64]) -> list[OutlierTreatment]:
    largest = np.argsort(-x_max, kind="stable")[: len(x_max) // SPLIT_SHARE]
    split = tuple(sorted(int(i) for i in largest))
    return [
        OutlierTreatment(smooth, part, 0.0)
        for part in dict.fromkeys(((), split))
        for smooth in (False, True)
    ]


def _choose(ways: Sequence[OutlierTreatment], noise: NDArray[np.float64]) -> OutlierTreatment:
    """The way with the least noise, each after what it must gain for its cost."""
    floor = np.maximum(noise, 1e-30)
    gains = 10 * np.log10(floor[0] / floor)
    price = [SMOOTH_GAIN_DB * w.smooth + SPLIT_GAIN_DB * bool(w.split) for w in ways]
    best = int(np.argmax(gains - price))
    return OutlierTreatment(ways[best].smooth, ways[best].split, float(gains[best]))


def _noise(rows: Rows, weight: Rows, factors: NDArray[np.float32]) -> float:
    """Squared error of rows @ weight.T with uint8 rows and int8 weights; what is split off has none."""
    kept = factors > 0
    exact = rows[:, kept] @ weight[:, kept].T
    eased = rows[:, kept] / factors[kept]
    params = choose_params(eased.min(), eased.max(), Grid(8, signed=False, symmetric=False))
    rounded_weight = quantize_int8(weight[:, kept] * factors[kept], method="rtn").values
    rounded = dequantize(quantize(eased, params), params) @ rounded_weight.T
    return float(np.square(rounded - exact, dtype=np.float64).sum())


def _smoothing(x_max: NDArray[np.float64], weights: Iterable[Rows]) -> NDArray[np.float32]:
    w_max = np.max([np.abs(w).max(0, initial=0.0) for w in weights], axis=0)
    usable = (x_max > 0) & (w_max > 0)
    return np.sqrt(np.where(usable, x_max, 1.0) / np.where(usable, w_max, 1.0)).astype(np.float32)
