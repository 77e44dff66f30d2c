"""One self-contained HTML page of a run: the verdict, every model in a table, and its details.

It opens from the disk, asks no host for anything, and reads without JavaScript. Details beyond
PLAIN_BYTES are packed: the page's script unpacks those of a model when they are opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from flows.console.choice import lead
from flows.console.formats import format_metric, format_ms, format_size
from flows.console.run_views import unique_names
from flows.console.tables import failure_sentence
from flows.reading import PageData, Rows, read_page
from flows.report.charts import sparkline
from flows.report.details import NAME, NUMBER, details, facts, latency, rows_table, timing_of
from flows.report.elements import Child, Element, element, pack
from flows.report.regression import regressions
from quant_core.model.atomic import atomic_write

PLAIN_BYTES = 1_000_000  # of details that stand in the page as HTML, the wrong models' first
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
RUNS_SHOWN = 30


def write_report(folder: Path, path: Path, run_id: str | None = None) -> Path:
    """Write the page of the latest run of an output folder, or of the run of that id, to `path`.

    The file appears as a whole, or stays as it was. Names are as in `read_page`.

    Raises: RequestError if there is no report, or no such run.
    """
    page = render_page(read_page(folder, run_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(page.encode("utf-8"))
    return path


def render_page(data: PageData) -> str:
    """The page as text."""
    names = unique_names(data.models)
    models = [_Model(name, row, data) for name, row in zip(names, data.models, strict=True)]
    parts = [
        _header(data, models),
        _wrong(models),
        _table(models),
        _sections(models),
        _inventory(data),
    ]
    body = [part for part in parts if part is not None]
    return document(f"quantmill: {_verdict(models)}", body, _asset("page.js"))


def document(title: str, body: Sequence[Element], script: str = "") -> str:
    """A whole page in our style, which asks no host for anything and runs only this script."""
    style = _asset("page.css")
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element(
            "meta", {"http-equiv": "Content-Security-Policy", "content": _policy(style, script)}
        ),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("title", {}, title),
    )
    inside = "\n".join(part.to_html() for part in body)
    heading = head.to_html().removesuffix("</head>")
    return (
        f'<!DOCTYPE html>\n<html lang="en">{heading}<style>{style}</style></head>\n'
        f"<body>\n{inside}\n<script>{script}</script></body></html>\n"
    )


_Cell = tuple[Any, ...]  # what the cell sorts by, and its children


class _Model:
    """A model's row with what belongs to it."""

    def __init__(self, name: str, row: Mapping[str, Any], data: PageData) -> None:
        self.name, self.row = name, row
        self.layers = _of_model(row, data.layers)
        self.stages = _of_model(row, data.stages)
        self.history = data.history.get(row["output"], [])
        self.regressions = regressions(row, self.history[-1] if self.history else None)
        self.anchor = f"model={quote(self.name, safe='')}"
        self.trace = json.loads(row["trace"]) if row.get("trace") else []

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


def _policy(style: str, script: str) -> str:
    """A policy that forbids every request, and all but the page's own style and script."""
    return (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_sha256(style)}'; script-src '{_sha256(script)}'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _asset(name: str) -> str:
    return resources.files("flows.report").joinpath(name).read_text(encoding="utf-8")


def _verdict(models: list[_Model]) -> str:
    """The whole run in one line."""
    failed = sum(model.state == "failed" for model in models)
    not_met = sum(model.state == "not_met" for model in models)
    worse = sum(bool(model.regressions) for model in models)
    made = f"{len(models) - failed} of {len(models)} models made"
    wrong = [f"{failed} failed"] if failed else []
    wrong += [f"{not_met} miss their contract" if not_met != 1 else "1 misses its contract"] * bool(
        not_met
    )
    wrong += [f"{worse} got worse since the run before"] if worse else []
    has_contract = any(model.state == "met" for model in models)
    return ", ".join([made, *(wrong or (["every contract is met"] if has_contract else []))])


def _header(data: PageData, models: list[_Model]) -> Element:
    wrong = any(model.is_wrong or model.regressions for model in models)
    sized = [m.row for m in models if m.row.get("float_size_bytes") and m.row.get("size_bytes")]
    before, after = (sum(row[key] for row in sized) for key in ("float_size_bytes", "size_bytes"))
    speedups = [m.row["speedup"] for m in models if m.row.get("speedup")]
    won = [f"{format_size(before)} → {format_size(after)}"] if after else []
    won += [f"{before / after:.2f}x smaller"] if after else []
    won += [f"median speed-up {median(speedups):.2f}x"] if speedups else []
    run = data.run
    of_run = (
        f"Run {run['run_id']}, {_moment(run['finished_at'])}, on {run['host']} ({run['target']})"
    )
    return element(
        "header",
        {},
        element("h1", {"class": "bad" if wrong else "good"}, f"{_verdict(models)}."),
        element("p", {"class": "won"}, "; ".join(won)) if won else None,
        element("p", {"class": "muted"}, of_run),
    )


def _wrong(models: list[_Model]) -> Element | None:
    """The models that failed, miss their contract or got worse, each with its reason."""
    items = []
    for model in models:
        reasons = ([model.why] if model.is_wrong else []) + model.regressions
        if reasons:
            text: list[Child] = [
                _badge(model),
                " ",
                _link(model),
                f": {'; '.join(filter(None, reasons))}.",
            ]
            hint = model.row.get("hint") if model.state == "failed" else None
            end = element("span", {"class": "muted"}, f" {hint}.") if hint else None
            items.append(element("li", {}, *text, end))
    if not items:
        return None
    heading = element("h2", {}, "What needs attention")
    return element("section", {"class": "wrong"}, heading, element("ul", {}, *items))


def _table(models: list[_Model]) -> Element:
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
        element("output", {"id": "count", "aria-live": "polite"}, f"{len(models)} models"),
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


def _table_row(columns: Sequence[str], model: _Model, cells: Mapping[str, _Cell]) -> Element:
    about = {"data-state": model.state, "data-worse": "yes" if model.regressions else None}
    shown = [_cell(COLUMNS[name], *cells[name]) for name in columns]
    return element("tr", {**about, "data-why": model.why or None}, *shown)


def _cells(model: _Model) -> dict[str, _Cell]:
    """Heading -> what the model's cell sorts by, and what it shows."""
    row, ms = model.row, latency(model.row)
    timing = timing_of(model.stages)
    lo, hi = timing.get("speedup_lo"), timing.get("speedup_hi")
    sizes = row.get("float_size_bytes"), row.get("size_bytes")
    smaller = sizes[0] / sizes[1] if sizes[0] and sizes[1] else None
    accuracy = [
        format_metric(row.get("metric"), row.get(key)) for key in ("accuracy_float", "accuracy")
    ]
    noise = (
        f" ({format_ms(row['float_ms'] / hi)} to {format_ms(row['float_ms'] / lo)})"
        if ms and lo and hi
        else ""
    )
    ahead = lead(model.trace, row.get("chosen"))
    beside = None
    if ahead is not None:
        where = "ahead of the next" if ahead >= 0 else "slower than the fastest"
        beside = f"{abs(ahead):.0%} {where} of {len(model.trace)}"
    speedups = [r.get("speedup") for r in (*model.history, row)]
    trend = sparkline(speedups, f"speed-up over {len(speedups)} runs")
    worse = (
        element("span", {"class": "badge worse"}, "; ".join(model.regressions))
        if model.regressions
        else None
    )
    is_busy = "busy host" if row.get("busy") else None
    return {
        "model": (model.name, _link(model)),
        "verdict": (model.state, _badge(model)),
        "size": (sizes[1], " → ".join(map(format_size, filter(None, sizes)))),
        "smaller": (smaller, f"{smaller:.2f}x" if smaller else ""),
        "accuracy": (
            row.get("accuracy"),
            " → ".join(filter(None, accuracy)),
            _small(row.get("metric") if accuracy[1] else None),
        ),
        "latency": (
            ms and ms[1],
            f"{format_ms(ms[0])} → {format_ms(ms[1])}" if ms else "",
            _small(noise),
        ),
        "speed-up": (row.get("speedup"), f"{row['speedup']:.2f}x" if ms else "", _small(is_busy)),
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


def _badge(model: _Model) -> Element:
    return element("span", {"class": f"badge {model.state}"}, model.state.replace("_", " "))


def _link(model: _Model) -> Element:
    return element("a", {"href": f"#{model.anchor}"}, model.name)


def _sections(models: list[_Model]) -> Element:
    """A section for each model, folded unless it is wrong; large ones are packed."""
    written: dict[int, Element] = {}
    free, packed = PLAIN_BYTES, False
    for model in sorted(models, key=lambda model: not model.is_wrong):
        inside = details(model.row, model.trace, model.layers, model.stages)
        if free > 0:  # else nothing fits
            free -= sum(len(part.to_html()) for part in inside if not isinstance(part, str))
        packed = packed or free <= 0
        written[id(model)] = _section(model, inside, is_plain=free > 0)
    note = "Some details are packed and open with JavaScript only; the table has every model."
    noscript = [element("noscript", {}, element("p", {}, note))] if packed else []
    heading = element("h2", {}, "Details")
    parts = [written[id(model)] for model in models]
    return element("section", {"id": "details"}, heading, *noscript, *parts)


def _section(model: _Model, inside: tuple[Child, ...], is_plain: bool) -> Element:
    # A link to an element inside of a closed section opens it, with no script.
    anchor = element("div", {"id": model.anchor, "class": "anchor"})
    title = element("summary", {}, model.name, " ", _badge(model))
    if is_plain:
        packed = None
    else:
        packed = element("script", {"type": "text/plain"}, pack(inside))
    is_open = "" if model.is_wrong and is_plain else None
    children = inside if is_plain else ()
    return element("details", {"open": is_open}, title, anchor, packed, *children)


def _inventory(data: PageData) -> Element:
    """Where and with what the run was made, and the runs before it."""
    run = data.run
    made_with = {
        "folder": run["folder"],
        "host": run["host"],
        "CPU": run.get("cpu"),
        "target": run["target"],
        "workers": run["workers"],
        **{key: run.get(key) for key in ("quantmill", "python", "onnx", "onnxruntime")},
        "started": _moment(run["started_at"]),
        "finished": _moment(run["finished_at"]),
        "command": run.get("command"),
        "this page": shlex.join(
            ["quantmill", "report", run["folder"], "--run", run["run_id"], "-o", "report.html"]
        ),
    }
    columns = ("run_id", "models", "done", "skipped", "failed", "not_met", "seconds")
    shown = [[_fact(r.get(c)) for c in columns] for r in reversed(data.runs[-RUNS_SHOWN:])]
    headings = {c.replace("_", " "): NAME if c == "run_id" else NUMBER for c in columns}
    digests = [[row["model"], row["digest"], str(row.get("config") or "")] for row in data.models]
    digest_columns = dict.fromkeys(("model", "digest", "configuration"), NAME)
    return element(
        "section",
        {"id": "inventory"},
        element("h2", {}, "Inventory"),
        facts(made_with),
        rows_table("Runs, latest first", headings, shown),
        element(
            "details",
            {},
            element("summary", {}, "Digests and configurations"),
            rows_table("Digests and configurations", digest_columns, digests),
        ),
    )


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return "" if value is None else str(value)


def _moment(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
