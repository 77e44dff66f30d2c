"""Ranges by evidence: what every method promises, and that none of them can ruin a tensor."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant_core.calibrate.range_errors import Histogram, expected_errors, kl_divergence
from quant_core.calibrate.ranges import (
    CLIPPING_GAIN,
    ENOUGH_VALUES,
    RANGE_METHODS,
    RangeCache,
    find_range,
)
from quant_core.calibrate.stats import TensorStats
from quant_core.errors import DataError, RequestError
from quant_core.numerics.affine import Grid, choose_params, dequantize, quantize

Array = NDArray[Any]
UINT8, INT8 = Grid(8, signed=False, symmetric=False), Grid(8, signed=True, symmetric=True)
UINT4, UINT16 = Grid(4, signed=False, symmetric=False), Grid(16, signed=False, symmetric=False)
GRIDS = [UINT8, INT8, Grid(8, True, False), UINT4, Grid(4, True, True)]

DISTRIBUTIONS = {
    "normal": lambda rng: rng.normal(0.2, 1, 20_000),
    "relu": lambda rng: np.maximum(rng.normal(0, 1, 20_000), 0),
    "relu6": lambda rng: np.clip(rng.normal(2, 3, 20_000), 0, 6),
    "swish": lambda rng: (lambda x: x / (1 + np.exp(-x)))(rng.normal(0, 3, 20_000)),
    "negative": lambda rng: -rng.lognormal(0, 1, 20_000),
    "laplace": lambda rng: rng.laplace(0, 1, 20_000),
    "lognormal": lambda rng: rng.lognormal(0, 1.5, 20_000),
    "cauchy": lambda rng: rng.standard_cauchy(20_000),
    "one outlier": lambda rng: np.append(rng.normal(0, 1, 20_000), 60),
    "a huge outlier": lambda rng: np.append(rng.normal(0, 1, 20_000), -1e9),
    "far from zero": lambda rng: 100 + rng.random(20_000),
    "two peaks": lambda rng: np.concatenate([rng.normal(-8, 0.1, 9_000), rng.normal(3, 1, 9_000)]),
    "few values": lambda rng: rng.normal(0, 1, 30),
    "one value": lambda rng: np.full(1, 3.3),
    "a constant": lambda rng: np.full(100, -7.0),
    "zeros": lambda rng: np.zeros(100),
    "subnormal": lambda rng: rng.normal(0, 1e-41, 1_000),
    "large": lambda rng: rng.normal(0, 5e37, 1_000),
}
each_distribution = pytest.mark.parametrize("shape", DISTRIBUTIONS)
each_grid = pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda g: f"{g.dtype.name}{'s' * g.symmetric}"
)


def draw(shape: str, seed: int = 0) -> Array:
    return np.asarray(DISTRIBUTIONS[shape](np.random.default_rng(seed)), np.float32)


def enough(x: Array) -> Array:
    """The same values, so often that their extremes are believed."""
    return np.tile(x, -(-ENOUGH_VALUES // x.size))


def stats_of(x: Array) -> TensorStats:
    stats = TensorStats()
    stats.update(x)
    return stats


def true_error(x: Array, lo: float, hi: float, grid: Grid) -> float:
    params = choose_params(lo, hi, grid)
    return float(np.mean((dequantize(quantize(x, params), params).astype(np.float64) - x) ** 2))


def expected_error(stats: TensorStats, lo: float, hi: float, grid: Grid) -> float:
    return float(expected_errors(Histogram.of(stats), np.array([lo]), np.array([hi]), grid)[0])


@each_distribution
@each_grid
@pytest.mark.parametrize("method", ["auto", *RANGE_METHODS])
def test_a_range_holds_zero_and_never_exceeds_what_was_seen(
    shape: str, grid: Grid, method: str
) -> None:
    x = enough(draw(shape))

    lo, hi = find_range(stats_of(x), grid, method)

    assert min(float(x.min()), 0.0) <= lo <= 0 <= hi <= max(float(x.max()), 0.0)
    assert (lo < hi) == bool(x.any())
    choose_params(lo, hi, grid)


@pytest.mark.parametrize("shape", ["normal", "laplace", "relu", "swish"])
def test_few_values_let_expect_larger_ones(shape: str) -> None:
    gains = []
    for seed in range(40):
        x = draw(shape, seed)
        few, others = x[:1000], x[1000:]
        grown = find_range(stats_of(few), UINT8)
        believed = find_range(stats_of(enough(few)), UINT8)
        gains.append(true_error(others, *believed, UINT8) - true_error(others, *grown, UINT8))

    assert np.mean(gains) > 0


@pytest.mark.parametrize("shape", ["large", "a constant", "zeros", "one value", "subnormal"])
def test_what_few_values_let_expect_is_finite(shape: str) -> None:
    x = draw(shape)

    lo, hi = find_range(stats_of(x), UINT8)

    assert np.isfinite(np.float32([lo, hi])).all()
    assert lo <= min(float(x.min()), 0.0)
    assert hi >= max(float(x.max()), 0.0)
    choose_params(lo, hi, UINT8)


@each_distribution
@each_grid
def test_auto_clips_only_what_halves_the_error_and_then_as_well_as_any(
    shape: str, grid: Grid
) -> None:
    stats = stats_of(enough(draw(shape)))
    errors = {m: expected_error(stats, *find_range(stats, grid, m), grid) for m in RANGE_METHODS}

    auto = expected_error(stats, *find_range(stats, grid), grid)

    if auto != errors["minmax"]:
        assert auto < errors["minmax"] / CLIPPING_GAIN
        assert all(auto <= error * (1 + 1e-9) for error in errors.values())
    else:
        assert all(auto <= error * CLIPPING_GAIN * (1 + 1e-9) for error in errors.values())


def test_auto_clips_an_outlier_and_not_what_a_bright_image_is_full_of() -> None:
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal(1 << 22, np.float32))
    bright, outlier = stats_of(np.append(x[: 1 << 16], 8.0)), stats_of(np.append(x, 800.0))

    assert find_range(bright, UINT8, "mse")[1] < 8.0 == find_range(bright, UINT8)[1]
    assert find_range(outlier, UINT8)[1] == find_range(outlier, UINT8, "mse")[1] < 800.0


@each_distribution
@each_grid
def test_mse_is_never_worse_than_minmax_and_entropy_never_twice_as_bad(
    shape: str, grid: Grid
) -> None:
    stats = stats_of(draw(shape))
    errors = {m: expected_error(stats, *find_range(stats, grid, m), grid) for m in RANGE_METHODS}

    assert errors["mse"] <= errors["minmax"]
    assert errors["entropy"] <= 2 * errors["minmax"]


@pytest.mark.parametrize(
    "shape",
    ["normal", "relu", "swish", "laplace", "lognormal", "one outlier", "two peaks", "negative"],
)
@each_grid
def test_mse_is_as_good_as_trying_all_pairs(shape: str, grid: Grid) -> None:
    x = draw(shape)[:4000]
    stats = stats_of(x)
    lo, hi = find_range(stats, grid, "minmax")
    shares = np.linspace(1, 0.02, 50)

    pairs = [
        (a * lo, b * hi) for a in shares[:: 1 if lo else 50] for b in shares[:: 1 if hi else 50]
    ][::3]
    brute = min(expected_error(stats, a, b, grid) for a, b in pairs[:: 1 + len(pairs) // 150])

    assert expected_error(stats, *find_range(stats, grid, "mse"), grid) <= brute * 1.02


@pytest.mark.parametrize(
    "shape", ["normal", "relu", "relu6", "swish", "laplace", "lognormal", "two peaks", "negative"]
)
@each_grid
@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
def test_the_expected_error_is_the_error(shape: str, grid: Grid, share: float) -> None:
    x = draw(shape)
    lo, hi = share * min(float(x.min()), 0), share * max(float(x.max()), 0)

    # 20 000 values in 5 000 bins: each bin's mean is only known to the width of the bin
    assert expected_error(stats_of(x), lo, hi, grid) == pytest.approx(
        true_error(x, lo, hi, grid), rel=0.05
    )


def test_the_expected_error_of_even_values_is_a_twelfth_of_a_step() -> None:
    stats = stats_of(np.linspace(0, 255, 255 * 257, dtype=np.float32))

    assert expected_error(stats, 0, 255, UINT8) == pytest.approx(1 / 12, rel=1e-3)


def test_clipping_costs_the_square_of_what_is_cut() -> None:
    stats = stats_of(np.full(10, 4.0, np.float32))

    assert expected_error(stats, 0, 1, UINT8) == pytest.approx(9, rel=1e-6)


@given(
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.integers(0, 99),
    st.floats(50.1, 100),
    st.floats(50.1, 100),
)
def test_a_higher_percentile_is_a_wider_range(shape: str, seed: int, p: float, q: float) -> None:
    stats = stats_of(draw(shape, seed)[:500])

    narrow, wide = (
        find_range(stats, UINT8, "percentile", percentile) for percentile in sorted((p, q))
    )

    assert wide[0] <= narrow[0]
    assert narrow[1] <= wide[1]


@given(
    st.sampled_from(["normal", "swish", "laplace", "relu"]),
    st.integers(0, 99),
    st.sampled_from([60, 90, 99, 99.9]),
)
def test_a_percentile_is_numpys_up_to_a_bin_and_a_neighbour(
    shape: str, seed: int, percentile: float
) -> None:
    x = np.sort(draw(shape, seed)[:2000])
    stats = stats_of(x)

    lo, hi = find_range(stats, UINT8, "percentile", percentile)

    cut = percentile / 100 * x.size
    assert min(x[max(math.floor(x.size - cut) - 1, 0)], 0) - stats.width <= lo
    assert lo <= min(x[math.ceil(x.size - cut)], 0) + stats.width
    assert (
        x[math.floor(cut) - 1] - stats.width
        <= hi
        <= x[min(math.ceil(cut), x.size - 1)] + stats.width
    )


@each_distribution
def test_the_hundredth_percentile_is_exactly_minmax(shape: str) -> None:
    stats = stats_of(draw(shape))

    assert find_range(stats, UINT8, "percentile", 100) == find_range(stats, UINT8, "minmax")


def slow_divergence(edges: Array, counts: Array, lo: float, hi: float, step: float) -> float:
    """The definition in loops: P is clipped, Q spreads each level over its bins that P fills."""
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    inside = [i for i, m in enumerate(middles) if lo <= m <= hi]
    p = {i: float(counts[i]) for i in inside}
    p[inside[0]] += sum(counts[i] for i, m in enumerate(middles) if m < lo)
    p[inside[-1]] += sum(counts[i] for i, m in enumerate(middles) if m > hi)
    q = {}
    for i in inside:
        level = [j for j in inside if round(middles[j] / step) == round(middles[i] / step)]
        q[i] = sum(counts[j] for j in level) / max(sum(p[j] > 0 for j in level), 1) if p[i] else 0
    if any(p[i] and not q[i] for i in inside):
        return math.inf
    return sum(
        p[i] / sum(p.values()) * math.log(p[i] / sum(p.values()) / (q[i] / sum(q.values())))
        for i in inside
        if p[i]
    )


@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=30).filter(any),
    st.integers(-20, 0),
    st.floats(0.3, 9),
)
def test_the_fast_divergence_agrees_with_its_definition(
    counts: list[int], first: int, step: float
) -> None:
    edges = first + np.arange(len(counts) + 1.0)
    lo, hi = edges[0] * 0.7, max(edges[-1] * 0.7, edges[0] * 0.7 + 1)

    fast = kl_divergence(Histogram(edges, np.array(counts, np.float64)), lo, hi, step)

    bins_inside = [n for n, m in zip(counts, edges[1:] - 0.5, strict=True) if lo <= m <= hi]
    slow = slow_divergence(edges, np.array(counts), lo, hi, step) if any(bins_inside) else math.inf
    assert fast == pytest.approx(slow, rel=1e-9, abs=1e-12)


def test_entropy_clips_a_rare_outlier_where_clipping_is_cheap() -> None:
    rng = np.random.default_rng(3)
    stats = stats_of(np.append(rng.normal(0, 1, 400_000), [7.5, -7.0]).astype(np.float32))

    lo, hi = find_range(stats, UINT4, "entropy")

    assert -6 < lo < -2
    assert 2 < hi < 6


def test_entropy_keeps_a_tensor_that_fills_its_range() -> None:
    stats = stats_of(np.random.default_rng(4).random(400_000).astype(np.float32) * 6)

    assert find_range(stats, UINT8, "entropy")[1] > 5.5


@pytest.mark.parametrize("method", ["auto", *RANGE_METHODS])
def test_a_sixteen_bit_grid_has_ranges_too(method: str) -> None:
    x = draw("normal")

    assert true_error(x, *find_range(stats_of(x), UINT16, method, 100), UINT16) < 1e-7


@settings(max_examples=20)
@given(st.integers(-60, 60), st.sampled_from(["normal", "relu", "lognormal"]))
def test_ranges_scale_with_the_tensor(exponent: int, shape: str) -> None:
    x, factor = draw(shape)[:2000], 2.0**exponent

    for method in ("auto", *RANGE_METHODS):
        lo, hi = find_range(stats_of(x), UINT8, method)
        assert find_range(stats_of(x * np.float32(factor)), UINT8, method) == pytest.approx(
            (lo * factor, hi * factor)
        )


def test_a_tensor_that_was_never_seen_has_no_range() -> None:
    with pytest.raises(DataError, match="saw no value"):
        find_range(TensorStats(), UINT8)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(RequestError, match="Did you mean entropy"):
        find_range(stats_of(np.ones(1)), UINT8, "entropie")


def test_a_cached_range_is_that_of_its_own_statistic() -> None:
    cache = RangeCache()
    normal, relu = stats_of(draw("normal")), stats_of(draw("relu"))

    for _ in range(2):
        for stats in (normal, relu):
            for grid in (UINT8, UINT4):
                found = cache.find(stats, grid, "auto", 99.99)
                assert found == find_range(stats, grid, "auto", 99.99)
