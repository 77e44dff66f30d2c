"""Contracts: each clause holds or fails with the measured value and its bound in the reason."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quant_core.config import Contract
from quant_core.errors import DataError, RequestError
from quant_core.evaluate.contract import Ruling, Verdict, conclude, gain_clauses, judge
from quant_core.evaluate.fidelity import compare
from quant_core.metrics import Fidelity
from tests.unit.evaluate.outputs import rows


def drop_of_one_in_ten() -> Fidelity:
    """Ten labels, all predicted by the float model and nine by the quantized one."""
    labels = np.arange(10)
    return compare(rows(np.eye(10)), rows(np.eye(10)[[*range(9), 0]]), ["y"], labels)


@pytest.mark.parametrize(
    ("contract", "verdict", "reason"),
    [
        (Contract(max_drop=0.1), Verdict.MET, "top1 1.0000 to 0.9000: drop 0.1000, at most 0.1"),
        (Contract(max_drop=0.09), Verdict.NOT_MET, "drop 0.1000, at most 0.09"),
        (Contract(min=0.9), Verdict.MET, "top1 0.9000, at least 0.9"),
        (
            Contract(metric="agreement", min=0.95),
            Verdict.NOT_MET,
            "agreement 0.9000, at least 0.95",
        ),
        (Contract(metric="cosine", max_drop=0.2), Verdict.MET, "cosine 1.0000 to 0.9"),
        (Contract(metric="sqnr", min=30.0), Verdict.NOT_MET, "sqnr 6.9897, at least 30"),
        (Contract(max_drop=0.1, min_speedup=1.5), Verdict.NOT_MET, "speedup 1.20, at least 1.5"),
        (Contract(max_drop=0.1, max_size_ratio=0.25), Verdict.NOT_MET, "size 0.300, at most 0.25"),
    ],
)
def test_a_contract_is_judged_with_its_reason(contract, verdict, reason):
    judged = judge(drop_of_one_in_ten(), contract, speedup=1.2, size_ratio=0.3)

    assert judged.verdict == verdict
    assert reason in judged.reason


def test_a_least_value_that_float_misses_too_is_said_to_be_one():
    two_wrong = rows(np.eye(10)[[1, 0, *range(2, 10)]])
    fidelity = compare(two_wrong, two_wrong, ["y"], np.arange(10))

    assert judge(fidelity, Contract(min=0.9)) == Ruling(
        Verdict.NOT_MET,
        "top1 0.8000, at least 0.9, which float misses too: 0.8000",
    )


@pytest.mark.parametrize("metric", ["top1", "agreement", "cosine"])
def test_a_least_value_that_no_model_can_have_is_refused(metric):
    with pytest.raises(RequestError, match=f"is 98, but {metric} is never above 1"):
        Contract(metric, min=98.0)


def test_speed_and_size_are_not_judged_before_they_are_measured():
    contract = Contract(max_drop=0.1, min_speedup=9.0, max_size_ratio=0.01)

    assert judge(drop_of_one_in_ten(), contract).verdict == Verdict.MET


def test_a_metric_that_was_not_measured_is_an_error_not_a_verdict():
    fidelity = compare(rows(np.eye(3)), rows(np.eye(3)), ["y"])

    with pytest.raises(DataError, match="not measured") as caught:
        judge(fidelity, Contract(max_drop=0.01))
    assert caught.value.hint == "Give labels that are whole numbers"


def test_speed_and_size_alone_can_be_judged_with_the_same_words():
    contract = Contract(max_drop=0.5, min_speedup=1.5, max_size_ratio=0.5)

    whole = judge(drop_of_one_in_ten(), contract, speedup=1.2, size_ratio=0.6)
    gain = conclude(gain_clauses(contract, speedup=1.2, size_ratio=0.6))

    reason = "speedup 1.20, at least 1.5; size 0.600, at most 0.5"
    assert gain == whole == Ruling(Verdict.NOT_MET, reason)


def test_a_verdict_is_its_word_in_json():
    assert json.dumps([Verdict.MET, Verdict.NOT_MET, Verdict.NONE]) == '["met", "not_met", "none"]'
