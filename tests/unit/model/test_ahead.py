"""Results that are computed ahead come in order, and errors in their place."""

from __future__ import annotations

import time

import numpy as np
import pytest

from quant_core.model.ahead import run_ahead


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.01 if item == 0 else 0)
        return -item

    assert list(run_ahead(slow_first, range(9))) == [-item for item in range(9)]


def test_an_error_comes_in_the_place_of_its_result() -> None:
    found = run_ahead(lambda item: 1 // item, [1, 2, 0, 3])

    assert [next(found), next(found)] == [1, 0]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_numpy_treats_errors_as_the_caller_wants() -> None:
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        list(run_ahead(np.exp, [np.array([1e9])]))
