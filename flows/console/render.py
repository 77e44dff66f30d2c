"""Draws answers and errors for a person: an answer as tables, an error as a sentence."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows.console.choice import why_chosen
from flows.console.result import Result
from quant_core.errors import QuantError
from quant_core.metrics import find_metric
from quant_core.plan.targets import TARGETS, host_target_name
from quant_core.text import plain, printable

MINOR_SHARE = 0.01  # of the time of a model: kernels below it are shown together
PIPE_WIDTH = 200  # of text that goes to no terminal, so that long names are not wrapped
AUTO_MODE_NOTE = (
    "mode auto: this is where the search starts. "
    "It keeps of it what measures as faster and right on this host."
)
# A problem that begins with one of these says it of the place where it is: "--bits is 3, not ...".
PREDICATES = (
    *("alone", "cannot", "crashed", "ended", "failed", "gives", "has", "holds", "is", "lies"),
    *("matches", "means", "names", "needs", "promises", "returned", "was"),
)
VERDICT_STYLES = {
    "met": "green",
    "kept": "green",
    "regressed": "bold red",
    "stale": "yellow",
    "inconclusive": "yellow",
    "not_met": "yellow",
    "failed": "bold red",
    "skipped": "dim",
}


def print_answer(data: Any, view: Callable[[Any], RenderableType] | None) -> None:
    """Print `data` as `view` draws it; without a view, as JSON."""
    if view is not None:
        console().print(view(data))
    else:
        sys.stdout.write(json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def print_error(error: QuantError, as_json: bool) -> None:
    """Print problem, where and hint: to stderr for a person, or to stdout as a JSON line."""
    if as_json:
        parts = {
            "kind": type(error).__name__,
            "problem": error.problem,
            "where": error.where,
            "hint": error.hint,
        }
        # on one line: it may end a stream of events
        sys.stdout.write(json.dumps({"error": plain(parts)}) + "\n")
        return
    console(stderr=True).print(error_text(error.problem, error.where, error.hint), soft_wrap=True)


def print_result(
    result: Result, table: Callable[[Sequence[Mapping[str, Any]]], RenderableType], as_json: bool
) -> None:
    """Print how a batch or an audit ended: its table and counts, or one JSON line."""
    if as_json:
        sys.stdout.write(json.dumps({"event": "finished", **result.to_dict()}) + "\n")
        return
    console().print(table([row.to_json() for row in result.rows]))
    console().print(
        f"{result.message} in {result.seconds:.1f} s; reports in {result.reports}", markup=False
    )


@contextmanager
def progress_status(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, and since when, if stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as shown:
        task = shown.add_task("reading the model")
        yield lambda doing: shown.reset(task, description=printable(doing))


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; PIPE_WIDTH if there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


# Views: each draws the answer of one command.


def model_view(info: Mapping[str, Any]) -> RenderableType:
    """What `quantmill info` answers."""
    most_frequent_first = sorted(info["operators"].items(), key=lambda item: (-item[1], item[0]))
    operators = ", ".join(f"{count} {op_type}" for op_type, count in most_frequent_first)
    facts = {
        "model": info["name"],
        "size": format_size(info["size_bytes"]),
        "parameters": f"{info['parameters']:,}",
        "opset": info["opset"],
        "quantized": "yes" if info["quantized"] else "no",
        "nodes": f"{info['num_nodes']}: {operators}",
        "rewritten by": ", ".join(f"{n} {rule}" for rule, n in info["rewrites"].items()),
    }
    return Group(
        facts_table(facts),
        _values_table("inputs", info["inputs"]),
        _values_table("outputs", info["outputs"]),
    )


def plan_view(plan: Mapping[str, Any]) -> RenderableType:
    """Every node of a plan, and how often each way of computing and storing occurs."""
    rows = [{**node, "elements": _format_count(node["elements"])} for node in plan["nodes"]]
    columns = {
        "node": "node",
        "op_type": "op",
        "compute": "compute",
        "storage": "storage",
        "elements": "weights",
        "reason": "reason",
    }
    table = rows_table(rows, columns, title=f"plan for {plan['target']}", right=("weights",))
    compute = _count_words(node["compute"] for node in rows)
    storage = _count_words(node["storage"] for node in rows if node["storage"])
    parts: list[RenderableType] = [table, Text(f"compute: {compute}   storage: {storage}")]
    if rewrites := _count_words(change["rule"] for change in plan.get("rewrites", ())):
        parts.append(Text(f"rewritten before: {rewrites}"))
    if plan.get("config", {}).get("mode") == "auto":
        parts.append(Text(AUTO_MODE_NOTE, style="dim"))
    return Group(*parts)


def plans_view(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What a batch would do: the plan of each model, or its error."""
    parts: list[RenderableType] = []
    for row in rows:
        parts.append(Text(f"{printable(row['model'])} -> {printable(row['output'])}", style="bold"))
        if row["error"]:
            parts.append(error_text(row["error"], row["where"], row["hint"]))
        else:
            parts.append(plan_view(row["plan"]))
    return Group(*parts)


def optimization_view(result: Mapping[str, Any]) -> RenderableType:
    """What was rewritten in a float model, and what was taken back."""
    before, after = result["float_size_bytes"], result["size_bytes"]
    facts = {
        "written": result["output"],
        "size": f"{format_size(before)} -> {format_size(after)} ({format_ratio(before, after)})",
        "rewrites": _count_words(change["rule"] for change in result["rewrites"]) or "none",
    }
    for attempt in result["undone"]:
        facts[f"not {attempt['rule']}"] = attempt["reason"]
    return Group(facts_table(facts), _next_command(result["next"]))


def quantization_view(result: Mapping[str, Any]) -> RenderableType:
    """What was written; and if it was compared with the original, how right it is."""
    before, after = result["float_size_bytes"], result["size_bytes"]
    target = result["target"]
    if not result["saturation_safe"]:
        target += " (some sums may saturate on x86 without VNNI)"
    layers = result["layers"]
    facts = {
        "written": result["output"],
        "size": f"{format_size(before)} -> {format_size(after)} ({format_ratio(before, after)})",
        "target": target,
        "compute": _count_words(layer["compute"] for layer in layers),
        "storage": _count_words(layer["storage"] for layer in layers if layer["storage"]),
        "plan": _plan_text(result),
        "speed": _speed_text(result["timing"], result["target"]),
        "outputs": _floor_text(result),
        "note": result["note"],
    }
    if "export" in result:
        facts |= _export_facts(result["export"])
    if result["shortfall"] and "fidelity" not in result:
        facts["verdict"] = verdict_text(result["verdict"], result["reason"])
    compared = [validation_view(result)] if "fidelity" in result else []
    front = [_front_table(result)] if result.get("shows_front") else []
    return Group(facts_table(facts), *front, *compared, _next_command(result["next"]))


def _front_table(result: Mapping[str, Any]) -> RenderableType:
    """The plans that no other beats in speed, SQNR and size, and which was chosen, and why."""
    chosen = [t for t in result["trace"] if t["candidate"] == result["chosen"]]
    shown = [*result["front"], *(t for t in chosen[-1:] if t not in result["front"])]
    rows = [
        {
            "plan": trial["candidate"],
            "speed": _format_speedup(trial["speedup"]) if trial["speedup"] else "",
            "sqnr": format_db(trial["sqnr_db"]),
            "agreement": format_percent(trial["agreement"]),
            "size": format_size(trial["size_bytes"]),
            "chosen": "yes" if trial["candidate"] == result["chosen"] else "",
        }
        for trial in shown
    ]
    columns = {key: key for key in ("plan", "speed", "sqnr", "agreement", "size", "chosen")}
    title = f"chosen: {printable(_plan_text(result))}"
    return rows_table(rows, columns, title, right=("speed", "sqnr", "agreement", "size"))


def _plan_text(result: Mapping[str, Any]) -> str:
    """The plan that was written, and why that one."""
    why = why_chosen(result["trace"], result["chosen"], result["verdict"])
    return f"{result['chosen']}: {why}" if why else ""


def _export_facts(export: Mapping[str, Any]) -> dict[str, str]:
    """What was written for OpenVINO, and what is wrong with it."""
    kernels = f"{export['integers']} of {export['multiplying']} kernels that multiply in int8"
    speed = _format_speedup(export["timing"]["speedup"])
    return {
        "export": f"{export['output']}, {format_size(export['size_bytes'])}",
        "in OpenVINO": f"{speed} of float's speed, {kernels}",
        "export note": export["note"],
    }


def _speed_text(timing: Mapping[str, Any] | None, target: str) -> str:
    """How fast a model is beside float, from the timing of both in turn."""
    if timing is None and host_target_name() not in TARGETS[target].timed_on:
        return f"not timed: {target} does not run on this host"
    if timing is None:
        return "not timed: the model does not run on random samples; give --data"
    latency = _before_after(timing["float_ms"], timing["float_ms"] / timing["speedup"], format_ms)
    return f"{latency} ({_format_speedup(timing['speedup'])}){_busy_mark(timing)}"


def _next_command(command: str) -> Text:
    """The command that is of use next."""
    return Text(f"next: {printable(command)}", style="dim")


def _floor_text(result: Mapping[str, Any]) -> str:
    """The SQNR of the worst output beside the least that it was held to."""
    worst, least = result["worst_db"], f"at least {result['floor_db']:g} dB wanted"
    return f"not checked ({least})" if worst is None else f"{worst:.1f} dB or better ({least})"


def validation_view(result: Mapping[str, Any]) -> RenderableType:
    """How right a quantized model is, and whether its contract is met."""
    fidelity = result["fidelity"]
    facts = {
        "samples": fidelity["samples"],
        "top-1": _before_after(fidelity["top1_float"], fidelity["top1"], format_percent),
        "metric": _before_after(fidelity["metric_float"], fidelity["metric"], format_number),
        "agreement": format_percent(fidelity["agreement"]),
        "note": fidelity["note"],
    }
    if result["verdict"] != "none":
        facts["verdict"] = verdict_text(result["verdict"], result["reason"])
    if fidelity["flips_bad"] is not None:
        to_wrong = f"{fidelity['flips_bad']} right -> wrong"
        to_right = f"{fidelity['flips_good']} wrong -> right"
        facts["flips"] = f"{to_wrong}, {to_right}"
    rows = [
        {
            "output": output["name"],
            "agreement": format_percent(output["agreement"]),
            "cosine": format_number(output["cosine"], 6),
            "SQNR dB": format_number(output["sqnr_db"], 1),
            "max error": format_number(output["max_abs_error"], 6),
            "flaw": output["flaw"],
        }
        for output in fidelity["per_output"]
    ]
    headings = ("output", "agreement", "cosine", "SQNR dB", "max error", "flaw")
    return Group(
        facts_table(facts),
        rows_table(rows, {heading: heading for heading in headings}, right=headings[1:5]),
        *_saturation_tables(result.get("saturation")),
        *_sensitivity_tables(result.get("damage")),
    )


_BOTH = ("float", "quantized")


def timing_view(result: Mapping[str, Any]) -> RenderableType:
    """The latency of both models for each number of threads and samples in a feed, the speed-up
    with its quartiles, and what each takes to load.
    """
    rows = []
    for timing in result["timings"]:
        quartiles = (
            f"{format_number(timing['speedup_lo'])} to {format_number(timing['speedup_hi'])}"
        )
        quantized_ms = timing["float_ms"] / timing["speedup"]
        rows.append(
            {
                "threads": timing["threads"],
                "batch": timing["batch"],
                "median": _before_after(timing["float_ms"], quantized_ms, format_ms),
                "p95": _before_after(timing["float_p95_ms"], timing["quantized_p95_ms"], format_ms),
                "samples/s": _before_after(
                    1e3 * timing["batch"] / timing["float_ms"],
                    1e3 * timing["batch"] / quantized_ms,
                    _format_rate,
                ),
                "speed": _format_speedup(timing["speedup"]) + _busy_mark(timing),
                "quartiles": quartiles,
                "rounds": timing["rounds"],
            }
        )
    columns = {heading: heading for heading in rows[0]}
    if result["footprints"] is None:  # JavaScript ran them
        timing = result["timings"][0]
        equal = (f"{format_number(timing[f'{name}_equal_db'], 0)} dB" for name in _BOTH)
        facts = {"outputs against Python's": " and ".join(equal)}
    else:
        before, after = (result["footprints"][name] for name in _BOTH)
        facts = {
            "load time": _before_after(before["load_ms"], after["load_ms"], format_ms),
            "memory": _before_after(before["memory_bytes"], after["memory_bytes"], format_size),
        }
    parts: list[RenderableType] = [rows_table(rows, columns, right=tuple(columns))]
    parts.append(facts_table(facts))
    if any(timing["busy"] for timing in result["timings"]):
        share = format_percent(max(timing["host_load"] for timing in result["timings"]))
        warning = (
            f"warning: others took {share} of this host meanwhile; time it again when it is quiet"
        )
        parts.append(Text(warning, style="yellow"))
    return Group(*parts)


COMPARED = ("file", "size", "", "accuracy", "agreement", "SQNR dB", "latency", "speed", "load",
            "memory", "verdict")  # fmt: skip
COMPARED_LEGEND = (
    "agreement: share of the decisions that equal the original's. SQNR: of each output. speed: "
    "over the original's, both in turn. load, memory: of loading it in a new process."
)


def comparison_view(result: Mapping[str, Any]) -> RenderableType:
    """Several files of one model side by side, the original first."""
    columns = {heading: heading for heading in COMPARED}
    table = rows_table(compared_rows(result), columns, right=COMPARED[1:-1])
    return Group(table, Text(COMPARED_LEGEND, style="dim"))


def compared_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Heading of COMPARED -> text, for the original and each file of a comparison."""
    original, first = result["original"], result["files"][0]
    found = first["fidelity"]
    value = _first_given(found["metric_float"], found["top1_float"])
    rows = [_compared_row(original, value, first["timing"]["float_ms"])]
    for file in result["files"]:
        fidelity, timing = file["fidelity"], file["timing"]
        value = _first_given(fidelity["metric"], fidelity["top1"])
        outputs = (format_number(output["sqnr_db"], 1) for output in fidelity["per_output"])
        rows.append(
            _compared_row(file, value, timing["float_ms"] / timing["speedup"])
            | {
                "": format_ratio(original["size_bytes"], file["size_bytes"]),
                "agreement": format_percent(fidelity["agreement"]),
                "SQNR dB": ", ".join(output or "-" for output in outputs),
                "speed": _format_speedup(timing["speedup"]),
                "verdict": "" if file["verdict"] == "none" else file["verdict"].replace("_", " "),
            }
        )
    return [{heading: row.get(heading, "") for heading in COMPARED} for row in rows]


def _compared_row(file: Mapping[str, Any], value: float | None, ms: float) -> dict[str, str]:
    """The columns that the original has as well."""
    return {
        "file": file["file"],
        "size": format_size(file["size_bytes"]),
        "accuracy": format_number(value, 4),
        "latency": format_ms(ms),
        "load": format_ms(file["load_ms"]),
        "memory": format_size(file["memory_bytes"]),
    }


def _first_given(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def explanation_view(result: Mapping[str, Any]) -> RenderableType:
    """The kernels that take most of the time first, and what the time goes to in all.

    Those of which there is little to say are one row.
    """
    kernels = sorted(result["kernels"], key=lambda kernel: -kernel["ms"])
    minor = [kernel for kernel in kernels if _is_minor(kernel)]
    rows = [
        {
            "kernel": kernel["name"],
            "operator": kernel["op_type"],
            "computes in": kernel["arithmetic"],
            "time": format_ms(kernel["ms"]),
            "share": format_percent(kernel["share"]),
            "why in float": kernel["why"],
            "saturates without VNNI": kernel["saturating_pairs"] or "",
            "quantmill would": kernel["advice"],
        }
        for kernel in kernels
        if len(minor) == 1 or kernel not in minor
    ]
    if len(minor) > 1:
        rows.append(
            {
                "kernel": f"{len(minor)} others",
                "operator": f"below {MINOR_SHARE:.0%} each",
                "time": format_ms(sum(kernel["ms"] for kernel in minor)),
                "share": format_percent(sum(kernel["share"] for kernel in minor)),
            }
        )
    headings = ("kernel", "operator", "computes in", "time", "share", "why in float",
                "saturates without VNNI", "quantmill would")  # fmt: skip
    columns = {heading: heading for heading in headings}
    return Group(rows_table(rows, columns, right=("time", "share")), Text(explanation_line(result)))


def _is_minor(kernel: Mapping[str, Any]) -> bool:
    """Whether a kernel takes hardly any time, and there is nothing to say about it."""
    has_remark = kernel["why"] or kernel["saturating_pairs"] or kernel["advice"]
    return kernel["share"] < MINOR_SHARE and not has_remark


def explanation_line(result: Mapping[str, Any]) -> str:
    """What the time goes to, in a line."""
    shares = [f"{format_percent(share)} {name}" for name, share in result["shares"].items()]
    return f"{format_ms(result['ms'])} in {len(result['kernels'])} kernels: {', '.join(shares)}"


def batch_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each row of the models table."""
    headings = ("model", "size", "ratio", "accuracy", "metric", "latency", "speed", "verdict")
    right = ("size", "ratio", "accuracy", "latency", "speed")
    return rows_table(batch_lines(rows), {heading: heading for heading in headings}, right=right)


def batch_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Size, accuracy and latency of each model before and after, and its verdict.

    The latency after is float's latency divided by the speed-up. The two models were timed in turns
    for the speed-up, while their medians, which the reports have, may be of unequal conditions: the
    clock rate may have changed, or a neighbour woken up.
    """
    lines: list[dict[str, object]] = []
    for name, row in zip(unique_names(rows), rows, strict=True):
        float_ms, speedup = row.get("float_ms"), row.get("speedup")
        sizes = row.get("float_size_bytes"), row.get("size_bytes")
        lines.append(
            {
                "model": name,
                "size": _before_after(*sizes, format_size),
                "ratio": format_ratio(*sizes),
                "accuracy": _accuracy(row, "accuracy_float"),
                "metric": row.get("metric") or "",
                "latency": _before_after(float_ms, row["float_ms"] / speedup, format_ms)
                if speedup
                else "",
                "speed": _format_speedup(speedup) + _busy_mark(row),
                "verdict": _outcome_text(row),
            }
        )
    return lines


def audit_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each row of the audits table."""
    columns = {heading: heading for heading in ("model", "accuracy", "metric", "speed", "verdict")}
    return rows_table(audit_lines(rows), columns, right=("accuracy", "speed"))


def audit_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Accuracy and speed-up of each model then and now, and its verdict."""
    lines: list[dict[str, object]] = []
    for row in rows:
        speed = _before_after(row.get("speedup_before"), row.get("speedup"), _format_speedup)
        lines.append(
            {
                "model": row["model"],
                "accuracy": _accuracy(row, "accuracy_before"),
                "metric": row.get("metric") or "",
                "speed": speed + _busy_mark(row),
                "verdict": verdict_text(row["outcome"], row.get("reason") or row.get("error")),
            }
        )
    return lines


def reports_view(reports: Mapping[str, Any]) -> RenderableType:
    """Every run in a line, and the models of the run that was named."""
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
    headings = {column: column.replace("_", " ") for column in columns}
    runs = [{**run, "seconds": format_number(run["seconds"], 1)} for run in reports["runs"]]
    mend = "cannot be read and is left out; `quantmill report --rebuild DIR` mends it"
    table = rows_table(runs, headings, right=columns[1:7])
    lines = [Text(f"{printable(path)} {mend}", "yellow") for path in reports["unreadable"]]
    if "rebuilt" in reports:
        lines.append(Text(f"files written again from the journal: {len(reports['rebuilt'])}"))
        if spoiled := reports["skipped_lines"]:
            passed_over = f"spoiled lines of the journal that are passed over: {spoiled}"
            lines.append(Text(passed_over, "yellow"))
    return Group(table, batch_table(reports["models"]), *lines)


def draft_view(answer: Mapping[str, Any]) -> RenderableType:
    """What `quantmill init` found, and where it wrote the manifest."""
    rows = [
        {**model, "does not fit": ", ".join(f"{path} ({why})" for path, why in model["rejected"])}
        for model in answer["models"]
    ]
    headings = ("input", "summary", "calibration", "evaluation", "labels", "does not fit")
    table = rows_table(rows, {heading: heading for heading in headings})
    written = Text(f"written: {printable(answer['manifest'])}")
    return Group(table, written, _next_command(answer["next"]))


def host_view(report: Mapping[str, Any]) -> RenderableType:
    """What `quantmill doctor` answers: the host, the versions, and known problems with them."""
    problems = [Text(f"problem: {printable(p)}", style="bold red") for p in report["problems"]]
    if not problems:
        problems = [Text("no known problem", style="green")]
    return Group(facts_table(report["host"]), facts_table(report["versions"]), *problems)


# The parts that views are made of.


def facts_table(facts: Mapping[str, object]) -> Table:
    """Two columns, key and value; a fact that is None or empty is left out."""
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
    """A table with the cells `columns` of each row. A column without any value is left out.

    columns  the row's key -> the heading
    right    headings of columns that are aligned to the right
    """
    cells = [{key: _cell(row.get(key)) for key in columns} for row in rows]
    filled = [key for key in columns if any(cell[key].plain for cell in cells)]
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for key in filled:
        justify: Literal["left", "right"] = "right" if columns[key] in right else "left"
        table.add_column(columns[key], justify=justify, overflow="fold")
    for cell in cells:
        table.add_row(*(cell[key] for key in filled))
    return table


def error_text(problem: str, where: str, hint: str) -> Text:
    """A sentence, one more line for each further mistake of a manifest, and the hint."""
    lines = Text()
    for label, text in (("error", error_sentence(problem, where)), ("hint", hint)):
        if text:
            lines.append(f"{label}: ", style="bold red" if label == "error" else "bold")
            lines.append("\n".join(map(printable, text.splitlines())) + "\n")
    lines.rstrip()
    return lines


def error_sentence(problem: str, where: str | None) -> str:
    """What is wrong and where, as one sentence."""
    if not where:
        return problem
    says_it_of_the_place = problem.split(" ", 1)[0] in PREDICATES
    return f"{where} {problem}" if says_it_of_the_place else f"{where}: {problem}"


def unique_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each model; where one input becomes several outputs, with its output's name."""
    counts = Counter(row["model"] for row in rows)
    return [
        row["model"]
        if counts[row["model"]] == 1
        else f"{row['model']} ({Path(row['output']).stem})"
        for row in rows
    ]


def verdict_text(word: str, reason: str | None = None) -> Text:
    """A verdict or an outcome in its colour, and why."""
    text = Text(word.replace("_", " "), style=VERDICT_STYLES.get(word, ""))
    return text.append(f": {printable(reason)}", style="default") if reason else text


def format_size(count: float | None) -> str:
    """Bytes in kB or MB, which are powers of ten here."""
    if count is None:
        return ""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def format_ratio(before: float | None, after: float | None) -> str:
    """How many times smaller or larger, for example `3.97x smaller`."""
    if not before or not after:
        return ""
    if after <= before:
        return f"{before / after:.2f}x smaller"
    return f"{after / before:.2f}x larger"


def format_percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def format_ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def format_number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def format_db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def format_metric(name: str | None, value: float | None) -> str:
    """A value of the metric of that name."""
    return "" if value is None else find_metric(name or "").form(value)


def _cell(value: object) -> Text:
    return value if isinstance(value, Text) else Text("" if value is None else printable(value))


def _outcome_text(row: Mapping[str, Any]) -> Text:
    """What became of a model and why, and what makes that doubtful."""
    if row["outcome"] == "failed":
        return verdict_text(
            "failed", f"{row['stage']}: {error_sentence(row['error'], row['where'])}"
        )
    word = row["outcome"] if row["verdict"] == "none" else row["verdict"]
    reason = row.get("reason") if word == "not_met" else None
    return verdict_text(word, "; ".join(filter(None, [reason, row.get("note")])))


def _accuracy(row: Mapping[str, Any], before: str) -> str:
    """The metric before and after, where `before` names the column of the value before."""
    form = partial(format_metric, row.get("metric"))
    return _before_after(row.get(before), row.get("accuracy"), form)


def _format_count(count: int | None) -> str:
    return f"{count:,}" if count else ""


def _format_speedup(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


def _format_rate(per_second: float | None) -> str:
    if per_second is None:
        return ""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"


def _busy_mark(row: Mapping[str, Any]) -> str:
    return " (busy host)" if row.get("busy") else ""


def _values_table(heading: str, values: Sequence[Mapping[str, Any]]) -> Table:
    """A model's inputs or outputs, with type and shape."""
    rows = [{**v, "shape": " x ".join(map(str, v["shape"])) or "-"} for v in values]
    return rows_table(rows, {"name": heading, "dtype": "type", "shape": "shape"})


def _sensitivity_tables(nodes: Sequence[Mapping[str, Any]] | None) -> list[RenderableType]:
    """The SQNR of each node in the order of the graph: quantized alone, and with all before it."""
    if not nodes:
        return []
    rows = [
        {
            **node,
            "alone": format_db(node["isolated_db"]),
            "so far": format_db(node["cumulative_db"]),
        }
        for node in nodes
    ]
    columns = {"node": "node", "op_type": "op", "alone": "SQNR alone", "so far": "SQNR so far"}
    return [rows_table(rows, columns, right=("SQNR alone", "SQNR so far"))]


def _saturation_tables(rows: Sequence[Mapping[str, Any]] | None) -> list[RenderableType]:
    """The nodes whose results differ on x86 without VNNI."""
    if not rows:
        return []
    columns = {"node": "saturates without VNNI", "op_type": "op", "pairs": "pairs of weights"}
    return [rows_table(rows, columns, right=("pairs of weights",))]


def _before_after(
    before: float | None, after: float | None, form: Callable[[float | None], str]
) -> str:
    if before is None or after is None:
        return form(after)
    return f"{form(before)} -> {form(after)}"


def _count_words(words: Iterable[str]) -> str:
    """How often each word occurs: `12 static, 3 float`."""
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())
