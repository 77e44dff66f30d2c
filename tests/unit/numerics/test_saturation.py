"""Which weights can saturate int16, and the nearest ones that cannot."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant_core.numerics.saturation import PAIR_LIMIT, make_safe, safe_scale, unsafe_pairs

INT16 = np.iinfo(np.int16)
rows = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(-127, 127)
)


def saturates(first: int, second: int) -> bool:
    """By the worst input there is: 255 where the weights have the sign, 0 elsewhere."""
    up, down = (255 * sum(sign * max(sign * w, 0) for w in (first, second)) for sign in (1, -1))
    return bool(up > INT16.max or down < INT16.min)


def test_a_pair_is_unsafe_exactly_if_some_input_saturates_it():
    pairs = np.array(list(itertools.product(range(-128, 128), repeat=2)), np.int8)

    unsafe = set(unsafe_pairs(pairs)[:, 0].tolist())

    assert unsafe == {i for i, (a, b) in enumerate(pairs.tolist()) if saturates(a, b)}


def test_neighbours_are_counted_from_the_start_of_each_row_and_an_odd_last_one_is_alone():
    q = np.array([[0, 100, 100], [100, 100, 127], [-100, -29, 0]], np.int8)

    assert unsafe_pairs(q).tolist() == [[1, 0], [2, 0]]


@given(rows)
def test_make_safe_leaves_no_unsafe_pair_and_touches_no_safe_one(q):
    safe = make_safe(q)

    assert len(unsafe_pairs(safe)) == 0
    touched = {(row, column // 2) for row, column in np.argwhere(safe != q)}
    assert touched == {tuple(pair) for pair in unsafe_pairs(q).tolist()}


def test_make_safe_moves_every_pair_as_little_as_possible():
    """Against all safe pairs: no other is nearer by the sum of squares."""
    unsafe = np.array(
        [p for p in itertools.product((65, 70, 100, 126, 127), repeat=2) if sum(p) > PAIR_LIMIT],
        np.int8,
    )
    safe = np.array(
        [p for p in itertools.product(range(-127, 128), repeat=2) if not saturates(*p)], np.int64
    )

    found = make_safe(np.concatenate([unsafe, -unsafe])).astype(int)

    for wanted, got in zip(np.concatenate([unsafe, -unsafe]).astype(int), found, strict=True):
        assert np.square(wanted - got).sum() == np.square(wanted - safe).sum(1).min()


@pytest.mark.parametrize("seed", range(20))
def test_at_the_safe_scale_only_rounding_can_make_a_pair_unsafe(seed):
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(3, (8, rng.integers(1, 40)))

    scale = safe_scale(weights)

    truncated = np.trunc(weights / np.where(scale > 0, scale, 1)[:, None] * (1 - 1e-12)).astype(
        np.int64
    )
    assert len(unsafe_pairs(truncated)) == 0
    assert np.all(unsafe_pairs(np.floor(weights / (0.97 * scale)[:, None]).astype(int))[:, 0] >= 0)


def test_a_row_of_zeros_needs_no_scale():
    assert safe_scale(np.zeros((1, 4)))[0] == 0
