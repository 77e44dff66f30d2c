"""The law of calibration: however samples are split, batched or ordered, statistics are the same.

They are the same to the last bit.
"""

from __future__ import annotations

import math
import tempfile
from fractions import Fraction
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from quant_core.calibrate.stats import MAX_BINS, ChannelMoments, TensorStats, merge_stats
from quant_core.calibrate.stats_files import load_stats, save_stats
from quant_core.calibrate.thinning import thinned
from quant_core.errors import DataError

Array = NDArray[Any]

any_float = st.floats(allow_nan=False, allow_infinity=False, width=32)
sizes = st.sampled_from([1e-45, 1e-38, 1e-3, 1.0, 6.0, 1e4, 1e9, 3e38])
usual_float = st.builds(
    lambda size, part: np.float32(size * part), sizes, st.floats(-1, 1, width=32)
)
arrays = hnp.arrays(np.float32, st.integers(0, 40), elements=any_float | usual_float)
parts_of_arrays = st.lists(arrays, max_size=6)


def stats_of(*parts: Array) -> TensorStats:
    stats = TensorStats()
    for part in parts:
        stats.update(part)
    return stats


def moments_of(*parts: Array, axis: int = 1) -> ChannelMoments:
    moments = ChannelMoments(axis)
    for part in parts:
        moments.update(part)
    return moments


@given(parts_of_arrays, st.randoms(use_true_random=False))
def test_order_and_batching_change_nothing(parts: list[Array], random: Any) -> None:
    everything = stats_of(np.concatenate([np.zeros(0, np.float32), *parts]))
    shuffled = parts.copy()
    random.shuffle(shuffled)

    assert stats_of(*parts) == everything
    assert stats_of(*shuffled) == everything
    assert stats_of(*(value for part in parts for value in part[:, None])) == everything


@given(parts_of_arrays, st.integers(1, 4))
def test_any_split_over_workers_merges_to_the_same(parts: list[Array], workers: int) -> None:
    shards = [stats_of(*parts[k::workers]) for k in range(workers)]

    assert reduce(TensorStats.merge, shards) == stats_of(*parts)
    assert reduce(TensorStats.merge, reversed(shards)) == stats_of(*parts)


@given(arrays, arrays, arrays)
def test_merge_is_associative_and_commutative_and_leaves_its_operands(
    a: Array, b: Array, c: Array
) -> None:
    x, y, z = stats_of(a), stats_of(b), stats_of(c)

    assert x.merge(y).merge(z) == x.merge(y.merge(z))
    assert x.merge(y) == y.merge(x)
    assert (x, y, z) == (stats_of(a), stats_of(b), stats_of(c))


@given(arrays)
def test_the_empty_statistic_is_the_identity(a: Array) -> None:
    stats = stats_of(a)

    assert stats.merge(TensorStats()) == stats == TensorStats().merge(stats)


@given(arrays)
def test_every_value_lies_in_its_bin(a: Array) -> None:
    stats = stats_of(a)

    numbers = [
        math.floor(Fraction(float(value)) / Fraction(stats.width)) - stats.first for value in a
    ]
    assert (
        stats.counts.tolist() == np.bincount(numbers, minlength=0).tolist()
        if numbers
        else not stats.count
    )
    assert stats.count == a.size
    assert stats.counts.size <= MAX_BINS


@given(st.integers(-100, 110), st.integers(0, 2**32 - 1), st.floats(-1, 1))
def test_a_range_has_at_least_2048_bins(exponent: int, seed: int, shift: float) -> None:
    x = (np.random.default_rng(seed).random(100) + shift).astype(np.float32) * np.float32(
        2.0**exponent
    )

    assert MAX_BINS // 2 <= stats_of(x).counts.size <= MAX_BINS


@pytest.mark.parametrize("outlier", [1e4, -1e9, 3.4e38, -3.4e38])
@pytest.mark.parametrize("tiny", [-1e-30, -1e-45, 1e-45])
def test_an_outlier_early_or_late_is_the_same(outlier: float, tiny: float) -> None:
    body, outliers = (
        np.array([tiny, -0.5, 0.0, 2.0, -0.0], np.float32),
        np.array([outlier], np.float32),
    )

    assert (
        stats_of(body, outliers)
        == stats_of(outliers, body)
        == stats_of(np.concatenate([body, outliers]))
    )


@pytest.mark.parametrize("constant", [0.0, 0.125, -3.0, 1e-45, 3e38])
def test_a_constant_tensor_is_no_coarser_than_what_it_grows_into(constant: float) -> None:
    x, y = np.full(3, constant, np.float32), np.array([0.0, 1.0, 0.125], np.float32)

    assert stats_of(x, y) == stats_of(y, x) == stats_of(np.concatenate([x, y]))


def test_minus_zero_is_zero() -> None:
    minus, plus = np.array([-0.0], np.float32), np.array([0.0], np.float32)

    assert math.copysign(1, stats_of(minus).lo) == math.copysign(1, stats_of(minus, plus).hi) == 1


def test_a_large_array_counts_as_its_pieces_do() -> None:
    x = np.random.default_rng(1).standard_cauchy((7, 30_011)).astype(np.float32)

    assert (
        stats_of(x) == stats_of(*x) == stats_of(x.T) == reduce(TensorStats.merge, map(stats_of, x))
    )


def test_a_thinned_histogram_obeys_the_law_and_keeps_the_exact_ends() -> None:
    x = np.random.default_rng(1).normal(0, 1, (6, 8, 80, 80)).astype(np.float32)
    together, apart = TensorStats(), [TensorStats() for _ in x]

    together.update(thinned(x, 1, 256), bounds=(x.min(), x.max()))
    for stats, sample in zip(apart, x, strict=True):
        stats.update(thinned(sample[None], 1, 256), bounds=(sample.min(), sample.max()))

    assert reduce(TensorStats.merge, apart) == together
    assert (together.lo, together.hi) == (x.min(), x.max())
    assert together.count == x[:, :, ::5, ::5].size


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 8, 30, 30), 1), ((1, 500, 768), -1), ((9, 5), 1), ((1, 4, 3, 300), 1)]
)
def test_small_tensors_and_channels_in_the_last_axis_are_not_thinned(
    shape: tuple[int, ...], axis: int
) -> None:
    assert thinned(np.zeros(shape), axis, 900).shape == shape


@given(hnp.array_shapes(min_dims=3, max_dims=5, max_side=40), st.integers(1, 200))
def test_thinning_keeps_as_many_positions_as_asked_and_every_channel(
    shape: tuple[int, ...], least: int
) -> None:
    kept = thinned(np.zeros(shape), 1, least)

    assert kept.shape[:2] == shape[:2]
    assert math.prod(kept.shape[2:]) >= min(least, math.prod(shape[2:]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_and_leave_the_statistic_alone(bad: float) -> None:
    stats, moments = stats_of(np.ones(3)), moments_of(np.ones((2, 3)))

    with pytest.raises(DataError, match=r"conv1: 2 of 6 values are NaN or infinite"):
        stats.update(np.array([1, 2, bad, 4, 5, bad]), "conv1")
    with pytest.raises(DataError, match=r"conv1: 2 of 6 values"):
        moments.update(np.array([[1, 2, bad], [4, 5, bad]]), "conv1")

    assert stats == stats_of(np.ones(3))
    assert moments == moments_of(np.ones((2, 3)))


batches = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 6), st.just(3), st.integers(1, 5)), elements=any_float
)


@given(st.lists(batches, max_size=4), st.integers(1, 3))
def test_channel_moments_obey_the_same_law(parts: list[Array], workers: int) -> None:
    everything = moments_of(*parts)
    samples = [sample[None] for part in parts for sample in part]
    shards = [moments_of(*samples[k::workers]) for k in range(workers)]

    assert reduce(ChannelMoments.merge, shards) == everything
    assert reduce(ChannelMoments.merge, reversed(shards)) == everything
    assert (
        moments_of(*(np.moveaxis(s, 1, 2) for s in samples), axis=-1).mean.tolist()
        == everything.mean.tolist()
    )
    assert everything.merge(ChannelMoments(1)) == everything == ChannelMoments(1).merge(everything)


@given(hnp.arrays(np.float32, (4, 3, 5), elements=st.floats(-(2.0**35), 2.0**35, width=32)))
def test_a_channel_mean_is_the_exact_mean_of_rounded_values(x: Array) -> None:
    moments = moments_of(x)

    for channel in range(3):
        values = [Fraction(float(v)) for v in x[:, channel].ravel()]
        exact = sum((Fraction(round(v * 2**20), 2**20) for v in values), Fraction(0)) / len(values)
        assert moments.mean[channel] == pytest.approx(float(exact), rel=1e-15, abs=0)
    assert moments.max_abs.tolist() == np.abs(x).max(axis=(0, 2)).tolist()
    assert moments.count == 20


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e12])
def test_a_large_tensor_sums_as_its_pieces_do(scale: float) -> None:
    x = (np.random.default_rng(2).normal(0.1, 1, (6, 5, 20_000)) * scale).astype(np.float32)

    assert (
        moments_of(x)
        == moments_of(*x[:, None])
        == reduce(ChannelMoments.merge, map(moments_of, x[:, None]))
    )
    np.testing.assert_allclose(
        moments_of(x[:, :2]).mean, np.clip(x[:, :2], -(2.0**36), 2.0**36).mean((0, 2), float), 1e-6
    )


def test_a_channel_axis_that_changes_its_size_is_refused() -> None:
    with pytest.raises(DataError, match="3 and 4 channels"):
        moments_of(np.ones((1, 3)), np.ones((1, 4)))


@given(st.lists(arrays, max_size=4))
def test_a_file_gives_back_what_was_saved_and_has_the_same_bytes(parts: list[Array]) -> None:
    stats: dict[str, Any] = {f"a/b:{i} ü": stats_of(part) for i, part in enumerate(parts)}
    stats |= {f"moments {i}": moments_of(part[None], axis=i % 2) for i, part in enumerate(parts)}
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one.stats", Path(folder) / "two.npz"
        save_stats(one, stats, [7, 2])
        save_stats(two, dict(reversed(stats.items())), [7, 2])

        assert load_stats(one) == (stats, [7, 2])
        assert one.read_bytes() == two.read_bytes()


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    save_stats(tmp_path / "good.npz", {"x": stats_of(np.arange(9.0))}, [1])
    whole = (tmp_path / "good.npz").read_bytes()

    for name, content in {
        "truncated": whole[: len(whole) // 2],
        "text": b"hello",
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="no calibration statistics"):
            load_stats(tmp_path / name)
    with pytest.raises(DataError, match="no calibration statistics"):
        load_stats(tmp_path / "missing")


def test_parts_merge_name_by_name() -> None:
    a, b = np.array([1.0, 2.0]), np.array([5.0])

    merged = merge_stats(
        [{"x": stats_of(a), "y": stats_of(a)}, {"x": stats_of(b)}, {"z": stats_of(b)}]
    )

    assert merged == {"x": stats_of(a, b), "y": stats_of(a), "z": stats_of(b)}
