"""A description of samples is valid once built."""

from __future__ import annotations

import json

import pytest

from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"shape": [1, -1]}, r"is \[1, -1\]"),
        ({"shape": {"x": [1, -2]}}, r"is \[1, -2\]"),
    ],
)
def test_a_spec_is_valid_once_built(wrong, problem):
    with pytest.raises(DataError, match=problem):
        SampleSpec(**wrong)


def test_a_spec_survives_json():
    spec = SampleSpec("data.npz", "labels.npy", 7, {"x": [1, 3]}, 2)

    written = spec.to_dict()

    assert written == {
        "source": "data.npz",
        "labels": "labels.npy",
        "count": 7,
        "shape": {"x": [1, 3]},
        "seed": 2,
        "flow": None,
    }
    assert SampleSpec.from_dict(json.loads(json.dumps(written))) == spec
