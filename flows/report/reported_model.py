"""A model as the page shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from flows.console.tables import failure_sentence
from flows.reading import PageData, Rows
from flows.regression import regressions
from flows.report.elements import Element, element
from quant_core.search.trace import TrialRow


class ReportedModel:
    """A model's row of the reports, with what belongs to it.

    name         unique on the page
    history      its rows of earlier runs, oldest first
    regressions  what got worse since the run before, in phrases
    anchor       its place on the page
    trace        the plans that were tried, in order
    """

    def __init__(self, name: str, row: Mapping[str, Any], data: PageData) -> None:
        self.name, self.row = name, row
        self.layers = _of_model(row, data.layers)
        self.stages = _of_model(row, data.stages)
        self.history = data.history.get(row["output"], [])
        self.regressions = regressions(row, self.history[-1] if self.history else None)
        self.anchor = f"model={quote(self.name, safe='')}"
        self.trace: list[TrialRow] = json.loads(row["trace"]) if row.get("trace") else []

    @property
    def state(self) -> str:
        """The outcome of a failed model, else the verdict, and the outcome without a contract."""
        if self.row["outcome"] == "failed":
            return "failed"
        is_judged = self.row["verdict"] != "none"
        return str(self.row["verdict"] if is_judged else self.row["outcome"])

    @property
    def is_wrong(self) -> bool:
        """Whether it failed or misses its contract."""
        return self.state in ("failed", "not_met")

    @property
    def why(self) -> str:
        """What is wrong, in one line."""
        if self.row["outcome"] == "failed":
            return failure_sentence(self.row["stage"], self.row["error"], self.row["where"])
        return self.row["reason"] or ""


def _of_model(row: Mapping[str, Any], rows: Mapping[str, Rows]) -> Rows:
    """The rows of its digest. Of a model that failed, only those of this very run."""
    found = rows.get(row["digest"], [])
    is_failed = row["outcome"] == "failed"
    return [r for r in found if r["run_id"] == row["run_id"]] if is_failed else found


def badge(model: ReportedModel) -> Element:
    """Its state, in colour."""
    return element("span", {"class": f"badge {model.state}"}, model.state.replace("_", " "))


def link(model: ReportedModel) -> Element:
    """Its name, which leads to its details."""
    return element("a", {"href": f"#{model.anchor}"}, model.name)
