"""The table of the page: every model in a row, with filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flows.console.choice import lead
from flows.console.formats import (
    accuracy_before_after,
    before_after,
    format_ms,
    format_size,
    format_speedup,
    latencies,
)
from flows.report.charts import sparkline
from flows.report.details import ARROW, NAME, NUMBER, timing_of
from flows.report.elements import Child, Element, element
from flows.report.reported_model import ReportedModel, badge, link
from quant_core.text import counted

COLUMNS = {  # heading -> class of its cells
    "model": NAME,
    "verdict": None,
    "size": NUMBER,
    "smaller": NUMBER,
    "accuracy": NUMBER,
    "latency": NUMBER,
    "speed-up": NUMBER,
    "trend": None,
    "plan": NAME,
    "target": None,
}

_Cell = tuple[Any, ...]  # what the cell sorts by, and its children


def models_table(models: list[ReportedModel]) -> Element:
    """Every model in a row. The script makes the headings sort, and shows the filters."""
    rows = [_cells(model) for model in models]
    filled = [name for name in COLUMNS if any(_is_filled(cells[name]) for cells in rows)]
    heads = [element("th", {"scope": "col", "class": COLUMNS[name]}, name) for name in filled]
    states = sorted({model.state for model in models})
    options = [element("option", {"value": ""}, "all verdicts")]
    options += [element("option", {"value": state}, state.replace("_", " ")) for state in states]
    options += [element("option", {"value": "worse"}, "got worse")]
    search = {
        "id": "filter",
        "type": "search",
        "placeholder": "filter by name, target, reason ( / )",
        "aria-label": "Filter models",
    }
    filters = element(
        "div",
        {"id": "filters", "hidden": ""},
        element("input", search),
        element("select", {"id": "state", "aria-label": "Verdict"}, *options),
        element("output", {"id": "count", "aria-live": "polite"}, counted(len(models), "model")),
    )
    table = element(
        "table",
        {"id": "models"},
        element("thead", {}, element("tr", {}, *heads)),
        element("tbody", {}, *map(partial(_table_row, filled), models, rows)),
    )
    region = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Models"}
    heading = element("h2", {}, "Models")
    return element("section", {}, heading, filters, element("div", region, table))


def _table_row(columns: Sequence[str], model: ReportedModel, cells: Mapping[str, _Cell]) -> Element:
    about = {"data-state": model.state, "data-worse": "yes" if model.regressions else None}
    shown = [_cell(COLUMNS[name], *cells[name]) for name in columns]
    return element("tr", {**about, "data-why": model.why or None}, *shown)


def _cells(model: ReportedModel) -> dict[str, _Cell]:
    """Heading -> what the model's cell sorts by, and what it shows."""
    row, (float_ms, quantized_ms) = model.row, latencies(model.row)
    timing = timing_of(model.stages)
    lo, hi = timing.get("speedup_lo"), timing.get("speedup_hi")
    sizes = row.get("float_size_bytes"), row.get("size_bytes")
    smaller = sizes[0] / sizes[1] if sizes[0] and sizes[1] else None
    accuracy, speedup = row.get("accuracy"), row.get("speedup")
    noise = None
    if float_ms and lo and hi:
        noise = f"({format_ms(float_ms / hi)} to {format_ms(float_ms / lo)})"
    ahead = lead(model.trace, row.get("chosen"))
    beside = None
    if ahead is not None:
        tried = len(model.trace)
        slower = f"{-ahead:.0%} slower than the fastest of {tried}"
        beside = f"fastest of {tried} by {ahead:.0%}" if ahead >= 0 else slower
    speedups = [*(earlier.get("speedup") for earlier in model.history), speedup]
    trend = sparkline(speedups, f"speed-up over {len(speedups)} runs")
    worse = None
    if model.regressions:
        worse = element("span", {"class": "badge worse"}, "; ".join(model.regressions))
    is_busy = "busy host" if row.get("busy") else None
    return {
        "model": (model.name, link(model)),
        "verdict": (model.state, badge(model)),
        "size": (sizes[1], before_after(*sizes, format_size, ARROW)),
        "smaller": (smaller, f"{smaller:.2f}x" if smaller else ""),
        "accuracy": (
            accuracy,
            accuracy_before_after(row, "accuracy_float", ARROW),
            _small(row.get("metric") if accuracy is not None else None),
        ),
        "latency": (
            quantized_ms,
            before_after(float_ms, quantized_ms, format_ms, ARROW),
            _small(noise),
        ),
        "speed-up": (speedup, format_speedup(speedup), _small(is_busy)),
        "trend": (-len(model.regressions), trend, worse),
        "plan": (ahead, (row.get("chosen") or "") if model.trace else "", _small(beside)),
        "target": (row.get("target"), row.get("target") or ""),
    }


def _is_filled(cell: _Cell) -> bool:
    return any(cell[1:])


def _cell(kind: str | None, value: object, *children: Child | None) -> Element:
    """A cell that sorts by `value`."""
    return element("td", {"class": kind, "data-value": value}, *children)


def _small(text: str | None) -> Element | None:
    return element("small", {}, f" {text}") if text else None
