"""How much of an output differs between samples."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.evaluate.variation import varying_db


def test_what_differs_between_samples_may_be_a_small_part_of_an_output():
    rng = np.random.default_rng(0)
    same, own = rng.normal(0, 100, 50), rng.normal(0, 1, (40, 50))

    found = varying_db(7 + same + own)

    share = own.var(0, ddof=1).sum() / (7 + same + own).var() / 50
    assert found == pytest.approx(10 * np.log10(share), abs=1e-6)
    assert found < -38


@pytest.mark.parametrize(
    "values",
    [
        np.ones((1, 5)),
        np.array([["a"], ["a"]]),
        [np.ones(5), np.ones(4)],
        np.array([[1, 2.0], [1, -np.inf]]),
        [],
        np.ones((3, 0)),
    ],
)
def test_nothing_is_said_of_what_cannot_be_compared(values):
    assert varying_db(iter(values)) is None


@pytest.mark.parametrize("last", [1, 1 + 1e-7])
def test_what_float32_rounds_does_not_differ(last):
    values = np.tile(np.arange(5.0), (4, 1)) * np.array([[1], [1], [1], [last]])

    assert varying_db(iter(values)) == -np.inf
