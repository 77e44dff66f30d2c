"""Views of what is found or planned: a model, a plan, a manifest's draft, this host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from flows.console.formats import count_words, format_count, format_size
from flows.console.tables import error_text, facts_table, rows_table
from quant_core.text import printable

AUTO_MODE_NOTE = (
    "mode auto: the search starts from this plan, and keeps what is faster and right on this host."
)


def model_view(info: Mapping[str, Any]) -> RenderableType:
    """What `quantmill info` answers."""
    operators = ", ".join(f"{count} {op_type}" for op_type, count in info["operators"].items())
    facts = {
        "model": info["name"],
        "size": format_size(info["size_bytes"]),
        "parameters": f"{info['parameters']:,}",
        "opset": info["opset"],
        "quantized": _how_quantized(info),
        "stored": ", ".join(f"{format_size(n)} {kind}" for kind, n in info["stored_bytes"].items()),
        "nodes": f"{info['num_nodes']}: {operators}",
        "rewritten by": ", ".join(f"{n} {rule}" for rule, n in info["rewrites"].items()),
    }
    return Group(
        facts_table(facts),
        _values_table("inputs", info["inputs"]),
        _values_table("outputs", info["outputs"]),
    )


def _how_quantized(info: Mapping[str, Any]) -> str:
    if info["weights_only"]:
        return "its weights only: they become float when it loads"
    return "yes" if info["quantized"] else "no"


def plan_view(plan: Mapping[str, Any]) -> RenderableType:
    """Every node of a plan, and how often each way of computing and storing occurs."""
    rows = [{**node, "elements": format_count(node["elements"])} for node in plan["nodes"]]
    columns = {
        "node": "node",
        "op_type": "op",
        "compute": "compute",
        "storage": "storage",
        "elements": "weights",
        "reason": "reason",
    }
    table = rows_table(rows, columns, title=f"plan for {plan['target']}", right=("weights",))
    compute = count_words(node["compute"] for node in rows)
    storage = count_words(node["storage"] for node in rows if node["storage"])
    parts: list[RenderableType] = [table, Text(f"compute: {compute}   storage: {storage}")]
    if rewrites := count_words(change["rule"] for change in plan.get("rewrites", ())):
        parts.append(Text(f"rewritten first: {rewrites}"))
    idle = map(printable, plan.get("idle_globs", ()))
    parts += [Text(f"note: {glob} matches no node and no weight") for glob in idle]
    if plan.get("config", {}).get("mode") == "auto":
        parts.append(Text(AUTO_MODE_NOTE, style="dim"))
    return Group(*parts)


def planned_view(row: Mapping[str, Any]) -> RenderableType:
    """What a batch would do with one model: its plan, or its error."""
    title = Text(f"{printable(row['model'])} -> {printable(row['output'])}", style="bold")
    if row["error"]:
        return Group(title, error_text(row["error"], row["where"], row["hint"]))
    return Group(title, plan_view(row["plan"]))


def draft_view(answer: Mapping[str, Any]) -> RenderableType:
    """What `quantmill init` found, and where it wrote the manifest."""
    rows = [
        {**model, "does not fit": ", ".join(f"{path} ({why})" for path, why in model["rejected"])}
        for model in answer["models"]
    ]
    headings = ("input", "summary", "calibration", "evaluation", "labels", "does not fit")
    table = rows_table(rows, headings)
    written = Text(f"written: {printable(answer['manifest'])}")
    return Group(table, written)


def host_view(report: Mapping[str, Any]) -> RenderableType:
    """What `quantmill doctor` answers: the host, the versions, and known problems with them."""
    problems = [Text(f"problem: {printable(p)}", style="bold red") for p in report["problems"]]
    if not problems:
        problems = [Text("no known problem", style="green")]
    return Group(facts_table(report["host"]), facts_table(report["versions"]), *problems)


def _values_table(heading: str, values: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A model's inputs or outputs, with type and shape."""
    rows = [{**v, "shape": " x ".join(map(str, v["shape"])) or "-"} for v in values]
    return rows_table(rows, {"name": heading, "dtype": "type", "shape": "shape"})
