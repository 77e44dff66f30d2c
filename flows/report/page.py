"""One self-contained HTML page of a run: the verdict, every model in a table, and its details.

It opens from the disk, asks no host for anything, and reads without JavaScript. Details beyond
PLAIN_BYTES are packed: the page's script unpacks those of a model when they are opened.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from statistics import median
from typing import Any

from flows.console.formats import format_size
from flows.console.run_views import unique_names
from flows.reading import PageData, read_page
from flows.report.details import NAME, NUMBER, details, facts, rows_table
from flows.report.document import document, read_asset
from flows.report.elements import Child, Element, element, pack
from flows.report.models_table import models_table
from flows.report.reported_model import ReportedModel, badge, link
from quant_core.model.atomic import write_named
from quant_core.text import joined

PLAIN_BYTES = 1_000_000  # of details that stand in the page as HTML, the wrong models' first
RUNS_SHOWN = 30


def write_report(folder: Path, path: Path, run_id: str | None = None) -> Path:
    """Write the page of the latest run of an output folder, or of the run of that id, to `path`.

    The file appears as a whole, or stays as it was. Names are as in `read_page`.

    Raises: RequestError if there is no report, or no such run, or if it cannot be written.
    """
    page = render_page(read_page(folder, run_id))
    write_named(path, page.encode("utf-8"))
    return path


def render_page(data: PageData) -> str:
    """The page as text."""
    names = unique_names(data.models)
    models = [ReportedModel(name, row, data) for name, row in zip(names, data.models, strict=True)]
    parts = [
        _header(data, models),
        _wrong(models),
        models_table(models),
        _sections(models),
        _inventory(data),
    ]
    body = [part for part in parts if part is not None]
    return document(f"quantmill: {_verdict(models)}", body, read_asset("page.js"))


def _verdict(models: list[ReportedModel]) -> str:
    """The whole run in one line."""
    failed = sum(model.state == "failed" for model in models)
    not_met = sum(model.state == "not_met" for model in models)
    worse = sum(bool(model.regressions) for model in models)
    phrases = [f"{len(models) - failed} of {len(models)} models made"]
    if failed:
        phrases.append(f"{failed} failed")
    if not_met:
        phrases.append(
            "1 misses its contract" if not_met == 1 else f"{not_met} miss their contract"
        )
    if worse:
        phrases.append(f"{worse} got worse since the run before")
    if len(phrases) == 1 and any(model.state == "met" for model in models):
        phrases.append("every contract is met")
    return ", ".join(phrases)


def _header(data: PageData, models: list[ReportedModel]) -> Element:
    wrong = any(model.is_wrong or model.regressions for model in models)
    sized = [m.row for m in models if m.row.get("float_size_bytes") and m.row.get("size_bytes")]
    before, after = (sum(row[key] for row in sized) for key in ("float_size_bytes", "size_bytes"))
    speedups = [m.row["speedup"] for m in models if m.row.get("speedup")]
    won = []
    if after:
        won += [f"{format_size(before)} → {format_size(after)}", f"{before / after:.2f}x smaller"]
    if speedups:
        won.append(f"median speed-up {median(speedups):.2f}x")
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


def _wrong(models: list[ReportedModel]) -> Element | None:
    """The models that failed, miss their contract or got worse, each with its reason."""
    items = []
    for model in models:
        reasons = ([model.why] if model.is_wrong else []) + model.regressions
        if reasons:
            text: list[Child] = [badge(model), " ", link(model), f": {_ended(joined(reasons))}"]
            hint = model.row.get("hint") if model.state == "failed" else None
            end = element("span", {"class": "muted"}, f" {_ended(hint)}") if hint else None
            items.append(element("li", {}, *text, end))
    if not items:
        return None
    heading = element("h2", {}, "What needs attention")
    return element("section", {"class": "wrong"}, heading, element("ul", {}, *items))


def _ended(text: str) -> str:
    """The text with a full stop, unless it ends a sentence by itself."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _sections(models: list[ReportedModel]) -> Element:
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


def _section(model: ReportedModel, inside: tuple[Child, ...], is_plain: bool) -> Element:
    # A link to an element inside of a closed section opens it, with no script.
    anchor = element("div", {"id": model.anchor, "class": "anchor"})
    title = element("summary", {}, model.name, " ", badge(model))
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
