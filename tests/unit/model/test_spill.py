"""Arrays beyond a limit wait in files, and are the same when they are read."""

from __future__ import annotations

import gc
import warnings

import numpy as np

from quant_core.model.spill import SpilledArrays


def test_arrays_that_do_not_fit_into_memory_are_kept_in_files():
    spilled = SpilledArrays(most_bytes=100)
    arrays = {str(k): np.full((4, 4), k, np.float32) for k in range(3)}
    arrays["text"] = np.array(["a", "b"], object)

    spilled.update(arrays)
    spilled["1"] = arrays["1"] = np.ones(3, np.int8)
    del spilled["2"], arrays["2"]

    assert spilled.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(spilled[name], array)


def test_the_files_go_with_the_arrays_without_a_warning():
    with warnings.catch_warnings(action="error"):
        spilled = SpilledArrays(most_bytes=0)
        spilled["x"] = np.ones(3)
        folder = spilled._folder.path
        del spilled
        gc.collect()

    assert not folder.exists()
