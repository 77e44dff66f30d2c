"""The part of the page about one model: facts, the plans that were tried, layers and stages."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from flows.console.choice import chosen_trial, why_chosen
from flows.console.flags import flags_of
from flows.console.formats import (
    accuracy_before_after,
    before_after,
    format_db,
    format_ms,
    format_number,
    format_percent,
    format_size,
    format_speedup,
    latencies,
)
from flows.report.charts import front_chart, latency_chart, layers_chart, range_chart
from flows.report.elements import Child, Element, element, table_body
from quant_core.config import QuantConfig
from quant_core.search.trace import TrialRow, on_front
from quant_core.text import counted

Values = Mapping[str, Any]

NUMBER, NAME = "num", "name"  # classes of cells: on the right; broken late
ARROW = "→"
FRONT_LEGEND = (
    "Circles: plans that were tried; strong ones: none beats them in speed, SQNR and size together."
    " Disc: the model as written."
)
LATENCY_LEGEND = (
    "Share of the rounds in which a call took at most so long. Dashed: float; line: quantized."
)
LAYERS_LEGEND = "Circles: each layer alone. Discs: with all before it. Higher is nearer to float."


def details(
    row: Values, trace: Sequence[TrialRow], layers: Sequence[Values], stages: Sequence[Values]
) -> tuple[Child, ...]:
    """Everything that the reports know about a model, as the children of its section."""
    speedup, sqnr_db = row.get("speedup"), row.get("sqnr_db")
    written = None if speedup is None or sqnr_db is None else (speedup, sqnr_db)
    beside = [
        *_figure(front_chart(trace, written), FRONT_LEGEND),
        *_figure(latency_chart(timing_of(stages)), LATENCY_LEGEND),
    ]
    parts = [
        element(
            "div",
            {"class": "overview"},
            facts(_facts(row, trace, stages)),
            element("div", {}, *beside) if beside else None,
        ),
        *_figure(layers_chart(layers), LAYERS_LEGEND, is_wide=True),
        *_tried(trace, row.get("chosen")),
        *_layers(layers),
        *_stages(stages),
        *_command(row),
    ]
    return tuple(parts)


def facts(values: Mapping[str, object]) -> Element:
    """A table of two columns; what is None or empty is left out."""
    rows = []
    for key, value in values.items():
        if value not in (None, ""):
            head = element("th", {"scope": "row"}, key)
            rows.append(element("tr", {}, head, element("td", {}, str(value))))
    return element("table", {"class": "facts"}, element("tbody", {}, *rows))


def rows_table(
    caption: str, columns: Mapping[str, str | None], rows: Sequence[Sequence[Child]]
) -> Element:
    """A table that can be scrolled sideways, without the columns that are empty in all rows.

    columns  heading -> class of its cells: NUMBER, NAME, or None
    """
    filled = [i for i in range(len(columns)) if any(cells[i] for cells in rows)]
    kinds = list(columns.items())
    heads = [element("th", {"scope": "col", "class": kinds[i][1]}, kinds[i][0]) for i in filled]
    shown = [[cells[i] for i in filled] for cells in rows]
    table = element(
        "table",
        {},
        element("caption", {}, caption),
        element("thead", {}, element("tr", {}, *heads)),
        table_body([kinds[i][1] for i in filled], shown),
    )
    return _scrolled(caption, table)


def _scrolled(label: str, inside: Element) -> Element:
    """A region that scrolls; it can be reached by the keyboard."""
    region = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": label}
    return element("div", region, inside)


def timing_of(stages: Sequence[Values]) -> Values:
    """The row of the stage `benchmark`, empty if there is none."""
    return next((stage for stage in stages if stage["stage"] == "benchmark"), {})


def _facts(row: Values, trace: Sequence[TrialRow], stages: Sequence[Values]) -> dict[str, object]:
    timing = timing_of(stages)
    lo, hi = timing.get("speedup_lo"), timing.get("speedup_hi")
    quartiles = f", quartiles {lo:.2f}x to {hi:.2f}x" if lo and hi else ""
    rounds = f", {timing['rounds']} rounds" if timing.get("rounds") else ""
    threads = f", threads: {timing['threads']}" if timing.get("threads") else ""
    p95 = timing.get("float_p95_ms"), timing.get("quantized_p95_ms")
    speedup = format_speedup(row.get("speedup"))
    sizes = row.get("float_size_bytes"), row.get("size_bytes")
    worst, lower, metric = row.get("worst_db"), row.get("lower_db"), row.get("metric") or "accuracy"
    others = f", {format_db(lower)} or more on others" if lower is not None else ""
    why = why_chosen(trace, row.get("chosen"), row["verdict"])
    return {
        "contract": row.get("reason"),
        "plan": f"{row['chosen']}: {why}" if why else None,
        "failed in": row.get("stage"),
        "error": row.get("error"),
        "where": row.get("where"),
        "hint": row.get("hint"),
        "note": row.get("note"),
        "size": before_after(*sizes, format_size, ARROW),
        metric: accuracy_before_after(row, "accuracy_float", ARROW),
        "agreement": format_percent(row.get("agreement")),
        "SQNR": format_db(row.get("sqnr_db")),
        "of the worst output": None
        if worst is None
        else f"{format_db(worst)} around its mean{others}",
        "cosine": format_number(row.get("cosine"), 6),
        "largest error": format_number(row.get("max_abs_error"), 6),
        "latency": before_after(*latencies(row), format_ms, ARROW),
        "95th percentile": before_after(*p95, format_ms, ARROW),
        "speed-up": f"{speedup}{quartiles}{rounds}{threads}" if speedup else None,
        "others took while timed": _share_of_host(row.get("host_load")),
        "target": row.get("target"),
        "safe from 16-bit saturation": _yes_or_no(row.get("saturation_safe")),
        "input": row.get("input"),
        "output": row.get("output") if row["outcome"] != "failed" else None,
        "digest": row.get("digest"),
    }


def _figure(chart: Element | None, legend: str, is_wide: bool = False) -> list[Child]:
    """The chart with its legend; a wide one is scrolled on a narrow screen."""
    if chart is None:
        return []
    shown = _scrolled(legend, chart) if is_wide else chart
    kind = {"class": "wide"} if is_wide else {}
    return [element("figure", kind, shown, element("figcaption", {}, legend))]


def _tried(trace: Sequence[TrialRow], chosen: str | None) -> list[Child]:
    """The plans of the search."""
    if not trace:
        return []
    front, written = on_front(trace), chosen_trial(trace, chosen)
    columns = {"plan": NAME, "written": None}
    columns |= dict.fromkeys(("speed-up", "SQNR", "agreement", "size"), NUMBER)
    columns |= dict.fromkeys(("unbeaten", "error"))
    rows = [
        [
            str(trial.get("candidate")),
            "yes" if trial is written else "",
            f"{trial['speedup']:.2f}x" if trial.get("speedup") else "",
            format_db(trial.get("sqnr_db")),
            format_percent(trial.get("agreement")),
            format_size(trial.get("size_bytes")),
            "yes" if trial in front else "",
            str(trial.get("error") or ""),
        ]
        for trial in trace
    ]
    return [rows_table("Plans that were tried, in order", columns, rows)]


def _layers(layers: Sequence[Values]) -> list[Child]:
    """Each node of the plan."""
    if not layers:
        return []
    columns: dict[str, str | None] = {
        "#": NUMBER,
        "node": NAME,
        **dict.fromkeys(("operator", "computes", "weight in")),
        **dict.fromkeys(("alone", "so far", "weight", "elements"), NUMBER),
        "range of its output": None,
        "rewritten by": None,
        "why": NAME,
    }
    rows: list[list[Child]] = [
        [
            str(row["position"]),
            row["node"],
            row.get("op_type") or "",
            row.get("compute") or "",
            row.get("storage") or "",
            format_db(row.get("isolated_db")),
            format_db(row.get("cumulative_db")),
            format_db(row.get("sqnr_db")),
            f"{row['elements']:,}" if row.get("elements") else "",
            _range(row),
            row.get("rewrites") or "",
            row.get("reason") or "",
        ]
        for row in sorted(layers, key=lambda row: int(row["position"]))
    ]
    caption = (
        f"{counted(len(rows), 'layer')}, with the SQNR of each output alone and with all layers "
        "before it, and that of the weight"
    )
    return [rows_table(caption, columns, rows)]


def _range(layer: Values) -> Child:
    """The histogram of a layer's output, and in words what its integers cover of it."""
    chart = range_chart(layer)
    if chart is None:
        return ""
    covered = f"{layer['range_lo']:.3g} to {layer['range_hi']:.3g}"
    seen = f" of {layer['seen_lo']:.3g} to {layer['seen_hi']:.3g}"
    return element("span", {}, chart, element("small", {}, covered + seen))


def _stages(stages: Sequence[Values]) -> list[Child]:
    if not stages:
        return []
    rows = [
        [
            stage["stage"],
            f"{format_number(stage.get('seconds'))} s",
            format_size(stage.get("peak_bytes")),
        ]
        for stage in stages
    ]
    columns = {"stage": None, "time": NUMBER, "peak memory": NUMBER}
    return [rows_table("Stages", columns, rows)]


def _command(row: Values) -> list[Child]:
    """The command line that makes such a model; the reports do not know the samples."""
    if not row.get("config"):
        return []
    words = ["quantmill", "quantize", row["input"], "-o", row["output"], "--data", "CALIBRATION"]
    default = QuantConfig().to_dict()
    for key, value in json.loads(row["config"]).items():
        if value != default.get(key):
            words += _typed(key, value)
    label = element("p", {}, "The same for one model, with your calibration samples:")
    return [label, element("pre", {}, element("code", {}, shlex.join(words)))]


def _typed(key: str, value: object) -> list[str]:
    """The option of a key of QuantConfig that has another value than the default, as typed."""
    option = flags_of(key)[-1]
    if isinstance(value, bool):
        return [option]
    if isinstance(value, Mapping):
        value = [f"{name}={number}" for name, number in value.items()]
    values = value if isinstance(value, list) else [value]
    return [word for item in values for word in (option, str(item))]


def _share_of_host(share: float | None) -> str | None:
    return f"{format_percent(share, 0)} of this host" if share else None


def _yes_or_no(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"
