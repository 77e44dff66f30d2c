"""Views of a model that was written, quantized or only rewritten, and of how right it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from flows.console.choice import why_chosen
from flows.console.formats import (
    before_after,
    count_words,
    format_db,
    format_ms,
    format_number,
    format_percent,
    format_ratio,
    format_size,
    format_speedup,
    latencies,
)
from flows.console.tables import facts_table, rows_table, verdict_text
from quant_core.metrics import MAX_SQNR_DB, PROBABILITY_ERROR
from quant_core.plan.targets import TARGETS, host_target_name


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
        "compute": count_words(layer["compute"] for layer in layers),
        "storage": count_words(layer["storage"] for layer in layers if layer["storage"]),
        "plan": _plan_text(result),
        "speed": _speed_text(result),
        "worst output": _floor_text(result),
        "note": result["note"],
    }
    if "export" in result:
        facts |= _export_facts(result["export"])
    if result["shortfall"] and "fidelity" not in result:
        facts["verdict"] = verdict_text(result["verdict"], result["reason"])
    compared = [validation_view(result)] if "fidelity" in result else []
    return Group(facts_table(facts), *compared)


def pareto_view(result: Mapping[str, Any]) -> RenderableType:
    """What was written, and the plans that no other beats in speed, SQNR and size."""
    chosen = [t for t in result["trace"] if t["candidate"] == result["chosen"]]
    shown = [*result["front"], *(t for t in chosen[-1:] if t not in result["front"])]
    rows = [
        {
            "plan": trial["candidate"],
            "speed": format_speedup(trial["speedup"]) if trial["speedup"] else "",
            "sqnr": format_db(trial["sqnr_db"]),
            "agreement": format_percent(trial["agreement"]),
            "size": format_size(trial["size_bytes"]),
            "chosen": "yes" if trial["candidate"] == result["chosen"] else "",
        }
        for trial in shown
    ]
    headings = ("plan", "speed", "sqnr", "agreement", "size", "chosen")
    table = rows_table(rows, headings, right=headings[1:5])
    return Group(quantization_view(result), table)


def _plan_text(result: Mapping[str, Any]) -> str:
    """The plan that was written, and why that one."""
    why = why_chosen(result["trace"], result["chosen"], result["verdict"])
    return f"{result['chosen']}: {why}" if why else ""


def _export_facts(export: Mapping[str, Any]) -> dict[str, str]:
    """What was written for OpenVINO, and what is wrong with it."""
    kernels = f"{export['integers']} of {export['multiplying']} kernels that multiply in int8"
    speed = format_speedup(export["timing"]["speedup"])
    return {
        "export": f"{export['output']}, {format_size(export['size_bytes'])}",
        "in OpenVINO": f"{speed} of float's speed, {kernels}",
        "export note": export["note"],
    }


def _speed_text(result: Mapping[str, Any]) -> str:
    """How fast a model is beside float, from the timing of both in turn."""
    timing, target = result["timing"], result["target"]
    if result["not_timed"]:
        return f"not timed: {result['not_timed']}"
    if timing is None:
        is_missing = host_target_name() in TARGETS[target].timed_on
        why = "its runtime is not installed" if is_missing else "it does not run on this host"
        return f"not timed: made for {target}, and {why}"
    latency = before_after(*latencies(timing), format_ms)
    others = ", while others used this host" if timing.get("busy") else ""
    return f"{latency} ({format_speedup(timing['speedup'])}){others}"


def _floor_text(result: Mapping[str, Any]) -> str:
    """The SQNR of the worst output beside the least that it was held to: first a bound of it for
    other samples, of which those that judge are a few, or not even like them if they are drawn.
    """
    worst, least = result["worst_db"], f"at least {result['floor_db']:g} dB wanted"
    if worst is None:
        return f"not checked ({least})"
    judges = "drawn samples" if result["is_drawn"] else "the samples that judged"
    if worst == MAX_SQNR_DB:
        return f"equal to float's on {judges}"
    if worst < result["floor_db"] and not result["shortfall"]:
        least = f"probabilities within {PROBABILITY_ERROR} of float's"
    lower = format_db(min(worst, result["lower_db"]))
    return f"SQNR {lower} or more around its mean, {format_db(worst)} on {judges} ({least})"


def validation_view(result: Mapping[str, Any]) -> RenderableType:
    """How right a quantized model is, and whether its contract is met."""
    fidelity = result["fidelity"]
    facts = {
        "samples": f"{fidelity['samples']}{', drawn' if result['is_drawn'] else ''}",
        "top-1": before_after(fidelity["top1_float"], fidelity["top1"], format_percent),
        "metric": before_after(fidelity["metric_float"], fidelity["metric"], format_number),
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
            "around mean": format_number(output["centred_db"], 1),
            "max error": format_number(output["max_abs_error"], 6),
            "flaw": output["flaw"],
        }
        for output in fidelity["per_output"]
    ]
    headings = ("output", "agreement", "cosine", "SQNR dB", "around mean", "max error", "flaw")
    return Group(
        facts_table(facts),
        rows_table(rows, headings, right=headings[1:6]),
        *_saturation_tables(result.get("saturation")),
        *_sensitivity_tables(result.get("sensitivity")),
    )


def optimization_view(result: Mapping[str, Any]) -> RenderableType:
    """What was rewritten in a float model, and what was taken back."""
    before, after = result["float_size_bytes"], result["size_bytes"]
    facts = {
        "written": result["output"],
        "size": f"{format_size(before)} -> {format_size(after)} ({format_ratio(before, after)})",
        "rewrites": count_words(change["rule"] for change in result["rewrites"]) or "none",
    }
    if result["note"]:
        facts["note"] = result["note"]
    for attempt in result["undone"]:
        facts[f"not {attempt['rule']}"] = attempt["reason"]
    return facts_table(facts)


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
