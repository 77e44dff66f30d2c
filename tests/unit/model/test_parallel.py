"""Results that are computed ahead come in order, and errors in their place."""

from __future__ import annotations

import time

import numpy as np
import pytest

from quant_core.model.parallel import parallel_map


@pytest.fixture(params=[0.0, 0.01], ids=["by the caller", "in threads"])
def first(request):
    """Wait in the first call, so that the others are worth a thread, or not."""
    return lambda item: time.sleep(request.param if item == 1 else 0)


def test_results_come_in_the_order_of_the_items(first) -> None:
    def negative(item: int) -> int:
        first(item)
        return -item

    assert list(parallel_map(negative, range(1, 9))) == [-item for item in range(1, 9)]


def test_an_error_comes_in_the_place_of_its_result(first) -> None:
    def inverse(item: int) -> int:
        first(item)
        return 1 // item

    found = parallel_map(inverse, [1, 2, 0, 3])

    assert [next(found), next(found)] == [1, 0]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_numpy_treats_errors_as_the_caller_wants() -> None:
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        list(parallel_map(np.exp, [np.array([1e9])]))
