"""What a person sees: every answer as a rich table, every error as three short lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.console.result import Result
from quant_core.errors import QuantError
from quant_core.metrics import find_metric
from quant_core.text import plain, printable

PIPE_WIDTH = 200  # a file has no width; wrapped names cannot be searched for
VERDICT_STYLES = {
    "met": "green",
    "kept": "green",
    "regressed": "bold red",
    "stale": "yellow",
    "not_met": "yellow",
    "failed": "bold red",
    "skipped": "dim",
}


def answer(data: Any, view: Callable[[Any], RenderableType] | None) -> None:
    """Print `data` as `view` draws it, or as JSON without one."""
    if view is not None:
        console().print(view(data))
    else:
        sys.stdout.write(json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def explain(error: QuantError, as_json: bool) -> None:
    """Problem, where and hint: for a person on stderr, for a program as a JSON object on stdout."""
    if as_json:
        parts = {
            "kind": type(error).__name__,
            "problem": error.problem,
            "where": error.where,
            "hint": error.hint,
        }
        answer({"error": parts}, None)
        return
    console(stderr=True).print(problem(error.problem, error.where, error.hint), soft_wrap=True)


def finished(
    result: Result, table: Callable[[Sequence[Mapping[str, Any]]], RenderableType], as_json: bool
) -> None:
    """How a batch or an audit ended: its table and counts, or one JSON line."""
    if as_json:
        sys.stdout.write(json.dumps({"event": "finished", **result.to_dict()}) + "\n")
        return
    console().print(table([row.to_json() for row in result.rows]))
    console().print(
        f"{result.message} in {result.seconds:.1f} s; reports in {result.reports}", markup=False
    )


@contextmanager
def working(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Tells on stderr what is being done, where someone may be watching."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with console(stderr=True).status("reading the model") as status:
        yield lambda doing: status.update(Text(printable(doing)))


def console(stderr: bool = False) -> Console:
    """A console that is as wide as the terminal, and never narrow where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def model_info(info: Mapping[str, Any]) -> RenderableType:
    counts = sorted(info["operators"].items(), key=lambda item: (-item[1], item[0]))
    facts = {
        "model": info["name"],
        "size": size(info["size_bytes"]),
        "parameters": f"{info['parameters']:,}",
        "opset": info["opset"],
        "quantized": "yes" if info["quantized"] else "no",
        "nodes": f"{info['num_nodes']}: " + ", ".join(f"{count} {op}" for op, count in counts),
    }
    return Group(pairs(facts), *(_values(kind, info[kind]) for kind in ("inputs", "outputs")))


def plan(values: Mapping[str, Any]) -> RenderableType:
    rows = [
        {**n, "elements": f"{n['elements']:,}" if n["elements"] else ""} for n in values["nodes"]
    ]
    columns = {
        "node": "node",
        "op_type": "op",
        "compute": "compute",
        "storage": "storage",
        "elements": "weights",
        "reason": "reason",
    }
    table = rows_table(rows, columns, title=f"plan for {values['target']}", right=("weights",))
    counts = (
        _counts(n["compute"] for n in rows),
        _counts(n["storage"] for n in rows if n["storage"]),
    )
    total = Text(f"compute: {counts[0]}   storage: {counts[1]}")
    return Group(
        table, total, *([WIDEST] if values.get("config", {}).get("mode") == "auto" else [])
    )


WIDEST = Text(
    "mode auto: this is where the search starts. It keeps of it what measures as faster and right on this host.",
    style="dim",
)


def plans(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What a batch would do: a plan a model, or what is wrong with it."""
    parts: list[RenderableType] = []
    for row in rows:
        parts.append(Text(f"{printable(row['model'])} -> {printable(row['output'])}", style="bold"))
        parts.append(
            problem(row["error"], row["where"], row["hint"]) if row["error"] else plan(row["plan"])
        )
    return Group(*parts)


def quantized(result: Mapping[str, Any]) -> RenderableType:
    before, after = result["float_size_bytes"], result["size_bytes"]
    facts = {
        "written": result["output"],
        "size": f"{size(before)} -> {size(after)} ({ratio(before, after)})",
        "target": result["target"]
        + ("" if result["saturation_safe"] else " (some sums may saturate on x86 without VNNI)"),
        "compute": _counts(layer["compute"] for layer in result["layers"]),
        "storage": _counts(layer["storage"] for layer in result["layers"] if layer["storage"]),
        "note": result["note"],
    }
    if "fidelity" in result:
        return Group(pairs(facts), validation(result))
    return pairs(facts)


def validation(result: Mapping[str, Any]) -> RenderableType:
    """How right a quantized model is, and whether that was promised."""
    fidelity = result["fidelity"]
    facts = {
        "samples": fidelity["samples"],
        "top-1": _change(fidelity["top1_float"], fidelity["top1"], percent),
        "metric": _change(fidelity["metric_float"], fidelity["metric"], number),
        "agreement": percent(fidelity["agreement"]),
        "note": fidelity["note"],
        "verdict": ""
        if result["verdict"] == "none"
        else verdict(result["verdict"], result["reason"]),
    }
    if fidelity["flips_bad"] is not None:
        facts["flips"] = (
            f"{fidelity['flips_bad']} right -> wrong, {fidelity['flips_good']} wrong -> right"
        )
    outputs = [
        {
            "output": o["name"],
            "agreement": percent(o["agreement"]),
            "cosine": number(o["cosine"], 6),
            "SQNR dB": number(o["sqnr_db"], 1),
            "max error": number(o["max_abs_error"], 6),
            "flaw": o["flaw"],
        }
        for o in fidelity["per_output"]
    ]
    headings = ("output", "agreement", "cosine", "SQNR dB", "max error", "flaw")
    table = rows_table(outputs, {h: h for h in headings}, right=headings[1:5])
    return Group(
        pairs(facts), table, *_saturation(result.get("saturation")), *_damage(result.get("damage"))
    )


def timing(result: Mapping[str, Any]) -> RenderableType:
    rows = [
        {"model": name, "median": ms(result[f"{name}_ms"]), "p95": ms(result[f"{name}_p95_ms"])}
        for name in ("float", "quantized")
    ]
    columns = {"model": "model", "median": "median", "p95": "p95"}
    spread = f"{number(result['speedup_lo'])} to {number(result['speedup_hi'])}"
    times = f"{number(result['speedup'])} times as fast as float ({spread})"
    effort = f"{result['rounds']} rounds, threads: {result['threads']}"
    return Group(rows_table(rows, columns, right=("median", "p95")), Text(f"{times}; {effort}"))


def batch_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a model, of the models table: size, accuracy and latency before and after, and the verdict.

    The latency after is float's over the speed-up, which both models were timed in turns for: two medians taken by
    themselves would contradict it where a clock steps or a neighbour wakes up. The reports have them.
    """
    lines = [
        {
            "model": row["model"],
            "size": _change(row.get("float_size_bytes"), row.get("size_bytes"), size),
            "": ratio(row.get("float_size_bytes"), row.get("size_bytes")),
            "accuracy": _change(
                row.get("accuracy_float"),
                row.get("accuracy"),
                in_metric(row.get("metric")),
            ),
            "of": row.get("metric") or "",
            "latency": _change(row.get("float_ms"), row["float_ms"] / row["speedup"], ms)
            if row.get("speedup")
            else "",
            "speed": _times(row.get("speedup")) + _BUSY[bool(row.get("busy"))],
            "verdict": _outcome(row),
        }
        for row in rows
    ]
    headings = ("model", "size", "", "accuracy", "of", "latency", "speed", "verdict")
    return rows_table(
        lines, {h: h for h in headings}, right=("size", "", "accuracy", "latency", "speed")
    )


def audit_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a model, of the audits table: accuracy and speed-up then and now, and whether it stands."""
    lines = [
        {
            "model": row["model"],
            "accuracy": _change(
                row.get("accuracy_before"),
                row.get("accuracy"),
                in_metric(row.get("metric")),
            ),
            "of": row.get("metric") or "",
            "speed": _change(row.get("speedup_before"), row.get("speedup"), _times)
            + _BUSY[bool(row.get("busy"))],
            "verdict": verdict(row["outcome"], row.get("reason") or row.get("error")),
        }
        for row in rows
    ]
    headings = ("model", "accuracy", "of", "speed", "verdict")
    return rows_table(lines, {h: h for h in headings}, right=("accuracy", "speed"))


def reports(found: Mapping[str, Any]) -> RenderableType:
    """Every run in a line, and the models of the one that was asked for."""
    columns = (
        "run_id",
        "models",
        "done",
        "skipped",
        "failed",
        "not_met",
        "seconds",
        "host",
        "target",
    )
    runs = [{**run, "seconds": number(run["seconds"], 1)} for run in found["runs"]]
    headings = {column: column.replace("_", " ") for column in columns}
    return Group(rows_table(runs, headings, right=columns[1:7]), batch_table(found["models"]))


def health(report: Mapping[str, Any]) -> RenderableType:
    """doctor's findings: the host, the versions, and what is known not to work together."""
    problems = [Text(f"problem: {printable(p)}", style="bold red") for p in report["problems"]]
    return Group(
        pairs(report["host"]),
        pairs(report["versions"]),
        *(problems or [Text("no known problem", style="green")]),
    )


# Pieces


def pairs(facts: Mapping[str, object]) -> Table:
    """Two columns; what is absent is left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value not in (None, ""):
            table.add_row(_cell(key), _cell(value))
    return table


def rows_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
    title: str | None = None,
    right: Sequence[str] = (),
) -> Table:
    """These keys of each row, under these headings; a column in which nothing stands is left out."""
    cells = [{key: _cell(row.get(key)) for key in columns} for row in rows]
    filled = [key for key in columns if any(row[key].plain for row in cells)]
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for key in filled:
        table.add_column(
            columns[key], justify="right" if columns[key] in right else "left", overflow="fold"
        )
    for row in cells:
        table.add_row(*(row[key] for key in filled))
    return table


def problem(what: str, where: str, hint: str) -> Text:
    """Up to three lines; the mistakes of a manifest stand on a line each."""
    lines = Text()
    for label, text in (("error", what), ("where", where), ("hint", hint)):
        if text:
            lines.append(f"{label:>5}: ", style="bold red" if label == "error" else "bold")
            lines.append("\n".join(map(printable, text.splitlines())) + "\n")
    lines.rstrip()
    return lines


def verdict(word: str, reason: str | None = None) -> Text:
    told = Text(word.replace("_", " "), style=VERDICT_STYLES.get(word, ""))
    return told.append(f": {printable(reason)}", style="default") if reason else told


def size(count: float | None) -> str:
    """Bytes as kB or MB, powers of ten."""
    if count is None:
        return ""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def ratio(before: float | None, after: float | None) -> str:
    """How much smaller, as 3.97x; what grew says so."""
    if not before or not after:
        return ""
    return f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def in_metric(name: str | None) -> Callable[[float | None], str]:
    """How values of this metric are shown; nothing where there is no value."""
    form = find_metric(name or "").form
    return lambda value: "" if value is None else form(value)


def _cell(value: object) -> Text:
    return value if isinstance(value, Text) else Text("" if value is None else printable(value))


def _outcome(row: Mapping[str, Any]) -> Text:
    """What became of a model, in a word, and why; and what makes that doubtful."""
    if row["outcome"] == "failed":
        return verdict("failed", f"{row['stage']}: {row['error']}")
    word = row["outcome"] if row["verdict"] == "none" else row["verdict"]
    told = [row.get("reason") if word == "not_met" else None, row.get("note")]
    return verdict(word, "; ".join(filter(None, told)))


_BUSY = ("", " (busy host)")


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


def _values(kind: str, values: Sequence[Mapping[str, Any]]) -> Table:
    rows = [{**v, "shape": " x ".join(map(str, v["shape"])) or "-"} for v in values]
    return rows_table(rows, {"name": kind, "dtype": "type", "shape": "shape"})


def _damage(found: Sequence[Mapping[str, Any]] | None) -> list[RenderableType]:
    """What each node costs, in the order of the graph."""
    if not found:
        return []
    rows = [
        {**row, "alone": decibel(row["isolated_db"]), "so far": decibel(row["cumulative_db"])}
        for row in found
    ]
    columns = {"node": "node", "op_type": "op", "alone": "SQNR alone", "so far": "SQNR so far"}
    return [rows_table(rows, columns, right=("SQNR alone", "SQNR so far"))]


def _saturation(rows: Sequence[Mapping[str, Any]] | None) -> list[RenderableType]:
    """Nodes that give other results on x86 without VNNI."""
    if not rows:
        return []
    columns = {"node": "saturates without VNNI", "op_type": "op", "pairs": "pairs of weights"}
    return [rows_table(rows, columns, right=("pairs of weights",))]


def _change(before: float | None, after: float | None, form: Callable[[float | None], str]) -> str:
    if before is None or after is None:
        return form(after)
    return f"{form(before)} -> {form(after)}"


def _counts(words: Iterable[str]) -> str:
    """How often each word: `12 static, 3 float`."""
    seen: dict[str, int] = {}
    for word in words:
        seen[word] = seen.get(word, 0) + 1
    return ", ".join(
        f"{count} {word}" for word, count in sorted(seen.items(), key=lambda item: -item[1])
    )
