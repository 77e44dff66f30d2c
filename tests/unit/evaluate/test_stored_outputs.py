"""The outputs of the float model, beside which candidates run."""

from __future__ import annotations

import numpy as np

from quant_core.evaluate import outputs
from quant_core.evaluate.outputs import StoredOutputs


def test_one_of_several_outputs_is_read_without_the_others(monkeypatch):
    monkeypatch.setattr(outputs, "MAX_STORED_BYTES", 0)
    stored = StoredOutputs([[np.array([10 * i]), np.array([10 * i + 1])] for i in range(4)])
    opened, load = [], np.load
    monkeypatch.setattr(np, "load", lambda path: opened.append(path) or load(path))

    found = [int(x[0]) for x in stored.pick([3, 1]).of(1)]

    assert found == [31, 11]
    assert len(opened) == 2
