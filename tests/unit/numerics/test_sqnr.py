"""Signal to noise, in dB."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quant_core.numerics.sqnr import difference_db

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("copy", "db"),
    [
        ([1.0, 2.0, INF], math.inf),
        ([1.0, 2.0 + 1e-9, INF], math.inf),
        ([1.0, 1.5, INF], 10 * math.log10(5.0 / 0.25)),
        ([1.0, NAN, INF], -math.inf),
        ([1.0, 2.0, 3.0], -math.inf),
        ([1.0, 2.0], -math.inf),
    ],
    ids=["same", "rounding", "noise", "no longer finite", "no longer infinite", "other shape"],
)
def test_a_copy_is_worth_its_signal_over_what_differs(copy, db):
    original = np.array([1.0, 2.0, INF], np.float32)

    assert difference_db(original, np.array(copy), 1e-14) == pytest.approx(db)
