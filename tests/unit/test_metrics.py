"""A metric is one row: contracts, reports, audits, the console and the command line all read it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from flows.batch.rows import accuracy_of
from flows.console.formats import format_metric
from quant_core.config import Contract
from quant_core.errors import RequestError
from quant_core.evaluate.contract import judge
from quant_core.metrics import METRICS, Fidelity, OutputFidelity, find_metric


def fidelity(**values: float | None) -> Fidelity:
    output = OutputFidelity("y", 0.98, 17.0, 0.5, 0.9)
    figures = {"cosine": 0.98, "sqnr_db": 17.0, "max_abs_error": 0.5, "agreement": 0.9}
    return Fidelity(per_output=(output,), samples=100, **{**figures, **values})


class Run:
    """As much of a job as the accuracy columns look at."""

    def __init__(self, contract: Contract | None = None) -> None:
        self.contract = contract


def test_a_new_metric_is_one_row(monkeypatch):
    row = replace(
        METRICS["cosine"],
        name="error",
        value=lambda fidelity: -fidelity.max_abs_error,
        of_float=lambda fidelity: 0.0,
        form="{:.1f} units".format,
    )
    monkeypatch.setitem(METRICS, "error", row)

    contract = Contract(metric="error", max_drop=0.4)

    assert judge(fidelity(), contract).verdict == "not_met"
    columns = accuracy_of(Run(contract), fidelity().to_dict())
    assert (columns["metric"], columns["accuracy"]) == ("error", -0.5)
    assert format_metric("error", columns["accuracy"]) == "-0.5 units"


def test_the_cosine_of_float_is_one_in_contracts_and_in_reports():
    contract = Contract(metric="cosine", max_drop=0.02)

    columns = accuracy_of(Run(contract), fidelity().to_dict())

    assert judge(fidelity(), contract).verdict == "met"
    assert (columns["accuracy"], columns["accuracy_float"]) == (0.98, 1.0)


@pytest.mark.parametrize("metric", [m for m in METRICS.values() if m.of_float is None])
def test_a_drop_means_nothing_where_float_has_no_value(metric):
    with pytest.raises(RequestError, match="no value for float itself"):
        Contract(metric=metric.name, max_drop=0.01)


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(RequestError) as caught:
        Contract(metric="top5", min=0.9)

    known = "top1, agreement, cosine, sqnr, worst_sqnr, worst_lower_sqnr or module:function"
    assert caught.value.problem == f"is 'top5', not one of {known}"
    assert caught.value.hint == "Did you mean top1?"


def test_without_a_contract_top1_is_reported_if_there_were_labels():
    assert accuracy_of(Run(), fidelity().to_dict())["metric"] == "agreement"
    assert accuracy_of(Run(), fidelity(top1=0.5, top1_float=0.6).to_dict())["metric"] == "top1"


def test_a_share_is_noisy_by_its_standard_error_and_by_one_sample_at_least():
    noise = find_metric("agreement").noise

    assert noise(0.5, 10_000) == pytest.approx(0.005)
    assert noise(1.0, 50) == pytest.approx(1 / 50)


def test_fidelity_survives_json():
    before = fidelity(top1=0.5, top1_float=0.6)

    assert Fidelity.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_an_infinite_error_is_none_after_json():
    broken = fidelity(max_abs_error=math.inf)

    assert Fidelity.from_dict(broken.to_dict()).max_abs_error is None
