"""What cannot be timed is refused in words before anything runs."""

from __future__ import annotations

import math

import pytest

import quant_core
from quant_core.errors import RequestError


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"seconds": math.inf}, "seconds is inf"),
    ],
)
def test_a_timing_without_threads_or_end_is_refused(limits, words):
    calls = [
        lambda: quant_core.benchmark_model("m.onnx", "q.onnx", **limits),
        lambda: quant_core.compare_models("m.onnx", ["q.onnx"], **limits),
        lambda: quant_core.explain_model("m.onnx", **limits),
    ]
    for call in calls:
        with pytest.raises(RequestError) as caught:
            call()
        assert f"{caught.value.where} {caught.value.problem}" == words
